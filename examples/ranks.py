"""The ranks that torchrun started, or a single process, and reductions over them."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process, one of `size` processes; `local_size` of them are on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launched: bool

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Reads the variables that torchrun sets, and starts nothing."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            launched="WORLD_SIZE" in os.environ,
        )

    @property
    def device(self) -> torch.device:
        """A CUDA device of its own if the machine has one for each rank, else the CPU."""
        if torch.cuda.device_count() >= self.local_size:
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within the block there is a process group, if torchrun started this process."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not self.launched:
            yield
            return
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.local_size))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self._store(), rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            gc.collect()  # a DDP or FSDP2 model that outlives the group may abort the process at its end
            dist.destroy_process_group()

    def _store(self) -> dist.Store:
        """The store in which ranks find each other. torchrun keeps one store over its restarts, with the addresses of
        ranks that are gone (pytorch issue 135712), so each restart uses its own part of the store.

        Only torchrun on one machine counts its restarts alike for all ranks; on several set
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        """
        store, *_ = next(dist.rendezvous("env://"))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self.local_size == self.size else "0"
        return dist.PrefixStore(f"restart {restart}", store)

    def total(self, values: Tensor) -> Tensor:
        """Sums `values` over the ranks, in place and on each rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, value: Tensor) -> float:
        """The mean over the ranks of a scalar."""
        return self.total(value.detach().double().clone()).item() / self.size

    def average_running_statistics(self, model: nn.Module) -> None:
        """Averages the statistics of batch norms, which each rank has kept for its own slices only."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                self.total(buffer.div_(self.size))
