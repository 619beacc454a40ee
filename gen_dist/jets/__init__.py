"""2-jets: the first and second derivatives of every tensor along a line, carried forward through a model.

Along the line `theta + a d`, every tensor of a forward pass is a function of the number `a`. A `Jet` holds it as three
plain tensors, taken at `a = 0`: the value `x`, the velocity `x'` and the acceleration `x''`. None means zero. An
operator maps the jets of its arguments to the jet of its result, by Faa di Bruno's formula to second order:

                          value      velocity              acceleration
    function of one       f(x)       f'(x) x'              f''(x) x'^2 + f'(x) x''
    bilinear function     f(x, w)    f(x', w) + f(x, w')   f(x'', w) + 2 f(x', w') + f(x, w'')

One forward pass without a graph then gives the loss, its slope and its curvature, exact up to rounding:

    >>> import torch
    >>> from gen_dist import jets
    >>> x, d = torch.tensor(2.0), torch.tensor(1.0)
    >>> jets.derivatives(jets.Jet(x, d) ** 3)
    (tensor(8.), tensor(12.), tensor(12.))

`JetMode` runs a model on jets in place of its parameters.

An operator has an operator rule where speed matters. Any other one that autograd can differentiate twice needs none:
autograd records that operator alone, on plain tensors, and its first and second derivatives are read off and held to
differences of its values in float64, once for each kind of call (`general`, `verification`). What is left raises
`UnsupportedOperation`: operators whose derivative autograd cannot differentiate again, or has otherwise than their
values. To add an operator rule, write the operator in terms of operators that have a derivative:

    >>> @torch.library.custom_op("toy::cube", mutates_args=())
    ... def cube(x: torch.Tensor) -> torch.Tensor:
    ...     return x**3
    >>> @jets.rule("toy::cube")
    ... def cube_of_jet(operator, x):
    ...     return x * x * x
    >>> jets.derivatives(cube(jets.Jet(x, d)))
    (tensor(8.), tensor(12.), tensor(12.))

An operator rule can also compute the derivatives itself. This one is for an operator that is linear in `x`:

    >>> @torch.library.custom_op("toy::reverse", mutates_args=())
    ... def reverse(x: torch.Tensor) -> torch.Tensor:
    ...     return x.flip(0)
    >>> @jets.rule("toy::reverse")
    ... def reverse_of_jet(operator, x):
    ...     return jets.Jet(*(None if part is None else operator(part) for part in jets.derivatives(x)))
    >>> jets.derivatives(reverse(jets.Jet(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))))
    (tensor([2., 1.]), tensor([1., 0.]), None)

A custom `autograd.Function` is followed through its forward code if the gradient that it defines is the derivative of
that code, which is compared at each measurement; `trust` takes it on the user's word.

The modules in `gen_dist.jets.rules` hold the operator rules of PyTorch's own operators.
"""

from gen_dist.jets import dispatch, rules  # noqa: F401 - imported to register the operator rules
from gen_dist.jets.functions import trust
from gen_dist.jets.jet import Jet, UnsupportedOperation, derivatives, noting_casts, velocity_only
from gen_dist.jets.mode import JetMode, NeedsGraph
from gen_dist.jets.registry import rule

__all__ = [
    "Jet",
    "JetMode",
    "NeedsGraph",
    "UnsupportedOperation",
    "derivatives",
    "noting_casts",
    "rule",
    "trust",
    "velocity_only",
]
