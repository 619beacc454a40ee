"""The peak memory of a piece of work, counted by PyTorch's allocators."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(work: Callable[[], object]) -> int:
    """The bytes that `work()` allocates at its peak, on the GPU if there is one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    return allocations(work)[0]


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """The bytes of CPU memory that `work()` allocates: at its peak, and still held after it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    held = list(accumulate((event.nbytes() for event in events), initial=0))
    return max(held), held[-1]
