"""The operator rules: what each PyTorch operator does to the derivatives of a jet.

An operator rule receives the operator and its arguments, of which at least one is a moving `Jet`, and returns jets.
In the code, `x0, x1, x2` are value, velocity and acceleration; `None` means zero. Operator rules may share derivatives
between jets, since nothing changes a derivative in place after an operator rule has returned it.

What has no rule here, or has one that raises `NotCovered` for these arguments, goes `through_unwritten`.
"""

from gen_dist.jets.rules import (
    attention,
    communication,
    distances,
    elementwise,
    linear,
    losses,
    normalisation,
    products,
    reductions,
    sequences,
)

__all__ = [
    "attention",
    "communication",
    "distances",
    "elementwise",
    "linear",
    "losses",
    "normalisation",
    "products",
    "reductions",
    "sequences",
]
