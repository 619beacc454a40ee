"""Fresh processes that start in a tenth of a second, since PyTorch is imported only once for all of them.

They fork from a server process that has imported the slow modules and has done nothing else.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = """
torch torch._dynamo torch.distributed.checkpoint.state_dict torch.distributed.fsdp torch.distributed.tensor.parallel
hypothesis matplotlib.figure numpy pytest sklearn.datasets
""".split()

if "forkserver" in multiprocessing.get_all_start_methods():
    CONTEXT: Any = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(PRELOADED)
else:
    CONTEXT = multiprocessing.get_context("spawn")


def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Run `function(*args)` in a process that ends with this one."""
    process = CONTEXT.Process(target=function, args=args, daemon=True)
    process.start()
    return process
