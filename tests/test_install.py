"""The source archive and the wheel hold what they should, and work without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NEEDED = ["pyproject.toml", "README.md", "LICENSE", "gen_dist"]

pytestmark = pytest.mark.skipif(
    find_spec("pip") is None or find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77,
    reason="needs pip, and setuptools 77 or newer, which pyproject.toml names",
)

BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"
PROGRAM = """
import pathlib, sys
sys.modules.update(numpy=None, matplotlib=None, tqdm=None)  # as if they were not there: torch is all that it needs
import torch
import gen_dist as gen
assert pathlib.Path(gen.__file__).is_relative_to(sys.prefix), gen.__file__
model, criterion = torch.nn.Linear(4, 1), torch.nn.MSELoss()
x, y = torch.randn(64, 4), torch.randn(64, 1)
optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
scheduler = gen.AutoGen(optimizer, model, criterion)
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    scheduler.step(x, y)
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print("trained with", gen.__version__)
"""


def run(*command: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, built from a copy, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("repository")
    for name in NEEDED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    return copy / run(sys.executable, "-c", BUILD, "sdist", ".", cwd=copy)


@pytest.fixture(scope="module")
def wheel(source_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built only from the source archive."""
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(source_archive, folder)
    [source] = folder.iterdir()
    return source / run(sys.executable, "-c", BUILD, "wheel", ".", cwd=source)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gen_dist").rglob("*.py")}
    of_package = {name for name in names if ".dist-info/" not in name}
    assert of_package == modules | {"gen_dist/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.6"]


def test_the_wheel_trains_where_the_repository_is_not(wheel: Path, tmp_path: Path) -> None:
    """The new virtual environment takes torch from that of the tests, but not gen_dist."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, str(wheel), cwd=tmp_path)
    packages = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    assert run(str(python), "-c", PROGRAM, cwd=tmp_path).startswith("trained with 0.1.0")
