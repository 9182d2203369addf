"""Imports point one way, and cost little."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LEVELS = (
    ("types", "trees", "config", "manifest"),
    ("trace", "parallel"),
    ("models", "data", "measure"),
    ("losses",),
    ("distill", "prune", "shrink"),
    ("train",),
    ("deploy", "report"),
    ("jobs",),
    ("experiments",),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
FILES = sorted([*ROOT.glob("bmjax/**/*.py"), *ROOT.glob("experiments/**/*.py")])


def part_of(dotted):
    """ "prune" of "bmjax.prune.transform", "experiments" of "experiments.compress", None of anything else."""
    first, *rest = dotted.split(".")
    if first == "experiments":
        return first
    return rest[0] if first == "bmjax" and rest else None


def imported(source):
    """The dotted names that a file imports, wherever in the file; `from a import b` may name a module or not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(source, part):
    for name in imported(source):
        other = part_of(name)
        if other is None or other == part:
            continue
        if other not in LEVEL:
            yield f"{name} has no level"
        elif LEVEL[other] >= LEVEL[part]:
            yield f"{part} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    part = part_of(dotted)
    if dotted == "bmjax.__init__":
        assert not any(map(part_of, imported(path.read_text())))
        return
    assert part in LEVEL, f"{part} has no level"
    assert list(faults(path.read_text(), part)) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("prune", "from bmjax import shrink"),
        ("prune", "import bmjax.train.step"),
        ("prune", "def f():\n    from bmjax.distill.logits import kd"),
        ("types", "from bmjax import config"),
        ("train", "import experiments.predict"),
        ("train", "from bmjax import plan"),
    ],
)
def test_the_rule_sees_what_is_forbidden(part, source):
    assert list(faults(source, part))
    assert not list(faults("from bmjax import types\nimport numpy", "prune"))


def test_the_files_were_found():
    assert {part_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in FILES} >= set(LEVEL)


def test_prediction_needs_neither_bmjax_nor_flax():
    names = {name.split(".")[0] for name in imported((ROOT / "experiments" / "predict.py").read_text())}
    assert "numpy" in names
    assert names.isdisjoint({"bmjax", "flax", "optax", "orbax", "grain"})


def fresh(program):
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_import_bmjax_is_quick_and_small():
    seconds, *modules = fresh(
        "import time, sys; start = time.perf_counter(); import bmjax; print(time.perf_counter() - start, *sys.modules)"
    )
    assert float(seconds) < 2
    assert {"tensorflow", "torch"}.isdisjoint(modules)


def test_no_module_imports_what_is_heavy_or_rarely_used():
    modules = fresh(
        "import importlib, pkgutil, sys, bmjax\n"
        "for module in pkgutil.walk_packages(bmjax.__path__, 'bmjax.'): importlib.import_module(module.name)\n"
        "print(*sys.modules)"
    )
    assert {"bmjax.train.step", "bmjax.jobs.common"} <= set(modules)
    heavy = {"tensorflow", "torch", "scipy.stats", "sklearn", "matplotlib", "grain", "orbax.checkpoint", "tensorboardX", "wandb"}
    assert heavy.isdisjoint(modules)
