"""The memory of `exact` on an FSDP2 model: the extra peak of an update, and the size of the model, on every rank.

    torchrun --standalone --nproc_per_node=2 tests/benchmarks/fsdp2_memory.py [--width 512 --depth 8]

An update needs a shard for the direction, formed in a copy of the weights. While a block runs, `exact` also needs the
whole weights of that block (like any forward pass), its whole direction, and the jets of its activations. From the
second update on, it gathers the direction of the next block at the same time. It never needs the whole model, and it
keeps no graph. Activations are small here, since the batch has one sample. gloo makes another copy of what it gathers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]
from memory import peak_memory
from models import GPT
from update_cost import token_cross_entropy

import gen_dist as gen
from gen_dist.line import Line, MicroBatch, Slice, exact, gauss_newton
from gen_dist.parallel import Layout

MIB = 2**20


@torch.no_grad()
def plain_forward(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    token_cross_entropy(model(x), y)
    Layout(model).reshard()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    model = GPT(256, context=32, depth=arguments.depth, width=arguments.width, heads=8)
    size = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    for each in model.blocks:
        fully_shard(each)
    fully_shard(model)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-4)
    tokens = torch.randint(0, 256, (1, 33), device="cuda" if on_gpu else "cpu")
    x, y = tokens[:, :-1], tokens[:, 1:]
    data = Slice([MicroBatch(model, token_cross_entropy, x, y)])
    token_cross_entropy(model(x), y).backward()
    optimizer.compute_param_updates()
    assert optimizer.direction is not None
    line = Line(Layout(model), optimizer.direction, data)
    first = peak_memory(lambda: exact(line))  # from now on it is known in which order the blocks run
    peaks = {
        "the direction, while it is found": peak_memory(optimizer.compute_param_updates),
        "exact, the first time": first,
        "exact": peak_memory(lambda: exact(line)),
        "gauss-newton": peak_memory(lambda: gauss_newton(line)),
        "forward, one probe": peak_memory(lambda: line.walk([1e-4])),
        "a plain forward pass": peak_memory(lambda: plain_forward(model, x, y)),
    }
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"model {size / MIB:.1f} MiB, a block {block / MIB:.1f} MiB, a shard {size / MIB / ranks:.1f} MiB")
        print("peak extra memory of one rank:")
        for what, peak in peaks.items():
            print(f"  {what:<34} {peak / MIB:6.1f} MiB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
