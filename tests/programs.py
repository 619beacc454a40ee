"""How the tests start programs of their own."""

from __future__ import annotations

import os
import sys

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command that starts a program on this many ranks of this machine; append the program and its arguments."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
