"""What users see of a run: numbers for any logger, recipes that work as documented, and no printed output."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import perceptron

import gen_dist as gen

PACKAGE = Path(gen.__file__).parent
PAGE = Path(__file__).parents[1] / "examples" / "logging.md"
RECIPES = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))


def training(**options: Any) -> dict[str, Any]:
    """The names that a recipe uses."""
    model = perceptron(4, 8, 2)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.AutoGen(optimizer, model, F.mse_loss, update_every=2, **options)
    dataloader = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(6)]
    return {
        "model": model,
        "criterion": F.mse_loss,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "dataloader": dataloader,
    }


def run(recipe: str, **options: Any) -> gen.Update:
    names = training(**options)
    exec(compile(RECIPES[recipe], recipe, "exec"), names)
    last: gen.Update = names["scheduler"].last
    return last


def test_last_is_plain_numbers() -> None:
    last = run("A file, and its picture", companions=[gen.Verification()])
    numbers = last.numbers()
    assert all(type(number) is float for number in numbers.values())
    assert numbers == {name: value for name, value in last._asdict().items() if isinstance(value, float)} | {
        "accepted": float(last.accepted)
    }
    assert "change_ratio" in numbers
    assert json.loads(json.dumps(numbers)) == numbers


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_shows_the_numbers_of_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last = run("TensorBoard")
    events = EventAccumulator(str(tmp_path / "runs" / "gen"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"gen/{name}" for name in last.numbers()}
    for name, number in last.numbers().items():
        shown = events.Scalars(f"gen/{name}")
        assert [event.step for event in shown] == list(range(6))
        assert shown[-1].value == pytest.approx(number, rel=1e-6)


def test_a_file_and_its_picture(tmp_path: Path) -> None:
    last = run("A file, and its picture")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert json.loads(lines[-1])["lr"] == last.lr
    assert (tmp_path / "training.png").stat().st_size > 10_000


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_a_schedule_of_your_own_is_logged_and_drawn(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = training()
    exec(compile(RECIPES["A schedule of your own"], "A schedule of your own", "exec"), names)
    (seen,) = names["watch"].history
    events = EventAccumulator(str(tmp_path / "runs" / "watch"))
    events.Reload()
    shown = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert shown == {f"watch/{name}": [(1, pytest.approx(n, rel=1e-6))] for name, n in seen.numbers().items()}
    assert (tmp_path / "watch.png").stat().st_size > 10_000


@pytest.mark.parametrize("recipe", ["Weights & Biases", "MLflow"])
def test_other_recipes_are_the_same_loop(recipe: str) -> None:
    """Their packages need a service, so only their loop is compared with that of the recipe that runs above."""
    here, run_above = (ast.parse(RECIPES[name]).body[-1] for name in (recipe, "TensorBoard"))
    assert isinstance(here, ast.With)
    assert isinstance(run_above, ast.With)
    loop, loop_above = here.body[0], run_above.body[0]
    assert isinstance(loop, ast.For)
    assert isinstance(loop_above, ast.For)
    assert [ast.dump(line) for line in loop.body[:-1]] == [ast.dump(line) for line in loop_above.body[:-1]]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    run("A file, and its picture", companions=[gen.Verification()], curvature="forward")
    assert capfd.readouterr() == ("", "")


def test_the_library_has_no_print_and_one_logger() -> None:
    """Only its two commands print."""
    printing, loggers = [], set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "print" or called.endswith(("stdout.write", "stderr.write", "warnings.warn")):
                    printing.append(path.relative_to(PACKAGE).as_posix())
                if called.endswith("getLogger"):
                    loggers.add(ast.literal_eval(node.args[0]))
    assert set(printing) == {"preflight.py", "suggest/__main__.py"}
    assert loggers == {"gen_dist"}
    assert not logging.getLogger("gen_dist").handlers
