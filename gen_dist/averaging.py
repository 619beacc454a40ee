"""Averaged weights: what replaces a decaying rate where no horizon is known."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from gen_dist.direction import take_momentum
from gen_dist.parallel import Layout, is_shard, local, placed_like
from gen_dist.restore import contents_kept, everything_restored, restoring
from gen_dist.torch_private import foreach_copy_, foreach_lerp_

__all__ = ["AveragedWeights", "Averaging"]

SAVED_BY = "gen_dist_saved_by"  # an attribute of a saved shard
HOW_TO_LOAD = (
    "save and load with torch.distributed.checkpoint, as dcp.save({'scheduler': scheduler}, checkpoint_id=folder) and "
    "dcp.load(...) on every rank, or torch.save scheduler.state_dict() to a file of each rank's own"
)


class Averaging(NamedTuple):
    """How weights are averaged, and how far the training follows the average: Schedule-Free, for any optimizer.

    Schedule-Free (Defazio et al. 2024, arXiv 2405.15682) has three sequences. `z` makes the steps, the result `x` is
    their average, and gradients are taken between the two, at `y = (1 - momentum) z + momentum x`. The weights in
    training are `y`, and the rate `r` that users see is that of `y`: `z` steps at `r / (1 - momentum)`.

    The defaults suit an optimizer that keeps its own momentum: an average of the newest weights, followed a little.
    `AutoGen` uses `Averaging(momentum=0.9, power=1, rate_power=2, takes_over=True)`.

    Attributes:
        power, rate_power: the weights of step `t` count as `t^power r^rate_power` in the average.
        momentum: how far the weights in training follow the average; 0 for an average that changes nothing.
        takes_over: whether the optimizer's own momentum (beta1 of Adam and AdamW, the momentum of SGD) is set to zero
            while the averages are kept, since they do its work.
    """

    power: float = 12.0
    momentum: float = 0.3
    rate_power: float = 0.0
    takes_over: bool = False


class AveragedWeights:
    """The average `x` of an optimizer's weights, taken after its steps `t = 1, 2, ...` at the rates `r`.

    With `w = t^power r^rate_power`, `W` the sum of all `w`, `c = w / W`, and `y` the weights after a step:

        m = c / (1 - momentum) (y - x);   x += m;   y += momentum m

    This is Schedule-Free without a buffer for `z = x + (y - x) / (1 - momentum)`.

    At the last step of a known horizon, `y` becomes `x`.

    Each parameter counts its own `t`, from the first step after it came to the optimizer, with its group.

    It hooks on the optimizer: each step that `expect_step` announced is taken into the average. Other steps, such as
    the one that fills an optimizer's state for a checkpoint, are not. Only this rank's shards are averaged, in place,
    in float32 at least; nothing is communicated.
    """

    def __init__(self, layout: Layout, optimizer: Optimizer, averaging: Averaging) -> None:
        if not (averaging.power >= 0 and averaging.rate_power >= 0 and 0 <= averaging.momentum < 1):
            raise ValueError(f"need power >= 0, rate_power >= 0 and 0 <= momentum < 1, got {averaging}")
        self.layout = layout
        self.optimizer = optimizer
        self.averaging = averaging
        self.counts: list[int] = []  # of steps, one for each parameter that has an average
        self.totals: list[float] = []  # the sum W of what they count
        self.average: list[Tensor] = []
        self.expected = False  # whether the optimizer's next step counts
        self.last = False  # whether it is the last one of a known horizon
        if averaging.takes_over:  # before a checkpoint is loaded, whose optimizer has no momentum to keep
            take_momentum(optimizer)
        self._hook()

    def _hook(self) -> None:
        self.optimizer.register_step_post_hook(_weakly(self._after_step))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy: its optimizer is a copy without hooks, since PyTorch leaves them out."""
        self.__dict__.update(state)
        self._hook()

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters; groups may have come since the last step."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def count(self) -> int:
        """The number of steps averaged."""
        return max(self.counts, default=0)

    def expect_step(self, expected: bool = True, last: bool = False) -> None:
        """Say whether the optimizer's next step is one of the training, to be averaged, and whether it is the last."""
        self.expected, self.last = expected, last
        if self.averaging.takes_over:
            take_momentum(self.optimizer)

    def _after_step(self) -> None:
        if self.expected:
            self.expected = False
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average, and move them along with it."""
        self.layout.reshard()
        weights = [local(p) for p in self.parameters]
        rates = self._rates()
        new = weights[len(self.counts) :]
        self.average += [_precise(w.clone()) for w in new]
        self.counts += [0] * len(new)
        self.totals += [0.0] * len(new)
        alike = list(zip(self.counts, self.totals, rates, strict=True))
        for count, total, rate in sorted(set(alike)):
            these = [index for index, own in enumerate(alike) if own == (count, total, rate)]
            counts_as = (count + 1) ** self.averaging.power * rate**self.averaging.rate_power
            if count and counts_as:
                average, current = [self.average[i] for i in these], [weights[i] for i in these]
                self._update(average, current, counts_as / (total + counts_as))
            for index in these:
                self.counts[index], self.totals[index] = count + 1, total + counts_as
        if self.last:
            self.put_in_place()

    def _update(self, average: list[Tensor], weights: list[Tensor], weight: float) -> None:
        momentum = self.averaging.momentum
        share = weight / (1 - momentum)
        if momentum:  # first, since y - x is then 1 + momentum share of what it was, and never zero
            averages = [x.to(y.dtype) for x, y in zip(average, weights, strict=True)]
            foreach_lerp_(weights, averages, -momentum * share)
        foreach_lerp_(average, [_precise(y) for y in weights], share / (1 + momentum * share))

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Make the averages the weights in training, for good: they are the result."""
        self.put(self.average)

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        """Set the weights to these values of theirs, such as `weights()` was before."""
        self.layout.reshard()
        if values:
            foreach_copy_([local(p) for p in self.parameters[: len(values)]], values)

    def weights(self) -> list[Tensor]:
        """Return copies of this rank's part of the weights in training."""
        self.layout.reshard()
        return [local(p).detach().clone() for p in self.parameters]

    @contextlib.contextmanager
    def in_place(self, batches: Iterable[Any] = ()) -> Iterator[list[Tensor]]:
        """Put the average in the model; afterwards, also after an error or an interrupt, restore it bit for bit.

        Batches of inputs, if there are any, recompute the running statistics of batch norms. Yields what `weights()`
        returned before.
        """
        self.layout.reshard()
        weights = [local(p).detach() for p in self.parameters[: len(self.average)]]
        buffers = [local(b) for b in self.layout.model.buffers()]
        # the model may hold gathered copies of the average at the end
        with (
            everything_restored(),
            restoring(self.layout.reshard),
            contents_kept(weights) as kept,
            contents_kept(buffers),
        ):
            self.put_in_place()  # nothing before the first step: the average is the weights themselves
            rest = iter(batches)  # one at a time: they may be a whole data loader
            first = next(rest, None)
            if first is not None:
                _recompute_statistics(chain([first], rest), self.layout.model)
            yield kept

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps averaged and the averages, placed as the parameters are; zeros before a step.

        The number is a list, one for each parameter, where some came later. The structure is always the same, since
        `torch.distributed.checkpoint` loads in place. A shard tells by an attribute which rank saved it, which that
        way of loading leaves alone. Shards without a placement stand under their rank: they load on as many ranks only.
        """
        pairs = list(zip_longest(self.average, self.parameters))
        averages = [_precise(torch.zeros_like(local(p))) if a is None else a.clone() for a, p in pairs]
        counts = [*self.counts, *([0] * (len(pairs) - len(self.counts)))]
        placed = [placed_like(a, p).detach() for a, (_, p) in zip(averages, pairs, strict=True)]
        for average in placed:
            if is_shard(average):
                average.__dict__[SAVED_BY] = _here()
        return {
            "count": counts if len(set(counts)) > 1 else self.count,
            "totals": [*self.totals, *([0.0] * (len(pairs) - len(self.totals)))],
            "average": placed if self.layout.shards_have_placement else {_here(): placed},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned. Parameters that it does not know begin their averages later.

        Raises `ValueError` for the averages of another rank, or of other parameters.
        """
        placed = self._of_this_rank(state_dict["average"])
        count = state_dict["count"]
        counts = list(count) if isinstance(count, list | tuple) else [int(count)] * len(placed)
        weights = [local(p) for p in self.parameters]
        if len(placed) > len(weights):
            raise ValueError(
                f"the state has averages of {len(placed)} parameters, and the optimizer has {len(weights)}: call "
                "optimizer.add_param_group(...) for the groups that came later, then load"
            )
        averages = [local(a) for a in placed]
        for number, (average, weight) in enumerate(zip(averages, weights, strict=False)):
            if average.shape != weight.shape:
                raise ValueError(
                    f"the state's average number {number} has shape {tuple(average.shape)}, and the weights here have "
                    f"{tuple(weight.shape)}: load it into the same model, and on FSDP {HOW_TO_LOAD}"
                )
        begun = next((index for index, count in enumerate(counts) if not count), len(counts))
        self.counts, self.average = counts[:begun], [a.clone() for a in averages[:begun]]
        rates = self._rates()
        totals = state_dict.get("totals") or [self._total(c, r) for c, r in zip(self.counts, rates, strict=False)]
        self.totals = [float(total) for total in totals[:begun]]

    def begin_again(self) -> None:
        """Begin the average anew, from the present weights."""
        self.counts, self.totals, self.average = [], [], []

    def _rates(self) -> list[float]:
        """The rate of each parameter."""
        groups = self.optimizer.param_groups
        return [rate for group in groups for rate in [float(group["lr"])] * len(group["params"])]

    def _total(self, count: int, rate: float) -> float:
        """The sum `W` at a constant rate, for a state of 0.1.0."""
        power, rate_power = self.averaging.power, self.averaging.rate_power
        return count ** (power + 1) / (power + 1) * rate**rate_power

    def _of_this_rank(self, saved: Any) -> list[Tensor]:
        if isinstance(saved, Mapping):
            if self.layout.shards_have_placement or _here() not in saved:
                raise ValueError(_of_another(", ".join(saved)))
            placed = list(saved[_here()])
        else:
            placed = list(saved)
            if not self.layout.shards_have_placement:
                raise ValueError(_of_another("one process, or of another kind of parallelism"))
        for average in placed:
            if is_shard(average) and average.__dict__.get(SAVED_BY, _here()) != _here():
                raise ValueError(_of_another(average.__dict__[SAVED_BY]))
        return placed


def _of_another(saved_by: str) -> str:
    return f"the averaged weights of this state are those of {saved_by}, and this is {_here()}: {HOW_TO_LOAD}"


def _weakly(method: Callable[[], None]) -> Callable[..., None]:
    """A hook that does not keep its owner alive: a DDP model in a cycle would outlive its process group."""
    reference = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        if (alive := reference()) is not None:
            alive()

    return hook


def _precise(weight: Tensor) -> Tensor:
    """In half precision the small moves of a long run's average would be rounded away."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _here() -> str:
    if not (dist.is_available() and dist.is_initialized()):
        return "a process without torch.distributed"
    return f"rank {dist.get_rank()} of {dist.get_world_size()}"


def _recompute_statistics(batches: Iterable[Any], model: nn.Module) -> None:
    device = next((p.device for p in model.parameters()), None)
    update_bn(batches, model, device=device)
