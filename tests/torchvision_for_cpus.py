"""Import torchvision, if it is installed, also beside a PyTorch for CPUs.

transformers, diffusers and timm import it where it is. PyPI's is built for CUDA alone: without CUDA its import misses
operators, which nothing here calls, and theirs fails with it.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

__all__: list[str] = []


def _import() -> None:
    try:
        import torchvision  # noqa: F401 - the import is what is tried
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


if importlib.util.find_spec("torchvision") is not None:
    _import()
