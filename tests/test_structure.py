"""The laws of the house, held against its imports and names: floors know only what is below them."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import gen_dist as gen

ROOT = Path(gen.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each room and the rooms that it may import; a room may always import itself.
GROUND = {"torch_private", "parabola"}
FLOORS: dict[str, set[str]] = {
    "torch_private": set(),
    "parabola": set(),
    "restore": {"torch_private"},
    "forward_state": {"torch_private", "restore"},
    "jets": {"torch_private"},
    "policy": {"parabola"},
    "parallel": {"torch_private", "restore"},
    "direction": {"torch_private", "restore", "parallel"},
    "line": {*GROUND, "restore", "forward_state", "jets", "parallel", "direction"},
    "averaging": {"torch_private", "restore", "parallel", "direction"},
    "watch": {*GROUND, "restore", "policy", "parallel", "direction", "line"},
    "update": {"parabola", "policy"},
}
FLOORS["scheduler"] = {"averaging", "direction", "line", "parallel", "policy", "restore", "update", "watch"}
FLOORS["recipes"] = {"averaging", "direction", "line", "policy", "scheduler", "watch"}
FLOORS["curves"] = {*GROUND, "direction", "line", "parallel", "restore"}
FLOORS["plots"] = {"update", "watch"}
FLOORS["suggest"] = {*GROUND, "direction", "forward_state", "line", "parallel", "plots", "policy", "restore"}
FLOORS["replay"] = {"torch_private"}
FLOORS["at_step"] = {"line", "replay", "scheduler"}
FLOORS["integrations"] = {
    "at_step",
    "averaging",
    "direction",
    "forward_state",
    "line",
    "policy",
    "recipes",
    "scheduler",
}
FLOORS["preflight"] = {""}
FLOORS[""] = set(FLOORS) - {"integrations", "preflight", ""}  # gen_dist/__init__.py

# Names that tell kinds of parallelism apart.
KINDS = {"DTensor", "FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel", "fully_shard", "FSDP", "DDP"}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of the house that a module imports, anywhere in it, for types alone too."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gen_dist":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return frozenset(found - {module})


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", MODULES)
def test_a_floor_knows_only_what_is_below(module: str) -> None:
    room = room_of(module)
    assert {room_of(other) for other in imports_of(module)} <= FLOORS[room] | {room}


def test_no_module_imports_itself_by_a_detour() -> None:
    # a package stands for its __init__, which imports its own modules; they import each other by their full names
    graph = {module: {m for m in imports_of(module) if m != module.rpartition(".")[0]} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", ["gen_dist.parabola", "gen_dist.policy", *(m for m in MODULES if ".policy." in m)])
def test_measured_values_and_the_policy_are_plain_python(module: str) -> None:
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not any(name.split(".")[0] == "torch" for name in imported)


def identifiers(module: str) -> set[str]:
    """The names that code uses; not those in docstrings, comments and messages."""
    found = set()
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.alias(name=name):
                found |= set(name.split("."))
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in ("parallel", "torch_private")])
def test_kinds_of_parallelism_are_named_in_one_place(module: str) -> None:
    assert not identifiers(module) & KINDS


@cache
def own_private_names() -> frozenset[str]:
    """What the house itself defines with a leading underscore."""
    found = set("_replace _asdict _fields".split())
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()) | ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
    return frozenset(found)


def is_not_pytorchs(node: ast.Attribute) -> bool:
    """Whether an attribute is Python's, such as `sys._getframe`, or names an operator, as `aten._softmax` does."""
    return re.match(r"(os|sys|aten|torch\.ops)\.", ast.unparse(node)) is not None


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in ("torch_private", "integrations")])
def test_private_names_of_pytorch_stand_in_one_module(module: str) -> None:
    private = set()
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Attribute(attr=name) if re.match(r"_(?!_)", name) and name not in own_private_names():
                private |= set() if is_not_pytorchs(node) else {ast.unparse(node)}
            case ast.ImportFrom(module=source, names=names) if source and source.startswith("torch"):
                private |= {source} if "._" in source else set()
                private |= {alias.name for alias in names if alias.name.startswith("_")}
    assert not private


def options() -> list[str]:
    """All that is not the optimizer, the model or the loss."""
    parameters = inspect.signature(gen.GenScheduler).parameters
    return [name for name in parameters if name not in ("optimizer", "model", "criterion", "compute_loss")]


def test_a_scheduler_has_at_most_ten_options() -> None:
    assert len(options()) <= 10


@pytest.mark.parametrize("option", options())
def test_each_option_is_used_in_an_example_or_a_benchmark(option: str) -> None:
    tests = Path(__file__).parent
    files = [*(tests.parent / "examples").glob("*.py"), *(tests / "benchmarks").glob("*.py")]
    assert any(re.search(rf"\b{option}=|\"{option}\":", file.read_text()) for file in files)


def test_no_name_hides_a_module_of_the_standard_library() -> None:
    assert not {file.stem for file in FILES} & (set(sys.stdlib_module_names) - {"__init__", "__main__"})


PAGES = [page for page in ROOT.parent.rglob("*.md") if not {".venv", "runs", "data"} & set(page.parts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT.parent)))
def test_lines_of_pages_are_short(page: Path) -> None:
    """But for rows of tables."""
    assert not [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
