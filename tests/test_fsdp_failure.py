"""Under FSDP a forward pass communicates: when it fails on one rank the job ends, soon, and says why.

The others wait in a gather that never comes, for as long as the process group lets them (`timeout` of
`init_process_group`, half an hour by default with gloo). `torchrun` ends them as soon as the failing rank has ended.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from programs import ENVIRONMENT, torchrun
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gen_dist as gen

TIMEOUT = 6.0  # seconds that a collective may take
ERROR = "OSError: the disk of this host is full"


class Reader(nn.Module):
    """A layer in the middle of the model that fails once it is told to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            print(f"failed at {time.time()}", flush=True)
            raise OSError("the disk of this host is full")
        return x


def train() -> None:
    """Three steps; in the second, the forward pass of the closure fails on rank 1 between two gathers."""
    reader = Reader()
    model = nn.Sequential(nn.Linear(4, 8), reader, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-2)
    scheduler = gen.ExactGen(optimizer, model)
    for step in range(3):
        x, y = torch.randn(5, 4), torch.randint(0, 2, (5,))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(model(x), y)

        optimizer.zero_grad()
        loss().backward()
        reader.fails = step == 1 and dist.get_rank() == 1
        scheduler.step(closure=loss)
        optimizer.step()
        print(f"step {step} of process {os.getpid()}", flush=True)


class Job(NamedTuple):
    code: int
    seconds: float  # from the failure to the end of torchrun
    said: str


@pytest.fixture(scope="module")
def job() -> Job:
    """What became of `train` under torchrun on two ranks."""
    with subprocess.Popen(
        [*torchrun(2), __file__], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        try:
            said, _ = launcher.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its ranks
            pytest.fail(f"did not end in 60 s, and said: {launcher.communicate()[0]}")
    failed = re.search(r"failed at (\S+)", said)
    assert failed is not None, said
    return Job(launcher.returncode, time.time() - float(failed[1]), said)


@pytest.mark.timeout(80)
def test_the_job_ends_in_bounded_time(job: Job) -> None:
    print(f"ended {job.seconds:.1f} s after the failure")
    assert job.code != 0
    assert job.seconds < 2 * TIMEOUT + 10
    assert "step 0 of" in job.said
    assert "step 1 of" not in job.said, "no rank goes on with what it gathered from a rank that had failed"


@pytest.mark.timeout(80)
def test_the_error_of_the_rank_that_failed_is_named(job: Job) -> None:
    assert f"[rank1]: {ERROR}" in job.said


@pytest.mark.timeout(80)
def test_no_process_is_left(job: Job) -> None:
    processes = set(re.findall(r"step 0 of process (\d+)", job.said))
    assert len(processes) == 2
    assert not [process for process in processes if (Path("/proc") / process).exists()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    train()
    dist.destroy_process_group()
