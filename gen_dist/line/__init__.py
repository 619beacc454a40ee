"""The loss along the direction, `phi(a) = L(theta - a d)`: on this rank's slice, and over all ranks together."""

from gen_dist.line.by_backward import Ordinary, by_backward
from gen_dist.line.by_jets import exact, gauss_newton
from gen_dist.line.by_probes import one_probe, two_probes
from gen_dist.line.data import BatchLoss, Criterion, MicroBatch, Slice, as_slice, batches_of, check_losses
from gen_dist.line.estimators import Estimator, NeedsForward, estimator
from gen_dist.line.line import Line, Walk
from gen_dist.line.measurement import (
    Measured,
    Method,
    check_alike,
    measure,
    raise_together,
    walk_over_ranks,
)

__all__ = [
    "BatchLoss",
    "Criterion",
    "Estimator",
    "Line",
    "Measured",
    "Method",
    "MicroBatch",
    "NeedsForward",
    "Ordinary",
    "Slice",
    "Walk",
    "as_slice",
    "batches_of",
    "by_backward",
    "check_alike",
    "check_losses",
    "estimator",
    "exact",
    "gauss_newton",
    "measure",
    "one_probe",
    "raise_together",
    "two_probes",
    "walk_over_ranks",
]
