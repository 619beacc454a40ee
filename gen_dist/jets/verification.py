"""Second derivatives that nobody wrote by hand are held to differences in float64, once for each kind of call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_dist.jets.general import jets_in, with_jets_replaced
from gen_dist.jets.jet import Jet, derivatives, with_acceleration
from gen_dist.torch_private import plain_values

__all__ = ["kind_of_call", "random_generators", "verified"]

Function = Callable[..., Any]


class Call(NamedTuple):
    """A function and its arguments, of which some are jets."""

    function: Function
    args: Any
    kwargs: Any


def kind_of_call(args: Any, kwargs: Any) -> Any:
    """What decides which formula of an operator is used: all of the arguments but the numbers in their tensors.

    Sizes count by their order alone, so that a sequence of another length is of the same kind.
    """
    sizes = sorted({n for x in _leaves((args, kwargs)) if isinstance(x, Tensor) for n in x.shape} | {0, 1})

    def kind(x: Any) -> Any:
        if isinstance(x, Tensor):
            return isinstance(x, Jet), x.dtype, x.layout, tuple(sizes.index(n) for n in x.shape)
        if isinstance(x, (list, tuple)):
            return tuple(kind(each) for each in x)
        if isinstance(x, dict):
            return tuple((key, kind(each)) for key, each in sorted(x.items()))
        return x if isinstance(x, (int, float, str, torch.dtype, type(None))) else repr(x)

    return kind((args, kwargs))


def verified(function: Function, rule: Function, args: Any, kwargs: Any) -> bool | None:
    """Whether the jets that `rule` returns are right for arguments of this kind.

    Two curves are tried: that of the arguments, and a random one nearby, where the first passes a kink or an edge of
    the domain. None says that the function does not bend on either, so that nothing was learned.
    """
    generators = random_generators(args, kwargs)
    states = [x.get_state() for x in generators]
    try:
        with with_acceleration():
            exact = _in_double(Call(_seeded(function, generators), args, kwargs))
            flat = False
            for curve in (_along_its_curve, _along_a_random_curve):
                for step in (1e-3, 1e-4, 3e-5):
                    found = _agrees(curve(exact), _seeded(rule, generators), step)
                    if found:
                        return True
                    flat |= found is None
            return None if flat else False
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def random_generators(args: Any, kwargs: Any) -> list[torch.Generator]:
    """The sources of the random numbers that a call may draw."""
    leaves = list(_leaves((args, kwargs)))
    devices = {x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda}
    given = [x for x in leaves if isinstance(x, torch.Generator)]
    return [torch.default_generator, *(torch.cuda.default_generators[device.index] for device in devices), *given]


def _seeded(function: Function, generators: list[torch.Generator]) -> Function:
    """The function, which draws the same random numbers each time."""

    def run(*args: Any, **kwargs: Any) -> Any:
        for generator in generators:
            generator.manual_seed(0)
        return function(*args, **kwargs)

    return run


def _in_double(call: Call) -> Call:
    """Return the same call in float64, with copies of all tensors."""
    wide = {True: torch.complex128, False: torch.float64}

    def widened(x: Tensor) -> Tensor:
        exact = x.is_floating_point() or x.is_complex()
        return x.detach().to(wide[x.is_complex()], copy=True) if exact else x

    def convert(x: Any) -> Any:
        if isinstance(x, Jet):
            return Jet(*(None if part is None else widened(part) for part in derivatives(x)))  # type: ignore[arg-type]
        if isinstance(x, Tensor):
            return widened(x)
        if isinstance(x, torch.dtype) and (x.is_floating_point or x.is_complex):
            return wide[x.is_complex]
        if type(x) in (list, tuple):
            return type(x)([convert(each) for each in x])
        return {key: convert(each) for key, each in x.items()} if type(x) is dict else x

    with plain_values():
        return Call(call.function, *convert((call.args, call.kwargs)))


def _size(x: Tensor | None) -> float:
    if x is None or not x.numel():
        return 0.0
    return math.sqrt(torch.linalg.vector_norm(x).item() ** 2 / x.numel())


def _along_its_curve(call: Call) -> Call:
    """Scale the parameter of the curve, so that at 1 the arguments have moved by about their own size."""
    scale = 1.0
    with plain_values():
        sizes = [[_size(part) for part in derivatives(jet)] for jet in jets_in((call.args, call.kwargs))]
        speed = max((max(x1, math.sqrt(x2 * (x0 or 1))) / (x0 or 1) for x0, x1, x2 in sizes), default=1.0)
        scale = 1 / speed if 0 < speed < math.inf else 1.0

        def scaled(jet: Jet) -> Jet:
            x0, x1, x2 = derivatives(jet)
            return Jet(x0, None if x1 is None else x1 * scale, None if x2 is None else x2 * scale**2)

        return Call(call.function, *with_jets_replaced((call.args, call.kwargs), scaled))


def _along_a_random_curve(call: Call) -> Call:
    with plain_values():
        generator = torch.Generator().manual_seed(0)

        def moved(jet: Jet) -> Jet:
            x = jet.value
            size = _size(x) or 1.0

            def noise() -> Tensor:
                return size * torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)

            return Jet(x + 0.05 * noise(), noise(), noise())

        return Call(call.function, *with_jets_replaced((call.args, call.kwargs), moved))


def _agrees(call: Call, rule: Function, step: float) -> bool | None:
    """Compare the rule's derivatives with central differences of fourth order; None if nothing moves there.

    Of several results, those count that the rule returns as jets: the others are for a backward pass alone.
    """
    with plain_values():
        try:
            points = [[*_floats(_value_at(call, k * step))] for k in (-2, -1, 0, 1, 2)]
            seen = [*_floats(rule(*call.args, **call.kwargs))]
        except RuntimeError:  # outside of the domain, or of what the operator knows, such as float64
            return False
        known = [isinstance(x, Jet) and not x.is_unknown for x in seen]
        moved = False
        for jet, counts, *f in zip(seen, known, *points, strict=True):
            if any(known) and not counts:
                continue
            value, velocity, acceleration = derivatives(jet)
            slope = (8 * (f[3] - f[1]) - (f[4] - f[0])) / (12 * step)
            bend = (16 * (f[3] + f[1]) - (f[4] + f[0]) - 30 * f[2]) / (12 * step**2)
            rounding = 1e-14 * _size(f[2].nan_to_num(0, 0, 0))
            for part, expected, error in (
                (value, f[2], rounding),
                (velocity, slope, rounding / step),
                (acceleration, bend, rounding / step**2),
            ):
                if expected.isfinite().sum() * 2 < expected.numel():
                    return None  # outside of the domain
                if not _close(torch.zeros_like(expected) if part is None else part, expected, error):
                    return False
                moved |= part is not value and bool((expected.abs() > 10 * error).any())
    return True if moved else None


def _close(seen: Tensor, expected: Tensor, error: float) -> bool:
    """Whether nearly all elements are equal: a few may pass a kink on the way."""
    finite = expected.isfinite()
    if not finite.any():
        return True
    seen, expected = seen.expand(finite.shape)[finite], expected[finite]
    typical = _size(expected)
    near = (seen - expected).abs() <= 1e-4 * (torch.maximum(seen.abs(), expected.abs()) + typical) + error
    return bool(near.double().mean() >= 0.97)


def _value_at(call: Call, a: float) -> Any:
    def at(jet: Jet) -> Tensor:
        x, x1, x2 = derivatives(jet)
        x = x if x1 is None else x + a * x1
        result: Tensor = x.clone() if x2 is None else x + (a * a / 2) * x2
        return result

    args, kwargs = with_jets_replaced((call.args, call.kwargs), at)
    return call.function(*args, **kwargs)


def _floats(result: Any) -> Iterator[Tensor]:
    return (x for x in _leaves(result) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()))


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, (list, tuple)):
        for x in arguments:
            yield from _leaves(x)
    elif isinstance(arguments, dict):
        yield from _leaves(list(arguments.values()))
    else:
        yield arguments
