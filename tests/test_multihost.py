"""Several machines, as network namespaces: real torchrun, real addresses, a cable that can be pulled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import multihost_hosts
import pytest
import torch
from multihost_hosts import CARD, TUN, Hosts
from test_distributed import assert_same, expected

PROGRAM = str(Path(__file__).parent / "multihost_program.py")
LAUNCH = Path(__file__).parents[1] / "launch"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": CARD,
    "PYTHON": sys.executable,
}

pytestmark = pytest.mark.skipif(bool(multihost_hosts.why_not()), reason=multihost_hosts.why_not() or "can run")


def torchrun(hosts: Hosts, port: int) -> list[str]:
    """The same on every host; `host0` knows itself by its name."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nnodes={hosts.size}", "--nproc_per_node=1",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=host0:{port}", "--rdzv_conf=read_timeout=20"]  # fmt: skip


def wait(processes: list[subprocess.Popen[str]], seconds: float) -> list[int]:
    """The exit codes; an error if one takes longer."""
    deadline = time.monotonic() + seconds
    return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in processes]


@pytest.mark.timeout(80)
@pytest.mark.parametrize(("size", "ranks"), [(2, 2), (3, 1)])
def test_hosts_train_as_one_process_does(tmp_path: Path, size: int, ranks: int) -> None:
    setting = {"NNODES": str(size), "NPROC_PER_NODE": str(ranks), "MASTER_ADDR": "host0"}
    command = ["bash", str(LAUNCH / "multinode.sh"), PROGRAM, "train", str(tmp_path)]
    with Hosts(size) as hosts:
        outputs = [tmp_path / f"host{host}" for host in range(size)]
        running = [hosts.start(host, command, ENVIRONMENT | setting, outputs[host]) for host in range(size)]
        codes = wait(running, 75)
        assert codes == [0] * size, "\n".join(output.read_text() for output in outputs)
    table = outputs[0].read_text()
    assert f"preflight: ready, {size * ranks} ranks" in table
    for host in range(size):
        assert table.count(f"host{host} ") == ranks
    oracle = expected("adamw")
    for kind in ("ddp", "fsdp2"):
        runs = [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=False) for rank in range(size * ranks)]
        for run in runs:
            assert run.rates == runs[0].rates, "rates must be bitwise equal on all hosts"
            assert_same(run, oracle, 1e-10)


@pytest.mark.timeout(80)
def test_a_cable_pulled_ends_all_processes(tmp_path: Path) -> None:
    """DDP and FSDP2 at once, each a run of its own: an error on both hosts, soon, and nobody is left."""
    with Hosts(2) as hosts:
        outputs, running = {}, []
        for port, kind in ((29400, "ddp"), (29401, "fsdp2")):
            for host in range(2):
                outputs[kind, host] = tmp_path / f"{kind}-{host}"
                command = [*torchrun(hosts, port), PROGRAM, "cut", kind]
                running.append(hosts.start(host, command, ENVIRONMENT, outputs[kind, host]))
        deadline = time.monotonic() + 40
        while any(output.read_text().count("step\n") < 5 for output in outputs.values()):
            assert time.monotonic() < deadline, "\n".join(output.read_text() for output in outputs.values())
            time.sleep(0.1)
        hosts.cut(1)
        start = time.monotonic()
        codes = wait(running, 60)
        print(f"all ended {time.monotonic() - start:.0f} s after the cable was pulled")
        assert 0 not in codes
        assert hosts.processes() == []
    for output in outputs.values():
        assert "Error" in output.read_text()


@pytest.mark.timeout(60)
@pytest.mark.skipif(not os.access(TUN, os.W_OK), reason=f"a slow wire needs {TUN}")
def test_on_a_slow_wire_an_update_costs_one_reduction(tmp_path: Path) -> None:
    with Hosts(2, delay=0.02) as hosts:
        outputs = [tmp_path / f"host{host}" for host in range(2)]
        command = [*torchrun(hosts, 29400), PROGRAM, "delay", str(tmp_path)]
        running = [hosts.start(host, command, ENVIRONMENT, outputs[host]) for host in range(2)]
        assert wait(running, 55) == [0, 0], "\n".join(output.read_text() for output in outputs)
    found = torch.load(tmp_path / "cost.pt")
    reduction = found["all_reduce"]
    print(", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found.items()))
    assert reduction > 0.02
    ratio = (found["ddp"] - found["alone"]) / reduction
    print(f"an update on DDP adds {ratio:.2f} of an all-reduce")
    assert ratio == pytest.approx(1, abs=0.5)
