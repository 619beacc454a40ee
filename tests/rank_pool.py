"""A pool of gloo ranks that stays up between tests: real processes and real collectives, started once."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import processes
import torch
import torch.distributed as dist
import torchvision_for_cpus  # noqa: F401 - before a rank imports transformers

_pools: dict[int, Pool] = {}


class RankError(AssertionError):
    """A function failed on a rank. The message holds the traceback of that rank."""


class Pool:
    """`size` processes in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        store = tempfile.mktemp(prefix="gen_dist_ranks_")
        self.processes, self.connections = [], []
        for rank in range(size):
            here, there = processes.CONTEXT.Pipe()
            self.processes.append(processes.start(_serve, rank, size, store, there))
            self.connections.append(here)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
        """Run `function(*args)` on every rank at once; returns the results in the order of the ranks."""
        for connection in self.connections:
            connection.send((function, args))
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(timeout):
                self.close()
                raise RankError(f"rank {rank} of {self.size} gave no answer in {timeout} s: {errors or 'it hangs'}")
            ok, result = connection.recv()
            results.append(result)
            if not ok:
                errors.append(f"rank {rank}:\n{result}")
                timeout = 5  # the others may wait for it forever
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return results

    def close(self) -> None:
        _pools.pop(self.size, None)
        for process in self.processes:
            process.kill()
            process.join()


def pool(size: int) -> Pool:
    """The pool of this size, which starts at the first call."""
    if size not in _pools:
        _pools[size] = Pool(size)
    return _pools[size]


def close_all() -> None:
    for each in list(_pools.values()):
        each.close()


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
