"""Layer, group, batch and RMS normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_dist.jets.jet import UnsupportedOperation, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import aten, for_backward, rule
from gen_dist.jets.rules.terms import Term
from gen_dist.torch_private import Operator, overload_name_of, schema_of


class Normalisation(NamedTuple):
    """`n = (x - E x) / sqrt(var x + eps)` at one point, and what its derivatives need.

    `tangent(v)` is `J v`, where `J` is the Jacobian. `J` is symmetric, so PyTorch's backward kernel computes it.
    `mean(a, b)` is `E[a b]` over the elements that are normalised together, in a shape that broadcasts.
    """

    n0: Tensor
    rstd: Tensor
    eps: float
    tangent: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor, Tensor], Tensor]

    def applied_to(self, x: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return value, velocity and acceleration of `n`, each a new tensor. With `h = rstd E[n0 x1]`:

        n1 = J x1        n2 = J x2 - 2 h n1 - (E[n1^2] + eps rstd^2 h^2) n0
        """
        n0, rstd = self.n0, self.rstd
        _, x1, x2 = derivatives(x)
        n1 = None if x1 is None else self.tangent(x1)
        n2 = None if x2 is None or not wants_acceleration() else self.tangent(x2)
        if n1 is not None and wants_acceleration():
            h = self.mean(n0, x1) * rstd
            size = self.mean(n1, n1) + self.eps * rstd * rstd * h * h
            n2 = torch.mul(n1, -2 * h) if n2 is None else n2.addcmul_(n1, h, value=-2)
            n2.addcmul_(n0, size, value=-1)
        return n0, n1, n2


def _affine(normal: tuple[Tensor, Tensor | None, Tensor | None], weight: Any, bias: Any) -> Any:
    """Return the jet of `n w + b`. The value and the derivatives of `n` are overwritten."""
    n0, n1, n2 = normal
    (w0, w1, w2), (b0, b1, b2) = derivatives(weight), derivatives(bias)

    def total(n: Tensor | None, b: Any, *terms: Term) -> Tensor | None:
        if n is not None and w0 is not None:
            n.mul_(w0)
        for factor, a, w in terms:
            if a is not None and w is not None:
                n = a * (factor * w) if n is None else n.addcmul_(a, w, value=factor)
        return b if n is None else n if b is None else n.add_(b)

    acceleration = total(n2, b2, (2, n1, w1), (1, n0, w2)) if wants_acceleration() else None
    velocity = total(n1, b1, (1, n0, w1))
    value = total(n0, b0)
    assert value is not None
    return as_jet(value, velocity, acceleration)


@rule("native_layer_norm")
def _layer_norm(_: Operator, x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    x0 = derivatives(x)[0].contiguous()
    dims = list(range(x0.dim() - len(shape), x0.dim()))
    n0, mean, rstd = aten.native_layer_norm(x0, shape, None, None, eps)
    mask = [True, False, False]
    normalisation = Normalisation(
        n0,
        rstd,
        eps,
        lambda v: aten.native_layer_norm_backward(v.contiguous(), x0, shape, mean, rstd, None, None, mask)[0],
        lambda a, b: (a * b).mean(dims, keepdim=True),
    )
    return _affine(normalisation.applied_to(x), weight, bias), for_backward(mean), for_backward(rstd)


@rule("native_group_norm")
def _group_norm(
    _: Operator, x: Any, weight: Any, bias: Any, n: int, channels: int, positions: int, groups: int, eps: float
) -> Any:
    x0, sizes = derivatives(x)[0].contiguous(), (n, channels, positions, groups)
    n0, mean, rstd = aten.native_group_norm(x0, None, None, *sizes, eps)

    def for_elements(statistic: Tensor) -> Tensor:
        per_channel = statistic.reshape(n, groups, 1).expand(n, groups, channels // groups)
        return per_channel.reshape(n, channels, *(1 for _ in x0.shape[2:]))

    mask = [True, False, False]
    normalisation = Normalisation(
        n0,
        for_elements(rstd),
        eps,
        lambda v: aten.native_group_norm_backward(v.contiguous(), x0, mean, rstd, None, *sizes, mask)[0],
        lambda a, b: for_elements((a * b).reshape(n, groups, -1).mean(2)),
    )
    parameters = (_for_channels(p, x0.dim()) for p in (weight, bias))
    return _affine(normalisation.applied_to(x), *parameters), for_backward(mean), for_backward(rstd)


def _unused() -> Any:
    """Return a stand-in for the statistics that a backward pass would read. There is no backward pass."""
    return torch.empty(0)


@rule(
    "native_layer_norm_backward",
    "native_group_norm_backward",
    "native_batch_norm_backward",
    "cudnn_batch_norm_backward",
    "miopen_batch_norm_backward",
    "_fused_rms_norm_backward",
)
def _gradient(operator: Operator, *args: Any) -> Any:
    """A loss that takes a gradient itself comes here. The statistics that it needs are not computed."""
    raise UnsupportedOperation(operator, "inside a loss that takes gradients has no operator rule")


def _for_channels(parameter: Any, dim: int) -> Any:
    return None if parameter is None else parameter.reshape((-1,) + (1,) * (dim - 2))


@rule("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm")
def _batch_norm(operator: Operator, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    if overload_name_of(operator) == "no_stats":
        rest = (None, None, *rest)
    running_mean, running_var, training, momentum, eps = rest
    x0, dim = derivatives(x)[0], x.dim()
    # The operator updates the running statistics itself, as in a plain forward pass.
    n0, mean, rstd = aten.native_batch_norm(x0, None, None, running_mean, running_var, training, momentum, eps)
    if training:
        backward = aten.native_batch_norm_backward
        no_mean, no_scale, count = torch.zeros_like(mean), torch.ones_like(rstd), x0.numel() // mean.numel()

        def mean_product(a: Tensor, b: Tensor) -> Tensor:
            # With mean 0 and scale 1, the gradient of the weight is the sum of a b. No product is stored.
            mask = [False, True, False]
            product = backward(a, b, None, None, None, no_mean, no_scale, True, eps, mask)[1]
            return _for_channels(product / count, dim)

        normal = Normalisation(
            n0,
            _for_channels(rstd, dim),
            eps,
            lambda v: backward(v, x0, None, None, None, mean, rstd, True, eps, [True, False, False])[0],
            mean_product,
        ).applied_to(x)
    else:
        scale = _for_channels(torch.rsqrt(running_var + eps), dim)
        normal = (n0, *(None if d is None else d * scale for d in derivatives(x)[1:]))
    parameters = (_for_channels(p, dim) for p in (weight, bias))
    unseen = (_unused() for _ in schema_of(operator).returns[1:])
    return (_affine(normal, *parameters), *unseen)


@rule("_fused_rms_norm")
def _fused_rms_norm(operator: Operator, x: Any, shape: list[int], weight: Any, eps: float | None) -> Any:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = list(range(x.dim() - len(shape), x.dim()))
    normal = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    return normal if weight is None else normal * weight, _unused()
