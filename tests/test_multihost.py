"""Several hosts, made of network namespaces, with the real torchrun, addresses, and cables that can be pulled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import multihost_hosts
import pytest
import torch
from multihost_hosts import CARD, TUN, Hosts
from training import assert_same, expected

PROGRAM = str(Path(__file__).parent / "multihost_program.py")
LAUNCH = Path(__file__).parents[1] / "launch"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": CARD,
    "PYTHON": sys.executable,
}

pytestmark = pytest.mark.skipif(bool(multihost_hosts.why_not()), reason=multihost_hosts.why_not() or "can run")


def torchrun(hosts: Hosts, port: int) -> list[str]:
    """The command, which is the same on every host; `host0` recognises itself by its name."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nnodes={hosts.size}", "--nproc_per_node=1",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=host0:{port}", "--rdzv_conf=read_timeout=20"]  # fmt: skip


def wait(processes: list[subprocess.Popen[str]], seconds: float, outputs: Iterable[Path]) -> list[int]:
    """Wait for all processes; returns their exit codes, or fails with their output if one takes longer."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in processes]
    except subprocess.TimeoutExpired as error:
        said = "\n".join(output.read_text()[-5000:] for output in outputs)
        raise AssertionError(f"not ended after {seconds} s: {error.cmd[-3:]}\n{said}") from None


def train_on(hosts: Hosts, ranks: int, command: list[str], folder: Path, **variables: str) -> str:
    """Train on all hosts and compare with one process on the union batch; returns the output of host0."""
    outputs = [folder / f"host{host}" for host in range(hosts.size)]
    command = [*command, PROGRAM, "train", str(folder)]
    running = [hosts.start(host, command, ENVIRONMENT | variables, outputs[host]) for host in range(hosts.size)]
    codes = wait(running, 100, outputs)
    assert codes == [0] * hosts.size, "\n".join(output.read_text() for output in outputs)
    oracle = expected("adamw")
    for kind in ("ddp", "fsdp2"):
        runs = [torch.load(folder / f"{kind}-{rank}.pt", weights_only=False) for rank in range(hosts.size * ranks)]
        for run in runs:
            assert run.rates == runs[0].rates, "rates must be bitwise equal on all hosts"
            assert_same(run, oracle, 1e-10)
    return outputs[0].read_text()


@pytest.mark.timeout(110)
def test_two_hosts_of_two_ranks_are_checked_and_train_as_one_process_does(tmp_path: Path) -> None:
    variables = {"NNODES": "2", "NPROC_PER_NODE": "2", "MASTER_ADDR": "host0"}
    with Hosts(2) as hosts:
        said = train_on(hosts, 2, ["bash", str(LAUNCH / "multinode.sh")], tmp_path, **variables)
    rows = [line.split() for line in said.splitlines()]
    assert [row[:2] for row in rows if "gloo" in row] == [[str(rank), f"host{rank // 2}"] for rank in range(4)]
    assert "preflight: ready, 4 ranks" in said


@pytest.mark.timeout(110)
def test_a_cable_pulled_ends_all_processes(tmp_path: Path) -> None:
    """Runs of DDP and of FSDP2 at the same time end soon with an error on both hosts, and leave no process."""
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
        codes = wait(running, 60, outputs.values())
        print(f"all ended {time.monotonic() - start:.0f} s after the cable was pulled")
        assert 0 not in codes
        assert hosts.processes() == []
    for output in outputs.values():
        assert "Error" in output.read_text()


@pytest.mark.timeout(110)  # 20 s on a machine that does nothing else
@pytest.mark.skipif(not os.access(TUN, os.W_OK), reason=f"a slow wire needs {TUN}")
def test_on_a_slow_wire_an_update_costs_one_reduction(tmp_path: Path) -> None:
    with Hosts(2, delay=0.02) as hosts:
        outputs = [tmp_path / f"host{host}" for host in range(2)]
        command = [*torchrun(hosts, 29400), PROGRAM, "delay", str(tmp_path)]
        running = [hosts.start(host, command, ENVIRONMENT, outputs[host]) for host in range(2)]
        assert wait(running, 100, outputs) == [0, 0], "\n".join(output.read_text() for output in outputs)
    found = torch.load(tmp_path / "cost.pt")
    reduction = found["all_reduce"]
    print(", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found.items()))
    assert reduction > 0.02
    ratio = (found["ddp"] - found["alone"]) / reduction
    fsdp2 = (found["fsdp2"] - found["alone"]) / reduction
    print(f"an update adds, in all-reduces on this wire: DDP {ratio:.2f}, FSDP2 {fsdp2:.2f}")
    assert ratio == pytest.approx(1, abs=0.5)
