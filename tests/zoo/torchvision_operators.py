"""Import torchvision, also beside a PyTorch for which its compiled operators were not built.

PyPI has torchvision built for CUDA alone. Beside a PyTorch for the CPU, its import then fails at `nms`. This gives it
that operator in Python. For the others, torchvision has Python code of its own (`roi_align`), or raises an error.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def import_torchvision() -> None:
    """Import it, or return if it is not installed: transformers works without."""
    try:
        import torchvision
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.library.impl("torchvision::nms", "cpu", _nms)
        import torchvision

        torchvision.ops.boxes._assert_has_ops = lambda: None


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The indices of the boxes that overlap no box of a higher score by more than the threshold."""
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
