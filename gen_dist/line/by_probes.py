"""Slope and curvature by finite differences of the loss: forward passes only, at the distance of the step in use.

Both estimators need `phi(0)`: the loss of the training step where it is given, and the model draws no random numbers
(dropout) and does not write into its weights, else one more forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_dist.line.estimate import Estimate
from gen_dist.line.line import Line

__all__ = ["one_probe", "two_probes"]


def two_probes(line: Line, probe: float, loss: Tensor | None = None) -> Estimate:
    """Central differences: numerator `(phi(-h) - phi(h)) / 2h`, denominator `(phi(h) - 2 phi(0) + phi(-h)) / h^2`."""
    (here, ahead, behind), rounding = _losses(line, [probe, -probe], loss)
    numerator, denominator = (behind - ahead) / (2 * probe), (ahead - 2 * here + behind) / probe**2
    return Estimate(torch.stack([here, numerator, denominator], dim=1), rounding)


def one_probe(line: Line, probe: float, loss: Tensor | None = None) -> Estimate:
    """The chord to the probe, `(phi(0) - phi(h)) / h`, in the place of the numerator; it tells no curvature by itself.

    With the numerator `g.d` of the gradients, the denominator is `2 (g.d - chord) / h`; `measure` completes it.
    """
    (here, ahead), rounding = _losses(line, [probe], loss)
    chord = (here - ahead) / probe
    return Estimate(torch.stack([here, chord, torch.full_like(chord, torch.nan)], dim=1), rounding)


def _losses(line: Line, probes: list[float], loss: Tensor | None) -> tuple[tuple[Tensor, ...], float]:
    """`phi` at 0 and at each probe, shape `(micro-batches,)` each, and their relative rounding."""
    if loss is None or loss.numel() != len(line.data.micro_batches):
        walk = line.walk([0.0, *probes])
        return walk.losses.unbind(1), walk.rounding
    walk = line.walk(probes)
    here = loss.detach().double().reshape(-1).to(walk.losses.device)
    # other masks than in the training step, or weights that the training step wrote into after: another line
    if walk.draws_random_numbers or walk.rewrites_weights:
        here = line.walk([0.0]).losses[:, 0]
    return (here, *walk.losses.unbind(1)), walk.rounding
