"""What each PyTorch operator does to the derivatives of a jet: one rule an operator.

Rules get the operator and its arguments, at least one of which is a moving `Jet`, and return jets. `x0, x1, x2` are
value, velocity and acceleration; `None` is zero. Derivatives are never changed in place once a rule has returned
them, so rules may share them. What has no rule here is taken apart by PyTorch's own decompositions into operators
that have one; what has neither is refused by name.
"""

from gen_dist.jets.rules import (
    attention,
    communication,
    elementwise,
    losses,
    normalisation,
    products,
    reductions,
)

__all__ = ["attention", "communication", "elementwise", "losses", "normalisation", "products", "reductions"]
