"""The scheduler: one update of the learning rate, from gradients to a rate that is the same on every rank."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gen_dist.averaging import AveragedWeights, Averaging
from gen_dist.direction.optimizer import Direction, GenOptimizer, rate_ratios, set_rate
from gen_dist.line.data import Batch, Criterion, as_batches
from gen_dist.line.estimators import estimator
from gen_dist.line.groups import GroupHistory, decide_ratios, measure_system
from gen_dist.line.line import Line
from gen_dist.line.measure import Measurement, Request, losses_together, measure
from gen_dist.parallel import Layout
from gen_dist.policy.rule import (
    ACCEPTED,
    CLAMPED,
    CURVATURE_IN_ROUNDING,
    SHORTENED,
    Auto,
    Decision,
    History,
    Raw,
    Rule,
    check_clamp,
)
from gen_dist.restore import whole
from gen_dist.watch import drift
from gen_dist.watch.gradient_noise import check_optimizer, gradient_noise

__all__ = ["ApproxGen", "AutoGen", "ExactGen", "GenScheduler", "Update"]

logger = logging.getLogger("gen_dist")

FIRST_PROBE = 1e-3  # where no rate is known yet: lr = 0 at the start
RISE = 1e-3  # of the loss, relative, that a verified step may cause
SHORTENINGS = 4  # of one step at most


class Update(NamedTuple):
    """What an update saw and did, as plain numbers.

    `numerator` is `g.d = -phi'(0)`, `denominator` is `d'Hd = phi''(0)`, `loss` is `phi(0)`, all over the ranks
    together; `lr` is the rate that was set (of the group with the largest) and `reason` says why. The standard errors
    of numerator and denominator come from how the slices of ranks and micro-batches differ, None where there is one.
    `signal` is the share of the numerator that is not noise of this batch's gradient, with `signal=True`.
    `change_ratio` is the true change of the loss by the step over the predicted one, where it was verified.
    """

    lr: float
    numerator: float
    denominator: float
    loss: float
    reason: str
    numerator_error: float | None = None
    denominator_error: float | None = None
    signal: float | None = None
    change_ratio: float | None = None

    @property
    def accepted(self) -> bool:
        """Whether the rate comes from this update's measurement."""
        return self.reason in (ACCEPTED, CLAMPED, SHORTENED)

    def numbers(self) -> dict[str, float]:
        """What is known, by name, for a logger: all but the text; `accepted` is 1 or 0.

        >>> Update(0.5, 8.0, 16.0, 1.0, "accepted").numbers()
        {'lr': 0.5, 'numerator': 8.0, 'denominator': 16.0, 'loss': 1.0, 'accepted': 1.0}
        """
        known = {name: value for name, value in self._asdict().items() if isinstance(value, float)}
        return {**known, "accepted": float(self.accepted)}


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
        update_every: measure at the first of every so many steps; in between the rate stays, and `step` only
            looks whether the gradients are finite.
        rule: from measurements to rates; by default `rule.Raw()`, the ratio, clamped.
        average: keep averaged weights, for `averaged()`, and let the weights go along with them, at the end of each
            `optimizer.step()`; `Averaging(power, momentum)` says how.
        group_rates: a rate for each parameter group: the ratios between groups, too, come from curvature, all K x K of
            it (`True`), or that of each group alone (`'diagonal'`, and always with `'forward'`).
        verify: at every so many updates, try the step on its own batch and shorten it if the loss rises; 0 for never.
        signal: report the share of the slope that is signal; for SGD and Adam on plain replicas.
        check_every: after every so many steps, `check_in_sync()`; 0 for never.
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
        rule: Rule | None = None,
        average: bool | Averaging = False,
        group_rates: bool | str = False,
        verify: int = 0,
        signal: bool = False,
        check_every: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        # As in torch's ReduceLROnPlateau, whose step takes an argument too, LRScheduler.__init__ is not called: it
        # would patch the optimizer and take a first step.
        _check_arguments(optimizer, model, criterion, lr_min, lr_max, update_every, group_rates, verify, check_every)
        self.optimizer: GenOptimizer = optimizer
        self.model = model
        self.criterion = criterion
        self.lr_min, self.lr_max = float(lr_min), float(lr_max)
        self.curvature, self.probes, self.update_every = curvature, probes, update_every
        self.estimator = estimator(curvature, probes)
        self.group_rates = "diagonal" if group_rates and curvature == "forward" else group_rates
        self.verify, self.signal, self.check_every = verify, signal, check_every
        self.layout = Layout(model)
        self.ranks = self.layout.ranks(process_group)
        self.base_lrs: list[float | Tensor] = []
        self._groups: GroupHistory | None = None
        self._adopt_new_groups()
        self.last_epoch = 0
        self.last: Update | None = None
        self.rule: Rule = rule if rule is not None else Raw()
        rate = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        self._history = self.rule.begin(rate)
        self._updated_at = 0  # the step of the last update, from 1
        self._updates = 0
        self._shortened = 1.0  # what verification left of the rate at the last update
        self._probe = rate if rate > 0 else FIRST_PROBE
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        if signal and group_rates:
            raise ValueError("signal=True is for one common rate: leave it or group_rates out")
        if signal:
            check_optimizer(optimizer)
            _check_replicas(self.layout, weights)
        self.average: AveragedWeights | None = None
        if average is not False:
            averaging = average if isinstance(average, Averaging) else Averaging()
            self.average = AveragedWeights(self.layout, weights, averaging)
            optimizer.register_step_post_hook(_weakly(self._after_step))
        self._step_pending = False  # whether the next optimizer step belongs to this scheduler's last
        self._direction_loaded = False  # whether the state loaded since the last step came with a held direction
        self._warned = False

    @whole
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
            loss: the loss of the training step on the same batch, which saves `'forward'` one pass; with several
                `batches`, a tensor of theirs.

        Every rank calls it. Raises `ValueError` or `TypeError` on a wrong call; an error in the model or the closure is
        raised on every rank, with the weights as they were. Under FSDP, whose forward passes communicate, an error on
        one rank is raised there, at once, while the others wait for it, at most as long as the process group's timeout:
        let it end the process. Gradients that are not finite, on any rank, make the next `optimizer.step()` do nothing.
        """
        weight = _checked_weight(weight)
        slices = as_batches(self.model, self.criterion, x, y, closure, batches, may_be_none=weight == 0)
        self._refuse_closures(slices)
        if self.check_every and self.last_epoch and self.last_epoch % self.check_every == 0:
            self.check_in_sync()
        due = self._next_step()

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = {p: p.grad.clone() for p in parameters if p.grad is not None} if due and self.signal else None
        self.layout.average_gradients(parameters, self.ranks, weight)
        self.optimizer.reset()
        if due:
            with self._as_before_on_error(slices):
                finite = self._update(slices, parameters, own, weight, loss)
        else:
            finite = self.layout.gradients_are_finite(parameters, self.ranks)
        if not finite:
            self.optimizer.skip_step()
        self.last_epoch += 1
        self._step_pending = finite and self.average is not None

    def _update(
        self,
        slices: list[Batch],
        parameters: list[Tensor],
        own: dict[Tensor, Tensor] | None,
        weight: float,
        loss: Tensor | None,
    ) -> bool:
        """One update; whether the gradients are finite on all ranks."""
        if finite := self.layout.gradients_are_finite(parameters, self.ranks):
            self.optimizer.compute_param_updates()
        seen = self._measure(slices, own, self._request(len(slices), weight, loss, finite))
        self._cross_check(seen)
        steps = self.last_epoch + 1 - self._updated_at
        decision, self._history = self.rule.decide(seen, self._history, steps, self.lr_min, self.lr_max)
        change_ratio = self._verify(slices, seen, weight)
        self._updated_at = self.last_epoch + 1
        self._updates += 1
        self._set_rates()
        self._record(seen, decision, change_ratio)
        return seen.gradients_finite

    # ---------------------------------------------------------------------------------- the parts of a step

    def _next_step(self) -> bool:
        """Do what every step needs; whether it is one with an update."""
        stride = self.update_every * self.rule.stride(self._history)
        due = self.last_epoch % stride == 0 or not self._history.started
        self._adopt_new_groups()
        self._direction_loaded = False
        if not due and self.rule.factor(self.last_epoch) != 1:
            self._set_rates()
        return due

    @contextlib.contextmanager
    def _as_before_on_error(self, slices: list[Batch]) -> Iterator[None]:
        """After an error hold no direction, and what the optimizer and this scheduler know is what they knew before.

        The optimizer's state is kept where closures run, the user's code, which may fail at any time; a model has just
        run on the same batch, and a copy of the state costs as much memory as the state.
        """
        restore = self.optimizer.keep_state() if any(batch.closure is not None for batch in slices) else None
        names = ("_history", "_groups", "_shortened", "_probe", "_updates", "_updated_at", "last")
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except BaseException:
            self.optimizer.reset()
            if restore is not None:
                restore()
            vars(self).update(before)
            raise

    def _request(self, batches: int, weight: float, loss: Tensor | None, finite: bool) -> Request:
        settings = f"{self._settings()}, {batches} batch(es)"
        return Request(self.estimator, self._probe, loss, weight, finite, self.rule.needs_norms, settings)

    def _measure(self, slices: list[Batch], own: dict[Tensor, Tensor] | None, how: Request) -> Measurement:
        """Measure the line; with rates for each group, all K directions, and then the line on which they go on."""
        direction = self.optimizer.direction or Direction()
        if self._groups is None:
            noise = None if own is None else gradient_noise(self.optimizer, direction, own)
            return measure(Line(self.layout, direction, slices), self.ranks, how, noise)
        system = measure_system(
            self.layout, direction, slices, self.ranks, how, len(self.optimizer.param_groups), self.group_rates is True
        )
        self._groups = decide_ratios(system, self._groups, self.rule.smoothing)
        return system.along(self._groups.ratios)

    def _verify(self, slices: list[Batch], seen: Measurement, weight: float) -> float | None:
        """Try the step on its own batch; shorten it while the loss rises. Collective, all deciding alike.

        Returns the true change of the loss over the predicted one, at the rate that the rule chose.
        """
        self._shortened = 1.0
        chosen = self._history.rate * self.rule.factor(self.last_epoch)
        loss, slope, curvature, _ = seen.parabola
        if not self.verify or self._updates % self.verify or not (chosen > 0 and math.isfinite(loss) and slope < 0):
            return None
        ratios = self._ratios()
        moving = Direction(g._replace(ratio=ratios[g.group]) for g in self.optimizer.direction or ())
        line, rate, change_ratio = Line(self.layout, moving, slices), chosen, None
        for _ in range(SHORTENINGS + 1):
            here, there = losses_together(line, [0.0, rate], self.ranks, weight)
            if change_ratio is None:
                change_ratio = (there - here) / (slope * rate + curvature * rate**2 / 2)
            if there - here <= RISE * abs(here):
                break
            # the minimum of the parabola with this slope through both points; at most half the rate
            rate = rate**2 * slope / (2 * (rate * slope - (there - here))) if math.isfinite(there) else rate / 10
        self._shortened = rate / chosen
        return change_ratio

    def _settings(self) -> str:
        return (
            f"lr_min={self.lr_min}, lr_max={self.lr_max}, curvature={self.curvature!r}, probes={self.probes}, "
            f"update_every={self.update_every}, rule={self.rule}, group_rates={self.group_rates!r}, "
            f"verify={self.verify}, signal={self.signal}, check_every={self.check_every}"
        )

    def _cross_check(self, seen: Measurement) -> None:
        # The slope of finite differences is a mean over the step, and may well differ.
        slope, g_dot_d = seen.parabola.slope, seen.g_dot_d
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

    def _set_rates(self) -> None:
        rate = self._history.rate * self.rule.factor(self.last_epoch) * self._shortened
        least = 0.0 if self._groups is None else self.lr_min
        for group, ratio in zip(self.optimizer.param_groups, self._ratios(), strict=True):
            set_rate(group, max(rate * ratio, least))

    def _ratios(self) -> list[float]:
        """Each group's share of the common rate."""
        return rate_ratios(self.optimizer) if self._groups is None else self._groups.ratios

    def _record(self, seen: Measurement, decision: Decision, change_ratio: float | None) -> None:
        loss, slope, curvature, _ = seen.parabola
        signal = (seen.g_dot_d - seen.noise) / seen.g_dot_d if seen.g_dot_d else math.nan
        found = (seen.slope_error, seen.curvature_error, signal)
        slope_error, curvature_error, signal_share = (None if math.isnan(number) else number for number in found)
        rate = decision.lr * self.rule.factor(self.last_epoch) * self._shortened
        reason = decision.reason if self._shortened == 1 else SHORTENED
        self.last = Update(
            rate, -slope, curvature, loss, reason, slope_error, curvature_error, signal_share, change_ratio
        )
        if decision.reason == CURVATURE_IN_ROUNDING:
            self._probe = min(10 * self._probe, max(self._probe, self.lr_max))
        elif self.last.accepted and decision.lr > 0:
            self._probe = decision.lr

    def _adopt_new_groups(self) -> None:
        """Groups may come later by `add_param_group`: they keep the ratio of the rate that they come with."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            group.setdefault("initial_lr", float(group["lr"]))
            self.base_lrs.append(float(group["initial_lr"]))
        if self.group_rates and (self._groups is None or len(self._groups.ratios) < len(self.base_lrs)):
            self._groups = GroupHistory.begin(rate_ratios(self.optimizer))

    def _refuse_closures(self, slices: Sequence[Batch]) -> None:
        if self.curvature == "gauss-newton" and any(batch.closure is not None for batch in slices):
            raise ValueError(
                "curvature='gauss-newton' needs model and criterion apart: type scheduler.step(x, y), or use "
                "curvature='exact' with closures"
            )

    # --------------------------------------------------------------------------------------------------- drift

    def check_in_sync(self) -> None:
        """Compare, bit for bit, what the ranks should hold alike; costs one all-reduce of 16 bytes. Collective.

        Parameters, also frozen ones, optimizer state, rates and what decides the next rate. Replicas and DDP compare
        all of it. Of FSDP and tensor parallel models, a shard is compared between the ranks of its mesh that hold the
        same (those of HSDP's replicas); one that no other rank holds cannot be, only rates and step counters are.
        Buffers may differ, as the statistics of batch norms do, and are left out.

        Raises `RuntimeError` on every rank that names the first difference and the ranks that are not as most are.
        """
        numbers = {
            "the learning rate": self.get_last_lr(),
            "the scheduler's history": (self.last_epoch, self._probe, *self._history),
        }
        drift.check_in_sync(self.layout, self.ranks, self.optimizer, numbers)

    # --------------------------------------------------------------------------------------- averaged weights

    def _after_step(self) -> None:
        """After a step of the optimizer: steps that others make, to see or to fill its state, are left alone."""
        if self._step_pending and self.average is not None:
            self._step_pending = False
            self.average.update()

    @contextlib.contextmanager
    def averaged(self, batches: Iterable[Any] = ()) -> Iterator[None]:
        """Within it the model has the averaged weights; afterwards, also after an error, its own, bit for bit.

        Call it after `optimizer.step()`. `batches` of inputs make the running statistics of batch norms anew for the
        average. Raises `ValueError` where no average is kept, or before the first step.
        """
        if self.average is None:
            raise ValueError("this scheduler keeps no averaged weights: make it with average=True, or use AutoGen")
        with self.average.in_place(batches):
            yield

    def averaged_state_dict(self, batches: Iterable[Any] = ()) -> dict[str, Tensor]:
        """The model's state dict with averaged weights, as tensors of its own, placed as the parameters are."""
        with self.averaged(batches):
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    # ------------------------------------------------------------------- what the ecosystem asks of a scheduler

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each parameter group."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on with the same rates: plain numbers, and the averaged weights where they are kept.

        Local to this rank; no communication.
        """
        return {
            "last_epoch": self.last_epoch,
            "history": tuple(self._history),
            "updated_at": self._updated_at,
            "probe": self._probe,
            "updates": self._updates,
            "shortened": self._shortened,
            "groups": None if self._groups is None else tuple(self._groups),
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "last": None if self.last is None else tuple(self.last),
            "average": None if self.average is None else self.average.state_dict(),
            "step_pending": self._step_pending,
            "direction_held": self._direction_loaded or self.optimizer.direction is not None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned.

        The optimizer's own state holds the rates in its groups, and the direction if one was held: load it first.
        """
        self.last_epoch = int(state_dict["last_epoch"])
        self._history = History(*state_dict["history"])
        self._updated_at = int(state_dict["updated_at"])
        self._step_pending = bool(state_dict["step_pending"])
        if self.average is not None and state_dict["average"] is not None:
            self.average.load_state_dict(state_dict["average"])
        self._probe = float(state_dict["probe"])
        self._updates = int(state_dict["updates"])
        self._shortened = float(state_dict["shortened"])
        self._groups = None if state_dict["groups"] is None else GroupHistory(*state_dict["groups"])
        self.base_lrs = [float(rate) for rate in state_dict["base_lrs"]]
        self.last = None if state_dict["last"] is None else Update(*state_dict["last"])
        self._direction_loaded = bool(state_dict["direction_held"])
        if self._direction_loaded and self.optimizer.direction is None:
            logger.warning(
                "this state was saved between scheduler.step() and optimizer.step(), and the optimizer does not hold "
                "the direction of that step: load its state first; without the direction, the step is lost."
            )

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


class AutoGen(GenScheduler):
    """The recipe that needs no rate, no schedule and no horizon: what to use for real training.

    An update at every eighth step, at every sixteenth once the rate has settled, the rule `Auto` (smoothed, growth that
    stops by itself, start and cap relative to the weights) and averaged weights, which the weights follow a part of the
    way (see `averaging.Averaging`): evaluate and export inside `with scheduler.averaged():`. The initial learning rate
    plays no part but for the ratios between groups.

    With `total_steps`, the horizon is known: the rate also decays to zero, and averages are kept only if asked for.

    Args:
        rule: `Auto(...)` with other values; by default those of the recipe, with `total_steps`.
        average: keep averaged weights, or how: `Averaging(...)`; by default where no horizon is given.
    """

    def __init__(
        self,
        optimizer: GenOptimizer,
        model: nn.Module,
        criterion: Criterion | None = None,
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        *,
        curvature: str = "exact",
        probes: int = 2,
        update_every: int = 8,
        total_steps: int | None = None,
        rule: Auto | None = None,
        average: bool | Averaging | None = None,
        group_rates: bool | str = False,
        verify: int = 0,
        signal: bool = False,
        check_every: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if rule is not None and total_steps is not None:
            raise ValueError("give total_steps to the rule: AutoGen(..., rule=Auto(total_steps=...))")
        rule = rule if rule is not None else Auto(total_steps=total_steps)
        super().__init__(
            optimizer,
            model,
            criterion,
            lr_min,
            lr_max,
            curvature=curvature,
            probes=probes,
            update_every=update_every,
            rule=rule,
            average=rule.total_steps is None if average is None else average,
            group_rates=group_rates,
            verify=verify,
            signal=signal,
            check_every=check_every,
            process_group=process_group,
        )


def _weakly(method: Callable[[], None]) -> Callable[..., None]:
    """A hook that does not keep its scheduler alive: a DDP model in a cycle would outlive its process group."""
    reference = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        if (alive := reference()) is not None:
            alive()

    return hook


def _checked_weight(weight: Any) -> float:
    number = float(weight)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"weight must be a number >= 0, this rank's share of the batch, got {weight!r}")
    return number


def _check_replicas(layout: Layout, weights: list[Tensor]) -> None:
    if len(layout.needs_averaging(weights)) < len(weights):
        raise ValueError(
            "signal=True needs each rank's own gradients, which plain replicas have; DDP and FSDP hand over means: "
            "leave signal out"
        )


def _check_arguments(
    optimizer: Any,
    model: Any,
    criterion: Any,
    lr_min: Any,
    lr_max: Any,
    update_every: Any,
    group_rates: Any,
    verify: Any,
    check_every: Any,
) -> None:
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # which may pass for the optimizer it wraps
        raise TypeError(f"{type(optimizer).__name__} wraps an optimizer: pass optimizer.optimizer")
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
    check_clamp(lr_min, lr_max)
    if not (isinstance(update_every, int) and update_every >= 1):
        raise ValueError(f"update_every must be a whole number of steps, 1 or more, got {update_every!r}")
    if group_rates not in (False, True, "diagonal"):
        raise ValueError(f"group_rates must be True, False or 'diagonal', got {group_rates!r}")
    if not (isinstance(verify, int) and verify >= 0):
        raise ValueError(f"verify must be a whole number of updates, 0 for never, got {verify!r}")
    if not (isinstance(check_every, int) and check_every >= 0):
        raise ValueError(f"check_every must be a whole number of steps, 0 for never, got {check_every!r}")
