"""What a piece of work asks of the GPU and of the host: kernels that it launches, and results that the host waits for.

Without a GPU it counts what would become one: operators, those inside of others as well, and reads of tensors' numbers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunch", "cuLaunch")  # also of cooperative kernels, and of the compiler's own
# Copies to the host wait in one of these. The profiler itself calls cudaDeviceSynchronize.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class HostReads(TorchFunctionMode):
    """Records where Python waits for the numbers of a tensor. The random state is on the host, so it does not count."""

    NAMES = frozenset("__bool__ __float__ __int__ item tolist numpy cpu equal allclose".split())

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.NAMES and not (isinstance(args[0], Tensor) and args[0].dtype == torch.uint8):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class Counts(NamedTuple):
    launches: int
    waits: int
    attention: str  # the fused kernels of attention that ran, by PyTorch's names


@contextlib.contextmanager
def _without_compiling(reads: HostReads) -> Iterator[None]:
    """The compiler would compile its code again for the mode, so what is compiled runs as it is written."""
    with torch.compiler.set_stance("force_eager"), reads:
        yield


def counted(work: Callable[[], object]) -> Counts:
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    reads = HostReads()
    with profile(activities=activities) as recorded, contextlib.nullcontext() if on_gpu else _without_compiling(reads):
        work()
        if on_gpu:
            torch.cuda.synchronize()  # by cudaDeviceSynchronize
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    names = Counter(event.name() for event in events)
    launches = sum(count for name, count in names.items() if name.startswith(LAUNCHES if on_gpu else "aten::"))
    waits = sum(names[name] for name in WAITS) if on_gpu else len(reads.seen)
    fused = "aten::_scaled_dot_product_"
    attention = sorted(name.removeprefix(fused) for name in names if name.startswith(fused) and "backward" not in name)
    return Counts(launches, waits, ", ".join(attention))
