"""How the tests run programs: under the real torchrun, or in a fresh process that starts quickly."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import processes
import torch

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command that starts a program on this many ranks of this machine; append the program and its arguments."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]


def run(script: Path, *arguments: str, cwd: Path, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """Run `python script arguments...` in this folder, without the time that its imports take."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = processes.start(_run, str(script), arguments, str(cwd), str(out), str(err))
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(
            [str(script), *arguments], process.exitcode, out.read_text(), err.read_text()
        )


def _run(script: str, arguments: tuple[str, ...], cwd: str, out: str, err: str) -> None:
    """Like the interpreter, look for imports in the folder of the script first."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
