"""The operator rules: what each PyTorch operator does to the derivatives of a jet.

An operator rule receives the operator and its arguments, of which at least one is a moving `Jet`, and returns jets.
In the code, `x0, x1, x2` are value, velocity and acceleration; `None` means zero. Operator rules may share derivatives
between jets, since nothing changes a derivative in place after an operator rule has returned it.

An operator without a rule runs by its decomposition in PyTorch, which calls simpler operators. An operator without a
decomposition raises `UnsupportedOperation`.
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
