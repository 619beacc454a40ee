"""Lets torchvision be imported beside a PyTorch for CPUs. Import this before what imports torchvision.

transformers, diffusers, timm, peft and Lightning import it where it is installed. PyPI has it built for CUDA alone:
beside a PyTorch for CPUs its import fails, and theirs with it, since its compiled operators cannot be loaded. This
gives it `nms` in Python, which detection models call. For the others torchvision has Python code of its own
(`roi_align`), or raises an error. If torchvision is not installed, or works, nothing happens.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

__all__ = ["nms"]


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The indices of the boxes that overlap no box of a higher score by more than the threshold, best first."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept, left = [], scores.argsort(descending=True)
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[left, :2])
        high = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        common = (high - low).clamp(min=0).prod(1)
        left = left[common <= threshold * (area[best] + area[left] - common)]
    return torch.stack(kept) if kept else scores.new_zeros(0, dtype=torch.long)


def _make_importable() -> None:
    try:
        import torchvision  # noqa: F401 - the import is what is tried
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            return  # who needs torchvision will see why it fails
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):  # its import asks for both
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        torch.library.impl("torchvision::nms", "cpu", nms)


_make_importable()
