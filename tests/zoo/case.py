"""A case of the yardstick: a model and its loss; and how a builder makes one in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class NotBuilt(Exception):
    """The model cannot be built small here, or does not run: the message says why."""


class Case(NamedTuple):
    """A model, and a function that computes its loss, the same at each call."""

    model: nn.Module
    loss: Callable[[], Tensor]


class InFloat64(TorchFunctionMode):
    """Context manager in which float32 and bfloat16 mean float64.

    Many models cast to float32 what half precision would spoil, and some to bfloat16 what they trained with. In float64
    these casts would lose digits instead.
    """

    wide = {  # noqa: RUF012 - a constant
        torch.float32: torch.float64,
        torch.bfloat16: torch.float64,
        torch.complex64: torch.complex128,
    }

    def __enter__(self) -> InFloat64:
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = [self.wide.get(x, x) if isinstance(x, torch.dtype) else x for x in args]
        kwargs = {key: self.wide.get(x, x) if isinstance(x, torch.dtype) else x for key, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


class TwiceDifferentiable(TorchFunctionMode):
    """Context manager in which two functions are written out, whose kernels PyTorch does not differentiate twice.

    The kernel of `hardsigmoid` has no double backward, and takes 1/6 in float32. That of `_weight_norm` takes the norm
    for a constant in its double backward.
    """

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if function is torch._weight_norm:
            v, g, *dim = args
            return v * (g / torch.norm_except_dim(v, 2, *dim))
        return function(*args, **(kwargs or {}))


def seed() -> None:
    """Seed all random streams: dropout, and what models draw from Python and NumPy."""
    import numpy

    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)


def case(model: nn.Module, run: Callable[[], Any], training: bool = True) -> Case:
    """A case whose loss is what `run` returns: a scalar, or an output with a `loss`, or any output.

    Of another output, the loss is the mean squared difference of its floating tensors to random targets: a mean of
    squares alone would be constant behind a norm. All weights get some noise, since many models start at zero, where
    part of the Hessian is zero.
    """
    model.train(training).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.02 * torch.randn_like(p))

    def loss() -> Tensor:
        seed()
        output = run()
        return scalar_of(output)

    return Case(model, loss)


def scalar_of(output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.numel() == 1:
        return output.reshape(())
    given = getattr(output, "loss", None)
    if isinstance(given, Tensor) and given.numel() == 1:
        return given.reshape(())
    terms = [_distance(x) for x in _floating(output)]
    if not terms:
        raise NotBuilt("the output has no floating tensor that depends on the weights")
    return torch.stack(terms).sum()


def _floating(output: Any) -> Iterator[Tensor]:
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    for x in tree_leaves(output):
        if isinstance(x, Tensor) and x.numel() and (x.is_floating_point() or x.is_complex()):
            yield torch.view_as_real(x) if x.is_complex() else x


def _distance(x: Tensor) -> Tensor:
    target = torch.linspace(-1, 1, 97).repeat(x.numel() // 97 + 1)[: x.numel()].view(x.shape)
    return (x - target).square().mean()
