"""Checkpoints to resume a run from, on any number of ranks, even if the newest checkpoint is damaged."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import gen_dist as gen

KEPT = 2
MANIFEST = "manifest.json"  # written last: the settings of the run, and a hash of every other file
PARTIAL = ".partial"


class Training(Stateful):
    """The state of a run, in the form that `torch.distributed.checkpoint` saves and loads."""

    def __init__(self, model: nn.Module, optimizer: gen.GenOptimizer, scheduler: gen.GenScheduler) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model, optimizer = state_dict["model"], state_dict["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.scheduler.load_state_dict(state_dict["scheduler"])


class Checkpoints:
    """The last checkpoints of a run, in a folder that all ranks see: `step-00000120` and the one before.

    A checkpoint is written under another name and renamed when it is whole and on the disk. All ranks call the methods.
    """

    def __init__(self, folder: Path, training: Training, settings: dict[str, Any], ranks: Ranks) -> None:
        self.folder, self.training, self.settings, self.ranks = folder, training, settings, ranks
        self._good: list[Path] = []  # newest first
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake

    def save(self, step: int) -> None:
        """Save the state after `step` steps; call it after `optimizer.step()`."""
        self.ranks.average_running_statistics(self.training.model)  # each rank has its own; one will be saved
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        if self.ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dcp.save({"training": self.training}, checkpoint_id=partial)
        if self.ranks.rank == 0:
            seal(partial, self.settings)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one
            partial.rename(final)
            sync(self.folder)
            self._good = [final, *self._good][:KEPT]
            for other in set(newest_first(self.folder, PARTIAL)) - set(self._good):
                shutil.rmtree(other)

    def resume(self) -> int:
        """Load the newest complete checkpoint; returns the number of its steps, 0 if there is no checkpoint."""
        found = [self._newest_whole() if self.ranks.rank == 0 else None]
        if self.ranks.size > 1:
            dist.broadcast_object_list(found)
        newest = found[0]
        if newest is None:
            return 0
        self._good = [newest]
        dcp.load({"training": self.training}, checkpoint_id=newest)
        return step_of(newest)

    def _newest_whole(self) -> Path | None:
        for folder in newest_first(self.folder, PARTIAL):
            wrong = whats_wrong(folder)
            print(f"checkpoint {folder}: {f'skipped, {wrong}' if wrong else 'going on from it'}", flush=True)
            if not wrong:
                return folder
        return None


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of the run whose checkpoints are in this folder; empty if none can be read."""
    for checkpoint in newest_first(folder):
        try:
            return dict(json.loads((checkpoint / MANIFEST).read_text())["settings"])
        except (OSError, ValueError, KeyError):
            continue
    return {}


def newest_first(folder: Path, *also_ending: str) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.suffix in ("", *also_ending)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def seal(folder: Path, settings: dict[str, Any]) -> None:
    """Complete a checkpoint: write a list of its files, and wait until the list is on the disk."""
    hashes = {path.name: hash_of(path) for path in sorted(folder.iterdir())}
    with (folder / MANIFEST).open("w") as file:
        json.dump({"settings": settings, "files": hashes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def whats_wrong(folder: Path) -> str | None:
    """Why a checkpoint cannot be loaded; None if it is as it was written."""
    if folder.suffix == PARTIAL:
        return "it is half-written"
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if hash_of(path) != expected:
            return f"its file {name} is not as it was written"
    return None


def hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
