"""The scheduler: one update of the learning rate, from gradients to a rate that is the same on every rank."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gen_dist.averaging import AveragedWeights, Averaging
from gen_dist.direction import Direction, GenOptimizer, loss_sign, rate_ratios, set_rate
from gen_dist.line import (
    BatchLoss,
    Criterion,
    Estimator,
    Line,
    Measured,
    Method,
    NeedsForward,
    Slice,
    as_slice,
    check_losses,
    estimator,
    measure,
)
from gen_dist.parallel import Layout
from gen_dist.policy import Clamp, Raw, Rule, State, state_from_dict, state_to_dict, update
from gen_dist.restore import restored_on_exit
from gen_dist.update import Update, report
from gen_dist.watch import Calls, Companion, Companions, Idle, Seen, SelfCheck, check_in_sync

__all__ = ["GenScheduler"]

logger = logging.getLogger("gen_dist")

FIRST_PROBE = 1e-3  # where no rate is known yet: lr = 0 at the start
SMALLEST_PROBE = 1e-100  # whose square is not zero


class GenScheduler(LRScheduler):
    """Sets the learning rate of a `GenOptimizer` to the minimum of the loss along its direction (GeN).

    The update direction `d` of the optimizer, the loss on the batch given to `step`, and the parabola
    `phi(a) = L(theta - a d) ~ phi(0) - a g.d + a^2/2 d'Hd` along it give `lr = (g.d) / (d'Hd)`, clamped
    (Bu & Xu, ICLR 2025, arXiv 2407.02772). `L` is the mean over ranks, so all ranks set the identical rate.

    Args:
        optimizer: made by `make_gen_optimizer` or `as_gen_optimizer`. Its present learning rate stays until the first
            update succeeds, and the ratios between its groups stay for good.
        model: the model that you train, as you call it: plain, in DDP, or after `fully_shard`.
        criterion: `criterion(model(x), y)` is the loss; not needed for closures, and for batches that are dicts, whose
            loss the model returns: `model(**batch).loss`.
        compute_loss: instead, `compute_loss(model, batch)` is the loss of any batch that `step` gets.
        lr_min, lr_max: the clamp.
        curvature: `'exact'`, `'gauss-newton'`, `'forward'`, or `'auto'`: exact until an operator or the self-check
            stands against it on any rank, from then on `'forward'` on all, said once in the log.
        probes: forward passes of `'forward'`, 1 or 2.
        update_every: measure at the first of every so many steps. In between the rate stays, and `step` only checks
            whether the gradients are finite, which the host waits for unless the optimizer is `fused`.
        rule: from measurements to rates; by default `Raw()`, the ratio, clamped.
        average: keep averaged weights for `averaged()`, and let the weights follow them at the end of each
            `optimizer.step()`; `Averaging(power, momentum)` says how.
        companions: what watches the updates: `Verification(every)`, `GradientNoise()`, or a `Companion` of your own.
            Every scheduler has a `SelfCheck()`; `SelfCheck(None)` turns it off.
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
        companions: Sequence[Companion] = (),
        process_group: ProcessGroup | None = None,
        compute_loss: BatchLoss | None = None,
    ) -> None:
        # As in torch's ReduceLROnPlateau, whose step takes an argument too, LRScheduler.__init__ is not called: it
        # would patch the optimizer and take a first step.
        _check_arguments(optimizer, model, update_every, average)
        check_losses(criterion, compute_loss)
        self.optimizer: GenOptimizer = optimizer
        self.model = model
        self.criterion, self.compute_loss = criterion, compute_loss
        self.lr_min, self.lr_max = float(lr_min), float(lr_max)
        self._clamp().check()
        self.curvature, self.probes, self.update_every = curvature, probes, update_every
        self.rule: Rule = rule if rule is not None else Raw()
        self.layout = Layout(model)
        self.ranks = self.layout.ranks(process_group)
        self_check = [] if any(isinstance(each, SelfCheck) for each in companions) else [SelfCheck()]
        self.companions = Companions([*self_check, *companions, Idle()])
        self._measure_by(estimator(curvature, probes))
        averaging = Averaging() if average is True else average
        self.average = AveragedWeights(self.layout, optimizer, averaging) if averaging else None

        rate = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        self.base_lrs: list[float | Tensor] = []
        self.state: State = self.rule.begin(rate)._replace(probe=rate if rate > 0 else FIRST_PROBE)
        self._adopt_new_groups()
        self.last: Update | None = None
        self._calls = Calls(optimizer)
        self._wrapper_sought = False
        self._direction_loaded = False  # whether the state loaded since the last step came with a held direction

    @restored_on_exit
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
        """Set the learning rate for the present gradients; call it between `backward()` and `optimizer.step()`.

        Args:
            x, y: this rank's slice: `criterion(model(x), y)` is its loss. Or `step(batch)`: a pair, a dict, whose loss
                is `model(**batch).loss`, or whatever `compute_loss(model, batch)` takes.
            closure: instead, a function that returns this rank's scalar loss, calling the model as it likes.
            batches: instead, a list of batches or closures, whose losses are averaged (gradient accumulation).
            weight: this rank's share where slices are unequal, such as its number of samples or tokens. On plain
                replicas the gradients are averaged with it too; in DDP and FSDP scale the loss that you call
                backward on by `weight * ranks / total weight`. A rank that has run out of data calls
                `step(weight=0)`.
            loss: the loss of the training step on the same batch, which saves `'forward'` one pass; with several
                `batches`, a tensor of theirs.

        Every rank calls it. Raises `ValueError` or `TypeError` on a wrong call. An error in the model or the closure is
        raised on every rank. Weights, rate and this scheduler are then as before, and the optimizer holds the direction
        that was found: `optimizer.step()` makes an ordinary step at the old rate. Skip it to skip the batch; the
        optimizer's averages have seen the batch's gradient. Under FSDP, whose forward passes communicate, the rank
        with the error raises at once, while the others wait for it up to the process group's timeout: let the error
        end the process. Gradients that are not finite, on any rank, make the next `optimizer.step()` do nothing; with
        averages and a fused optimizer, between updates, it is a step of size zero.
        """
        sign = loss_sign(self.optimizer.param_groups)
        given = (x, y, closure, batches, weight, loss)
        data = as_slice(self.model, self.criterion, *given, sign=sign, compute_loss=self.compute_loss)
        due = self._begin(data)

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if due:
            self.companions.before_averaging(parameters)
        self.layout.average_gradients(parameters, self.ranks, data.weight)
        self._calls.check_gradients(parameters, self.layout.backward_communicates)
        finite = self._are_finite(parameters, due)
        direction = self._find_direction(due, finite)
        if due:
            self.state, self.last = self._update(Line(self.layout, direction, data), finite)
        self._calls.note(self._set_rates(), expects_step=due and finite)
        self.state = self.rule.advance(self.state, self._clamp())

    # ---------------------------------------------------------------------------------- the parts of a step

    def _begin(self, data: Slice) -> bool:
        """Check the data and adopt new groups; return whether this step measures."""
        if data.has_closures and not self.estimator.takes_closures:
            raise ValueError(
                f"curvature={self.curvature!r} needs model and criterion apart: type scheduler.step(x, y), or use "
                "curvature='exact' with closures, dicts and compute_loss"
            )
        if not self._wrapper_sought:
            self._seek_wrapper()
        self.layout.check_step()
        self._calls.check_since_last()
        self._calls.check_unused(self.layout.backward_communicates)
        self._adopt_new_groups()
        self._direction_loaded = False
        return self.rule.is_due(self.state, self.update_every)

    def _seek_wrapper(self) -> None:
        """Notice a model that was given bare and is trained through DDP, which averages its gradients already."""
        self._wrapper_sought = True
        layout = self.layout.with_wrapper()
        if layout is not self.layout:
            self.layout = layout
            if self.average is not None:
                self.average.layout = layout
            logger.warning(
                "this scheduler was made with the model inside a DDP wrapper, whose gradients come averaged: it uses "
                "the wrapper from now on. Pass the wrapper: GenScheduler(optimizer, ddp_model, ...) (said once)"
            )

    def _are_finite(self, parameters: list[Tensor], due: bool) -> bool:
        """Whether the gradients are finite. Between updates the step of a fused optimizer asks, on the device."""
        on_device = not due and self.optimizer.skips_by_tensor
        flag = self.layout.gradients_not_finite(parameters, self.ranks) if on_device else None
        self.optimizer.skip_step_where(flag)
        return on_device or self.layout.gradients_are_finite(parameters, self.ranks)

    def _find_direction(self, due: bool, finite: bool) -> Direction:
        """Find the direction where this step measures; gradients that are not finite never reach the optimizer."""
        self.optimizer.reset()
        if self.average is not None:
            self.average.expect_step(last=self._is_last(self.state.step))
        if not finite:
            self._skip_step()
        elif due:
            self.optimizer.compute_param_updates()
        return self.optimizer.direction or Direction()

    def _is_last(self, step: int) -> bool:
        return self.rule.factor(step) > 0 and self.rule.factor(step + 1) == 0

    def _skip_step(self) -> None:
        self.optimizer.skip_step()
        if self.average is not None:
            self.average.expect_step(False)
            if self._is_last(self.state.step):  # of a known horizon: no other step will hand the average over
                self.average.put_in_place()

    def _update(self, line: Line, finite: bool) -> tuple[State, Update]:
        """Measure, decide, and let the companions look: the state of the next rate, and the report. Collective."""
        try:
            measured = self._measure(line, finite)
            state = update(self.rule, self.state, measured.parabola, self._clamp())
            return self._look(line, measured, state)
        except NeedsForward as error:
            failed, reason = self.estimator, error
        assert failed.fallback is not None
        self._measure_by(failed.fallback)
        try:
            updated = self._update(line, finite)
        except BaseException:  # it is the model that fails
            self._measure_by(failed)
            raise
        logger.warning("curvature='auto' goes on by forward passes, on all ranks, since %s (said once)", reason)
        return updated

    def _measure_by(self, estimator: Estimator) -> None:
        self.estimator = estimator
        for companion in self.companions:
            companion.check(self.optimizer, self.layout, estimator)

    def _measure(self, line: Line, finite: bool) -> Measured:
        """Measure the line. Collective."""
        numbers = self.companions.numbers(self.optimizer, line.direction)
        settings = f"{self._settings()}, {len(line.data.micro_batches)} micro-batch(es)"
        method = Method(self.estimator, self._probe(), self.rule.needs_norms, settings)
        measured = measure(line, self.ranks, method, finite, numbers)
        self._calls.check_repeated(measured.repeated)
        if not measured.parabola.gradients_finite:  # on another rank
            self._skip_step()
        return measured

    def _look(self, line: Line, measured: Measured, state: State) -> tuple[State, Update]:
        """Let the companions look, which may change the state; return the last state and the report. Collective."""
        factor = self.rule.factor(state.step)
        before = self.state._replace(rate=self._clamp().of(self.state.rate))
        seen = Seen(line, self.ranks, measured, factor, before, self._probe())
        state, found = self.companions.look(seen, state)
        parabola = measured.parabola._replace(loss=line.data.sign * measured.parabola.loss)
        return state, report(state.rate * factor, state.reason, parabola, found)

    def _set_rates(self) -> list[float]:
        rate = self.state.rate * self.rule.factor(self.state.step)
        rates = [rate * ratio for ratio in rate_ratios(self.optimizer)]
        for group, own in zip(self.optimizer.param_groups, rates, strict=True):
            set_rate(group, own)
        return rates

    def _adopt_new_groups(self) -> None:
        """Groups may come later by `add_param_group`: they keep the ratio of the rate that they come with."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            group.setdefault("initial_lr", float(group["lr"]))
            self.base_lrs.append(float(group["initial_lr"]))

    def _probe(self) -> float:
        return max(self.state.probe, SMALLEST_PROBE)

    def _clamp(self) -> Clamp:
        return Clamp(self.lr_min, self.lr_max)

    def _settings(self) -> str:
        averaging = None if self.average is None else self.average.averaging
        return (
            f"lr_min={self.lr_min}, lr_max={self.lr_max}, curvature={self.curvature!r}, probes={self.probes}, "
            f"measured_by={self.estimator.name!r}, update_every={self.update_every}, rule={self.rule}, "
            f"average={averaging}, companions={self.companions}"
        )

    # -------------------------------------------------------------------------- averaged weights, ranks in sync

    @contextlib.contextmanager
    def averaged(self, batches: Iterable[Any] = ()) -> Iterator[None]:
        """Put the averaged weights in the model for the block; restore its own bit for bit, also after an error.

        Call it after `optimizer.step()`; before the first step the average is the weights themselves. `batches` of
        inputs, or of pairs as a data loader has them, recompute the running statistics of batch norms for the average.
        Raises `ValueError` where no average is kept.
        """
        if self.average is None:
            raise ValueError("this scheduler keeps no averaged weights: make it with average=True, or use AutoGen")
        with self.average.in_place(batches):
            yield

    def averaged_state_dict(self, batches: Iterable[Any] = ()) -> dict[str, Tensor]:
        """Return the model's state dict with averaged weights, as tensors of its own, placed as the parameters are."""
        with self.averaged(batches):
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def check_in_sync(self) -> None:
        """Compare, bit for bit, what the ranks should hold alike. Collective: one all-reduce of 16 bytes.

        Compares parameters, also frozen ones, the optimizer's state, and all that decides the next rate. Replicas and
        DDP compare all of it. Of FSDP and tensor parallel models, a shard is compared between the ranks of its mesh
        that hold the same one (those of HSDP's replicas); of one that no other rank holds, only the step counters are.
        Buffers may differ, as the statistics of batch norms do, and are left out.

        Raises `RuntimeError` on every rank, naming the first difference and the ranks that differ from most others.
        """
        numbers = {
            "the learning rate": self.get_last_lr(),
            "the base learning rates": self.base_lrs,
            "the scheduler's state": self.state,
            "the companions' state": self.companions.state_dict(),
        }
        check_in_sync(self.layout, self.ranks, self.optimizer, numbers)

    # ------------------------------------------------------------------- what the ecosystem asks of a scheduler

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """The number of steps so far; PyTorch's name for it."""
        return self.state.step

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """Return the learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the learning rate of each parameter group."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to resume with the same rates: plain numbers, and the averaged weights if kept.

        Local to this rank; no communication.
        """
        return {
            **state_to_dict(self.state),
            "measured_by": self.estimator.name,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "last": None if self.last is None else tuple(self.last),
            "companions": self.companions.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "step_expected": self.average is not None and self.average.expected,
            "direction_held": self._direction_loaded or self.optimizer.direction is not None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, of this version or an earlier one.

        The optimizer's own state holds the rates in its groups, and the direction if one was held: load it first.
        Raises `ValueError` for the state of another rule or a later version, and for averaged weights of which another
        rank has saved its part.
        """
        state = state_from_dict(state_dict, self.state)
        if self.average is not None:
            if state_dict["average"] is None:
                self.average.begin_again()
            else:
                self.average.load_state_dict(state_dict["average"])  # before anything has changed: it may refuse
            expected = bool(state_dict.get("step_expected", state_dict.get("step_pending")))
            self.average.expect_step(expected, self._is_last(state.step - 1))
        self.state = state
        if self.estimator.fallback and state_dict.get("measured_by") == self.estimator.fallback.name:
            self._measure_by(self.estimator.fallback)
        self.base_lrs = [float(rate) for rate in state_dict["base_lrs"]]
        self.last = None if state_dict["last"] is None else Update(*state_dict["last"])
        first_version = {"Verification": {"updates": state_dict.get("updates", 0)}}
        self.companions.load_state_dict(state_dict.get("companions", first_version))
        self._calls.forget()
        self._direction_loaded = bool(state_dict["direction_held"])
        if self._direction_loaded and self.optimizer.direction is None:
            logger.warning(
                "this state was saved between scheduler.step() and optimizer.step(), and the optimizer does not hold "
                "the direction of that step: load the optimizer's state first; without the direction, the step is lost."
            )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(curvature={self.curvature!r}, lr_min={self.lr_min}, lr_max={self.lr_max}, "
            f"update_every={self.update_every}, last={self.last})"
        )


def _check_arguments(optimizer: Any, model: Any, update_every: Any, average: Any) -> None:
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
        raise TypeError("the optimizer has complex parameters, along which no curvature is defined: keep them real")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (isinstance(update_every, int) and update_every >= 1):
        raise ValueError(f"update_every must be a whole number of steps, 1 or more, got {update_every!r}")
    if not isinstance(average, bool | Averaging):
        raise TypeError(f"average must be True, False or gen_dist.Averaging(...), got {average!r}")
