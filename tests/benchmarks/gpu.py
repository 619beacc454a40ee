"""What an update costs on a GPU, and which rates the methods choose there: two tables in Markdown.

    python tests/benchmarks/gpu.py                                # the cost, meant for ten minutes on one H100
    python tests/benchmarks/gpu.py --part rates --data-dir data   # losses and rates, up to 350M parameters
    python tests/benchmarks/gpu.py --part cost rates --smoke      # both on tiny models, in a minute, without a GPU too

The cost is that of a whole training iteration with AdamW, fused, as a multiple of a plain one. GPTs have sequences of
1,024 tokens, and FSDP2 shards them over one rank, by NCCL (gloo on a CPU). ResNet-50 is in channels_last. The compiler
has the blocks of a GPT one by one, and a ResNet whole. Plain steps and steps of the method take turns, and the ratio is
the median over the rounds. A method that fails, for lack of memory or of a package, is left out with the reason.

Memory is the peak of an iteration beyond what was held before it. Launches and waits are those of one iteration: of one
with an update, or, in rows of every 8th or 16th step, of one between two updates. Without a GPU operators are counted
in place of launches, and reads of results by Python in place of waits.

Peers (gen-optim, double backward, curvlinops) do not know FSDP2: their ratios are over the row `plain, no FSDP2`. They
need pip install "gen_dist[benchmarks]", and ResNet-50 needs torchvision.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent)]
import gpu_rates
import peers
from counting import Counts, counted
from gpu_cases import CASES, MODELS, SMOKE_CASES, Case, Method, methods
from memory import peak_memory
from quality_report import heading, line
from update_cost import Iteration

UNABLE = (ImportError, RuntimeError, TypeError, ValueError, peers.Unable)  # out of memory is a RuntimeError
PLAIN_STEPS = 4  # of a round
REASON = 120  # characters


class Effort(NamedTuple):
    """How much is measured, and the time on `time.monotonic` at which no other method begins."""

    rounds: int
    warm_up: int
    deadline: float
    backend: str


class Cost(NamedTuple):
    milliseconds: float
    ratio: float
    peak: int
    counts: Counts


def seconds(iteration: Iteration, repeats: int) -> float:
    """By the clock on the wall: where launches take longer than the kernels, the host's time counts."""
    wait_for_device()
    start = time.perf_counter()
    for _ in range(repeats):
        iteration()
    wait_for_device()
    return (time.perf_counter() - start) / repeats


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(method: Method, plain: Iteration, effort: Effort) -> Cost:
    iteration = method.make()
    window = max(method.stride, PLAIN_STEPS)
    seconds(iteration, effort.warm_up * method.stride)
    rounds = [(seconds(plain, PLAIN_STEPS), seconds(iteration, window)) for _ in range(effort.rounds)]
    peak = peak_memory(iteration)  # of an iteration with an update, since all before were whole strides
    counts = counted(iteration)
    milliseconds = 1e3 * statistics.median(took for _, took in rounds)
    return Cost(milliseconds, statistics.median(took / base for base, took in rounds), peak, counts)


def cost_rows(case: Case, device: torch.device, effort: Effort) -> Iterator[list[str]]:
    """The rows of a case; plain training stays in memory beside the method that it is compared with."""
    plain: Iteration | None = None
    unsharded: bool | None = None
    for method in methods(case, device, effort.backend):
        if time.monotonic() > effort.deadline:
            yield row(case, method, "no time left")
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                if plain is None or unsharded != method.unsharded:
                    plain, unsharded = None, method.unsharded
                    free_memory()
                    plain = method.make()
                    seconds(plain, effort.warm_up)
                found: Cost | str = measured(method, plain, effort)
        except UNABLE as error:
            found = f"{type(error).__name__}: {error}".splitlines()[0]
        free_memory()
        yield row(case, method, found)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row(case: Case, method: Method, found: Cost | str) -> list[str]:
    start = [str(case), method.name]
    if isinstance(found, str):
        return [*start, "left out: " + found.replace("|", "/")[:REASON], *[""] * 5]
    counts = found.counts
    return [
        *start,
        f"{found.milliseconds:.1f}",
        f"{found.ratio:.2f}",
        f"{found.peak / 2**20:.2f}",
        str(counts.launches),
        str(counts.waits),
        counts.attention,
    ]


def print_costs(cases: list[Case], device: torch.device, effort: Effort) -> None:
    counts = ["launches", "waits"] if device.type == "cuda" else ["operators", "reads"]
    print("\n".join(heading(["model", "method", "ms", "ratio", "peak MiB", *counts, "attention"])))
    for case in cases:
        gc.collect()
        gc.freeze()  # what is there now is not looked through again, which takes longer than small models
        for cells in cost_rows(case, device, effort):
            print(line(cells), flush=True)
        torch.compiler.reset()


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def only_flash_attention() -> None:
    """Of the fused kernels; the mathematical one stays for double backward, which no other has."""
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def card(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"no GPU: {torch.get_num_threads()} thread(s) of a CPU, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=["cost", "rates"], default=["cost"])
    parser.add_argument("--smoke", action="store_true", help="tiny models, on the CPU if there is no GPU")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="only these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10, help="of the cost; after that no method begins")
    gpu_rates.add_arguments(parser)
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here; --smoke runs tiny models on the CPU")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    print(f"{card(device)}, torch {torch.__version__}\n")
    if "cost" in options.part:
        only_flash_attention()
        deadline = time.monotonic() + 60 * options.minutes
        full = Effort(options.rounds, 2, deadline, "inductor")
        effort = Effort(1, 1, deadline, "aot_eager") if options.smoke else full
        cases = SMOKE_CASES if options.smoke else CASES
        if options.models:
            cases = [case for case in cases if case.model in options.models]
        with one_rank(device):
            print_costs(cases, device, effort)
    if "rates" in options.part:
        print(gpu_rates.run(options, device))


if __name__ == "__main__":
    main()
