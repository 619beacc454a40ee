"""Checks before a run that its ranks fit together: versions, devices, network, clocks, memory, settings.

    torchrun --nproc_per_node=2 -m gen_dist.preflight --settings "train.py --epochs 3"

Rank 0 prints one line for each rank, and what differs. Every rank exits with 0 if the run can start, else with 1. Ranks
report through torchrun's store, not by collectives, so that ranks that do not fit together end with a message.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import gen_dist

MUST_BE_EQUAL = ("python", "torch", "gen_dist", "backend", "settings")
# Variables by which numbers or communication change, by name or prefix, less those that are a machine's own.
VARIABLES = ("CUBLAS_", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "GEN_DIST_", "GLOO_", "MKL_", "NCCL_",
             "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "PYTHONHASHSEED", "PYTORCH_", "TORCH_")  # fmt: skip
MACHINES_OWN = ("GEN_DIST_VENV", "GLOO_SOCKET_IFNAME", "NCCL_HOSTID", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME",
                "NCCL_TOPO_FILE", "TORCH_HOME", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # fmt: skip
REDUCTION = 16  # float64 numbers, as in an update of gen_dist
CLOCK_ROUNDS = 10
CLOCK_TOLERANCE = 1.0  # seconds


@dataclass
class Report:
    """What one rank knows: the first block by itself, the second together with the others."""

    rank: int
    host: str
    python: str
    torch: str
    gen_dist: str
    device: str
    backend: str
    settings: str
    variables: dict[str, str]
    free_memory: int  # bytes, of the device

    reduction: float | None = None  # seconds, the median
    clock: float | None = None  # seconds by which this rank's clock is ahead of rank 0's
    clock_error: float | None = None
    error: str = ""


class Meeting:
    """Rank 0 collects the reports of all ranks and answers them, through the store alone."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.round = 0

    def hold(self, report: Report, decide: Callable[[list[Report | None]], str]) -> str:
        """`decide` of all reports, None for a rank that did not come, on rank 0; its answer on all ranks.

        Raises `DistStoreError` where rank 0 gives no answer.
        """
        self.round += 1
        self.store.set(f"{self.round}/{report.rank}", json.dumps(asdict(report)))
        if self.rank == 0:
            deadline = time.monotonic() + self.timeout
            reports = [self._report(rank, deadline) for rank in range(self.size)]
            self.store.set(f"{self.round}/answer", decide(reports))
        # Rank 0 may come late, after a collective that timed out, and then wait for a rank that never comes.
        answer = self._get("answer", self.timeout * 2.5)
        self.store.set(f"{self.round}/heard {self.rank}", "")
        return answer

    def leave(self) -> None:
        """Rank 0 stays until the others have heard it: the store may live in its process."""
        if self.rank == 0:
            present = [rank for rank in range(self.size) if self.store.check([f"{self.round}/{rank}"])]
            with contextlib.suppress(dist.DistStoreError):
                self.store.wait([f"{self.round}/heard {rank}" for rank in present], timedelta(seconds=5))

    def _report(self, rank: int, deadline: float) -> Report | None:
        try:
            return Report(**json.loads(self._get(str(rank), max(deadline - time.monotonic(), 1))))
        except dist.DistStoreError:
            return None

    def _get(self, key: str, timeout: float) -> str:
        key = f"{self.round}/{key}"
        self.store.wait([key], timedelta(seconds=timeout))
        return self.store.get(key).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="", help="text that must be the same on all ranks, such as a command")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a rank (default: %(default)s)")
    arguments = parser.parse_args()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store, rank, size = join(rank, size, arguments.timeout)
    meeting = Meeting(store, rank, size, arguments.timeout)
    report = look_around(rank, arguments.settings)
    try:
        verdict = meeting.hold(report, alike)
        if verdict == "alike":
            try:
                with_others(report, store, size, arguments.timeout)
            except Exception as error:
                report.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            verdict = meeting.hold(report, working)
        meeting.leave()
    except dist.DistStoreError:
        print(f"preflight: rank {rank} got no answer from rank 0", file=sys.stderr)
        verdict = "failed"
    if verdict == "ready":
        dist.destroy_process_group()
        return 0
    # A process group that is stuck in a collective would hold up an orderly end.
    sys.stdout.flush()
    os._exit(1)


def join(rank: int, size: int, timeout: float) -> tuple[dist.Store, int, int]:
    """The store of all ranks, in a part of its own; a store in memory where this process is alone."""
    if "MASTER_ADDR" in os.environ:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    else:
        rank, size, store = 0, 1, dist.HashStore()
    return dist.PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


# ----------------------------------------------------------------------------------------------- what a rank sees


def look_around(rank: int, settings: str) -> Report:
    """This rank by itself."""
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and name not in MACHINES_OWN
    }
    if settings:
        variables["--settings"] = settings
    device = own_device()
    return Report(
        rank=rank,
        host=socket.gethostname(),
        python=platform.python_version(),
        torch=torch.__version__,
        gen_dist=library_version(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        backend="nccl" if device.type == "cuda" else "gloo",
        settings=digest(json.dumps(variables).encode()),
        variables=variables,
        free_memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_of_machine(),
    )


def own_device() -> torch.device:
    """A CUDA device of its own where the machine has one for each of its ranks, else the CPU."""
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))))
    return torch.device("cpu")


def library_version() -> str:
    """The version, and a digest of the source: two checkouts of one version can differ."""
    source = sorted(Path(gen_dist.__file__).parent.rglob("*.py"))
    return f"{gen_dist.__version__} ({digest(b''.join(file.read_bytes() for file in source))})"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:6]


def free_memory_of_machine() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def with_others(report: Report, store: dist.Store, size: int, timeout: float) -> None:
    """Time a small all-reduce and compare clocks; what is found goes into `report`."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        report.backend,
        store=dist.PrefixStore("group", store),
        rank=report.rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )

    def total(values: list[float]) -> float:
        """The sum over ranks of the first value, once it is here."""
        numbers = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(numbers)
        return numbers[0].item()

    times = []
    for _ in range(25):
        start = time.perf_counter()
        found = total([1.0] * REDUCTION)
        times.append(time.perf_counter() - start)
        if found != size:
            raise RuntimeError(f"an all-reduce of ones over {size} ranks gave {found:g}")
    report.reduction = statistics.median(times[5:])

    # Rank 0 reads its clock after every rank has entered the first reduction, and before any leaves the second: its
    # time lies between `before` and `after`. The tightest of some rounds counts.
    report.clock_error = float("inf")
    for _ in range(CLOCK_ROUNDS):
        before = time.time()
        total([0.0])
        there = total([time.time() if report.rank == 0 else 0.0])
        after = time.time()
        if (after - before) / 2 < report.clock_error:
            report.clock, report.clock_error = (before + after) / 2 - there, (after - before) / 2
    if report.rank == 0:
        report.clock = report.clock_error = 0.0


# ------------------------------------------------------------------------------------- what rank 0 makes of it


def alike(reports: Sequence[Report | None]) -> str:
    """Rank 0, before ranks communicate: prints and fails if they do not fit together."""
    here = [report for report in reports if report is not None]
    trouble = [*missing(reports), *differences(here)]
    if trouble:
        print_table(here, trouble)
        return "failed"
    return "alike"


def working(reports: Sequence[Report | None]) -> str:
    """Rank 0, after ranks have communicated."""
    here = [report for report in reports if report is not None]
    trouble = missing(reports)
    for error in dict.fromkeys(report.error for report in here if report.error):
        trouble.append(f"{ranks_of([r for r in here if r.error == error])}: {error}")
    print_table(here, trouble)
    return "failed" if trouble else "ready"


def missing(reports: Sequence[Report | None]) -> list[str]:
    absent = [rank for rank, report in enumerate(reports) if report is None]
    return [f"no word from {ranks_named(absent)}"] if absent else []


def differences(reports: Sequence[Report]) -> list[str]:
    """What must be equal and is not, with who has what."""
    found = []
    for name in MUST_BE_EQUAL:
        values = {report.rank: getattr(report, name) for report in reports}
        if len(set(values.values())) <= 1:
            continue
        if name != "settings":
            found.append(f"{name} differs: {who_has_what(values)}")
            continue
        for variable in sorted({v for report in reports for v in report.variables}):
            values = {report.rank: report.variables.get(variable, "(not set)") for report in reports}
            if len(set(values.values())) > 1:
                found.append(f"{variable} differs: {who_has_what(values)}")
    return found


def remarks(reports: Sequence[Report]) -> list[str]:
    """What is odd and yet no reason to stop."""
    found = []
    if len({report.device for report in reports}) > 1:
        found.append(f"device differs: {who_has_what({report.rank: report.device for report in reports})}")
    if ahead := [report for report in reports if report.clock and abs(report.clock) > CLOCK_TOLERANCE]:
        found.append(f"the clock differs from rank 0's by more than {CLOCK_TOLERANCE} s on {ranks_of(ahead)}")
    return found


def who_has_what(values: dict[int, str]) -> str:
    return "; ".join(
        f"{value} on {ranks_named([rank for rank in values if values[rank] == value])}"
        for value in dict.fromkeys(values.values())
    )


def ranks_of(reports: Sequence[Report]) -> str:
    return ranks_named([report.rank for report in reports])


def ranks_named(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def print_table(reports: Sequence[Report], trouble: Sequence[str]) -> None:
    titles = ["rank", "host", "python", "torch", "gen_dist", "device", "backend", "free GiB", "all-reduce us",
              "clock ms", "settings"]  # fmt: skip
    rows = [titles, *(row(report) for report in reports)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(titles))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]
    lines += [f"preflight: note: {line}" for line in remarks(reports)]
    lines += [f"preflight: {line}" for line in trouble]
    lines.append(f"preflight: {'FAILED' if trouble else 'ready'}, {len(reports)} ranks")
    print("\n".join(lines), flush=True)


def row(report: Report) -> list[str]:
    return [
        str(report.rank),
        report.host,
        report.python,
        report.torch,
        report.gen_dist,
        report.device,
        report.backend,
        f"{report.free_memory / 2**30:.1f}",
        "-" if report.reduction is None else f"{report.reduction * 1e6:.0f}",
        "-" if report.clock is None else f"{report.clock * 1e3:+.2f} ±{(report.clock_error or 0) * 1e3:.2f}",
        report.settings,
    ]


if __name__ == "__main__":
    sys.exit(main())
