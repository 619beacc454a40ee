"""Several optimizers that share one learning rate, for trainers that keep a list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from gen_dist.direction import Direction, GenOptimizer, as_gen_optimizer, rate_ratios

__all__ = ["JointOptimizer"]


class JointOptimizer(GenOptimizer):
    """Joins optimizers over different parameters into one, with one direction.

    Converts the optimizers to `GenOptimizer`s in place. Their learning rates keep their ratios. The state stays in the
    optimizers: save those.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        # Optimizer.__init__ would make groups of its own; this, for what is unpickled, makes all the rest.
        super().__setstate__({"defaults": {}})
        self.optimizers = [as_gen_optimizer(optimizer) for optimizer in optimizers]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def compute_param_updates(self) -> None:
        for optimizer in self.optimizers:
            optimizer.compute_param_updates()

    @property
    def direction(self) -> Direction | None:
        """The held direction, its groups numbered through."""
        joint, first, ratios = Direction(), 0, rate_ratios(self)
        for optimizer in self.optimizers:
            if optimizer.direction is None:
                return None
            for group in optimizer.direction:
                index = first + group.group
                joint.append(group._replace(group=index, ratio=ratios[index]))
            first += len(optimizer.param_groups)
        return joint

    def get_param_update(self, param: Any) -> Any:
        for optimizer in self.optimizers:
            if any(param is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.get_param_update(param)
        raise ValueError(f"this parameter, of shape {tuple(param.shape)}, is in none of the optimizers")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def register_step_post_hook(self, hook: Any) -> Any:
        """After the step of the last of them, whoever makes it."""
        return self.optimizers[-1].register_step_post_hook(hook)

    def has_used_gradients(self) -> bool:
        return all(optimizer.has_used_gradients() for optimizer in self.optimizers)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """How often `step()` of the last of them was called."""
        return self.optimizers[-1].steps

    def skip_step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.skip_step()

    def reset(self) -> None:
        for optimizer in self.optimizers:
            optimizer.reset()
