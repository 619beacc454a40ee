"""The scheduler: one update of the learning rate, from gradients to a rate that is the same on every rank."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gen_dist import sharding
from gen_dist.collectives import Ranks
from gen_dist.curvature import Quadratic, estimator
from gen_dist.line import Batch, Criterion, Line
from gen_dist.optimizer import Direction, GenOptimizer, rate_ratios, set_rate
from gen_dist.rule import ACCEPTED, CLAMPED, CURVATURE_IN_ROUNDING, Decision, decide
from gen_dist.sharding import Layout

__all__ = ["ApproxGen", "ExactGen", "GenScheduler", "Update"]

logger = logging.getLogger("gen_dist")

FIRST_PROBE = 1e-3  # where no rate is known yet: lr = 0 at the start


class Update(NamedTuple):
    """What an update saw and did, as plain numbers.

    `numerator` is `g.d = -phi'(0)`, `denominator` is `d'Hd = phi''(0)`, `loss` is `phi(0)`, all over the ranks
    together; `lr` is the rate that was set (of the group with the largest initial rate) and `reason` says why.
    """

    lr: float
    numerator: float
    denominator: float
    loss: float
    reason: str

    @property
    def accepted(self) -> bool:
        """Whether the rate comes from this update's measurement."""
        return self.reason in (ACCEPTED, CLAMPED)


class Measured(NamedTuple):
    """The same on every rank: the estimator's numbers, `g.d`, the noise of the loss, whether gradients were finite."""

    phi: list[float]
    g_dot_d: float
    noise: float
    finite: bool


class GenScheduler(LRScheduler):
    """Sets the learning rate of a `GenOptimizer` to the minimum of the loss along its direction (GeN).

    The direction `d` of the optimizer, the loss on the batch given to `step`, and the parabola
    `phi(a) = L(theta - a d) ~ phi(0) - a g.d + a^2/2 d'Hd` along it give `lr = (g.d) / (d'Hd)`, clamped
    (Bu & Xu, ICLR 2025, arXiv 2407.02772). `L` is the mean over ranks, so that all ranks set the identical rate.

    Args:
        optimizer: made by `make_gen_optimizer` or `as_gen_optimizer`. The learning rate it has now is kept until the
            first update succeeds, and the ratios between its groups are kept for good.
        model: the model being trained, as you call it: plain, in DDP, or after `fully_shard`.
        criterion: `criterion(model(x), y)` is the loss; not needed if you give closures to `step`.
        lr_min, lr_max: the clamp.
        curvature: `'exact'`, `'gauss-newton'` or `'forward'`.
        probes: forward passes of `'forward'`, 1 or 2.
        update_every: measure at the first of every so many steps; in between the rate stays and `step` costs nothing.
        process_group: the ranks that train together; by default those of the DDP wrapper, or all.

    Raises `TypeError` or `ValueError` for arguments that do not fit, and says which do.
    """

    def __init__(
        self,
        optimizer: GenOptimizer,
        model: nn.Module,
        criterion: Criterion | None = None,
        lr_min: float = 0.0,
        lr_max: float = 1.0,
        *,
        curvature: str = "exact",
        probes: int = 2,
        update_every: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        # As in torch's ReduceLROnPlateau, whose step takes an argument too, LRScheduler.__init__ is not called: it
        # would patch the optimizer and take a first step.
        _check_arguments(optimizer, model, criterion, lr_min, lr_max, update_every)
        self.optimizer: GenOptimizer = optimizer
        self.model = model
        self.criterion = criterion
        self.lr_min, self.lr_max = float(lr_min), float(lr_max)
        self.curvature, self.probes, self.update_every = curvature, probes, update_every
        self.estimator = estimator(curvature, probes)
        self.layout = Layout(model)
        self.ranks = Ranks(process_group if process_group is not None else self.layout.process_group)
        self.base_lrs: list[float | Tensor] = []
        self._adopt_new_groups()
        self.last_epoch = 0
        self.last: Update | None = None
        self._rate = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        self._probe = self._rate if self._rate > 0 else FIRST_PROBE
        self._warned = False

    def step(
        self,
        x: Any = None,
        y: Any = None,
        *,
        closure: Callable[[], Tensor] | None = None,
        batches: Sequence[Any] | None = None,
        weight: float = 1.0,
        loss: Tensor | None = None,
    ) -> None:
        """Set the learning rate for the gradients that are there; call it between `backward()` and `optimizer.step()`.

        Args:
            x, y: this rank's slice: `criterion(model(x), y)` is its loss.
            closure: instead, a function that returns this rank's scalar loss, calling the model as it likes.
            batches: instead, a list of `(x, y)` or closures, whose losses are averaged (gradient accumulation).
            weight: this rank's share where slices are unequal, such as its number of samples or tokens. On plain
                replicas the gradients are averaged with it too; in DDP and FSDP scale the loss that you call
                backward on by `weight * ranks / total weight`. A rank that has run out of data calls
                `step(weight=0)`.
            loss: the loss of the training step on the same batch, which saves `'forward'` one pass.

        Every rank calls it. Raises `ValueError` or `TypeError` on a wrong call; an error in the model or the closure is
        raised on every rank, with the weights as they were.
        """
        weight = _checked_weight(weight)
        slices = self._batches(x, y, closure, batches, weight)
        self._adopt_new_groups()
        due = self.last_epoch % self.update_every == 0
        self.last_epoch += 1

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ranks.average_gradients(self.layout.needs_averaging(parameters), weight)
        self.optimizer.reset()
        if not due:
            return
        if finite := self._gradients_are_finite(parameters):
            self.optimizer.compute_param_updates()
        else:
            self.optimizer.skip_step()
        line = Line(self.layout, self.optimizer.direction or Direction(), slices)
        measured = self._measured(line, weight, loss, finite)
        if not measured.finite:
            self.optimizer.skip_step()
        parabola = self.estimator.parabola(measured.phi, self._probe, measured.g_dot_d, measured.noise)
        self._cross_check(parabola, measured.g_dot_d)
        self._set(parabola, decide(parabola, self._rate, self.lr_min, self.lr_max))

    # ---------------------------------------------------------------------------------- the parts of a step

    def _gradients_are_finite(self, parameters: list[Tensor]) -> bool:
        """NaN or infinity in any gradient must not enter the optimizer's state. Shards need the other ranks' word."""
        gradients = [sharding.local(p.grad) for p in parameters if p.grad is not None]
        bad = torch.tensor(not _all_finite(gradients))
        return not (self.ranks.any(bad) if self.layout.gradient_is_sharded(parameters) else bad).item()

    def _measured(self, line: Line, weight: float, loss: Tensor | None, finite: bool) -> Measured:
        """What the estimator sees of the line, over all ranks, by one reduction.

        Raises on every rank what went wrong on any.
        """
        failure: Exception | None = None
        phi = torch.full((3,), math.nan, dtype=torch.float64)
        try:
            if finite and line.batches:
                phi = self.estimator.measure(line, self._probe, loss)
        except Exception as error:
            failure = error
        settings = self._settings(line)
        mark = zlib.crc32(settings.encode()) % 2**20  # its square, summed, stays exact in float64
        seen = bool(line.batches)  # a rank without data cannot know how many batches there are
        marks = [seen, seen * mark, seen * mark**2, seen * line.noise]
        flags = torch.tensor([weight, failure is not None, not finite, *marks], dtype=torch.float64)
        product = _inner_product(self.layout, line.direction, self.ranks.size)
        share = weight * phi if weight else torch.zeros_like(phi)  # an empty slice may well have a NaN for its mean
        packed = torch.cat([flags.to(share.device), share, product.to(share.device)])
        total, failed, not_finite, count, sum_of_marks, squares, noise, *sums, g_dot_d = self.ranks.sum(packed).tolist()
        if failed:
            raise self._failure(failure)
        if count * squares != sum_of_marks**2:
            said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(self.ranks.texts(settings)))
            raise ValueError(f"the ranks disagree on the scheduler's settings, which must be the same: {said}")
        mean = [s / total if total else math.nan for s in sums]
        return Measured(mean, g_dot_d, noise / max(count, 1), not not_finite)

    def _settings(self, line: Line) -> str:
        return (
            f"lr_min={self.lr_min}, lr_max={self.lr_max}, curvature={self.curvature!r}, probes={self.probes}, "
            f"update_every={self.update_every}, {len(line.batches)} batch(es)"
        )

    def _failure(self, here: Exception | None) -> Exception:
        """What to raise when a rank failed: its own error there, and who it was elsewhere."""
        texts = self.ranks.texts(f"{type(here).__name__}: {here}" if here is not None else "")
        if here is not None:
            return here
        who = ", ".join(f"rank {rank} ({text})" for rank, text in enumerate(texts) if text)
        return RuntimeError(f"the loss could not be evaluated in scheduler.step on {who}")

    def _cross_check(self, parabola: Quadratic, g_dot_d: float) -> None:
        slope = parabola.slope  # that of finite differences is a mean over the step, and may well differ
        apart = abs(slope + g_dot_d) > 0.5 * max(abs(slope), abs(g_dot_d))
        if apart and self.curvature != "forward" and not self._warned:
            self._warned = True
            logger.warning(
                "the loss falls along the direction at rate %.3g, while the gradients say %.3g (told once). That is "
                "as it should be if they were clipped, or if the model draws random numbers; otherwise the gradients "
                "are still scaled (scaler.unscale_(optimizer) comes first), or scheduler.step was given another "
                "batch or another loss than backward().",
                -slope,
                g_dot_d,
            )

    def _set(self, parabola: Quadratic, decision: Decision) -> None:
        self._rate = decision.lr
        for group, ratio in zip(self.optimizer.param_groups, rate_ratios(self.optimizer), strict=True):
            set_rate(group, decision.lr * ratio)
        self.last = Update(decision.lr, -parabola.slope, parabola.curvature, parabola.loss, decision.reason)
        if decision.reason == CURVATURE_IN_ROUNDING:
            self._probe = min(10 * self._probe, max(self._probe, self.lr_max))
        elif self.last.accepted and decision.lr > 0:
            self._probe = decision.lr

    def _adopt_new_groups(self) -> None:
        """Groups may come later by `add_param_group`: they keep the ratio of the rate that they come with."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            group.setdefault("initial_lr", float(group["lr"]))
            self.base_lrs.append(float(group["initial_lr"]))

    def _batches(self, x: Any, y: Any, closure: Any, batches: Any, weight: float) -> list[Batch]:
        given = [name for name, value in (("x", x), ("closure", closure), ("batches", batches)) if value is not None]
        if not given and weight == 0:
            return []  # this rank has run out of data
        if len(given) != 1:
            raise ValueError(
                f"scheduler.step got {' and '.join(given) or 'no batch'}; type one of scheduler.step(x, y), "
                "scheduler.step(closure=fn), scheduler.step(batches=[(x, y), ...])"
            )
        if batches is None:
            return [self._batch(closure if closure is not None else (x, y))]
        if not batches:
            raise ValueError("scheduler.step(batches=[]): at least one batch is needed")
        return [self._batch(batch) for batch in batches]

    def _batch(self, batch: Any) -> Batch:
        if callable(batch):
            if self.curvature == "gauss-newton":
                raise ValueError(
                    "curvature='gauss-newton' needs model and criterion apart: type scheduler.step(x, y), or use "
                    "curvature='exact' with closures"
                )
            return Batch(self.model, closure=batch)
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(f"a batch is a pair (x, y) or a closure that returns the loss, got {batch!r:.80}")
        x, y = batch
        if y is None:
            raise ValueError("scheduler.step(x) without a target: type scheduler.step(x, y) or step(closure=fn)")
        if self.criterion is None:
            raise ValueError(
                "scheduler.step(x, y) needs the criterion that the scheduler was made without: pass criterion=, or "
                "type scheduler.step(closure=fn) with a function that returns the loss"
            )
        return Batch(self.model, self.criterion, x, y)

    # ------------------------------------------------------------------- what the ecosystem asks of a scheduler

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each parameter group."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what a run needs to go on with the same rates. Local to this rank; no communication."""
        return {
            "last_epoch": self.last_epoch,
            "rate": self._rate,
            "probe": self._probe,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "last": None if self.last is None else tuple(self.last),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned. The optimizer's own state holds the rates in its groups."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._rate = float(state_dict["rate"])
        self._probe = float(state_dict["probe"])
        self.base_lrs = [float(rate) for rate in state_dict["base_lrs"]]
        self.last = None if state_dict["last"] is None else Update(*state_dict["last"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(curvature={self.curvature!r}, lr_min={self.lr_min}, lr_max={self.lr_max}, "
            f"update_every={self.update_every}, last={self.last})"
        )


class ExactGen(GenScheduler):
    """`GenScheduler` with exact curvature and the rule of the paper as it stands: the raw ratio, clamped."""

    def __init__(
        self,
        optimizer: GenOptimizer,
        model: nn.Module,
        criterion: Criterion | None = None,
        lr_min: float = 0.0,
        lr_max: float = 1.0,
        *,
        update_every: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            model,
            criterion,
            lr_min,
            lr_max,
            update_every=update_every,
            process_group=process_group,
        )


class ApproxGen(GenScheduler):
    """`GenScheduler` with curvature by forward passes alone: anything that can evaluate its loss can use it."""

    def __init__(
        self,
        optimizer: GenOptimizer,
        model: nn.Module,
        criterion: Criterion | None = None,
        lr_min: float = 0.0,
        lr_max: float = 1.0,
        *,
        probes: int = 2,
        update_every: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            model,
            criterion,
            lr_min,
            lr_max,
            curvature="forward",
            probes=probes,
            update_every=update_every,
            process_group=process_group,
        )


def _all_finite(tensors: list[Tensor]) -> bool:
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    if not dense:
        return True
    # The sum of finite numbers is finite but for overflow, and by far the cheapest look at all of them.
    sums = torch.stack([t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).double() for t in dense])
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(t).all()) for t in dense)


def _inner_product(layout: Layout, direction: Direction, ranks: int) -> Tensor:
    """This rank's part of `g.d`, shape `(1,)`: a sum over ranks counts every parameter once."""
    parts = [torch.zeros((), dtype=torch.float64)]
    for _, ratio, parameters, updates in direction:
        for parameter, update in zip(parameters, updates, strict=True):
            gradient = sharding.local(parameter.grad)  # type: ignore[arg-type]
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            parts.append(
                _dot(gradient.flatten(), update.flatten()).double() * (ratio / layout.replicas(parameter, ranks))
            )
    device = parts[-1].device
    return torch.stack([part.to(device) for part in parts]).sum().reshape(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    half = a.dtype in (torch.float16, torch.bfloat16)
    return torch.dot(a.float(), b.float()) if half else torch.dot(a, b)


def _checked_weight(weight: Any) -> float:
    number = float(weight)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"weight must be a number >= 0, this rank's share of the batch, got {weight!r}")
    return number


def _check_arguments(optimizer: Any, model: Any, criterion: Any, lr_min: Any, lr_max: Any, update_every: Any) -> None:
    if not isinstance(optimizer, GenOptimizer):
        if isinstance(optimizer, Optimizer):
            name = type(optimizer).__name__
            raise TypeError(
                f"the optimizer is a plain {name}: type optimizer = gen_dist.as_gen_optimizer(optimizer) first, or "
                f"make it by gen_dist.make_gen_optimizer({name}, model.parameters(), ...)"
            )
        raise TypeError(f"optimizer must come from gen_dist.make_gen_optimizer, got {type(optimizer).__name__}")
    if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
        raise TypeError(
            "the optimizer has complex parameters, along which no curvature is defined here: keep them real"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if criterion is not None and not callable(criterion):
        raise TypeError(f"criterion must be callable as criterion(model(x), y), got {criterion!r}")
    if not (0 <= lr_min <= lr_max < math.inf):
        raise ValueError(f"need 0 <= lr_min <= lr_max, got lr_min={lr_min!r}, lr_max={lr_max!r}")
    if not (isinstance(update_every, int) and update_every >= 1):
        raise ValueError(f"update_every must be a whole number of steps, 1 or more, got {update_every!r}")
