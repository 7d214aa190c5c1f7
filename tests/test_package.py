"""The package as a whole: who imports whom, what is exported, what an import costs, and that the examples run."""

import ast
import doctest
import importlib
import inspect
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import clockwork_hooks as ch

ROOT = Path(ch.__file__).parent

# A file imports only from files of a smaller number. A new file takes the smallest that lets it; the numbers in
# between are free for floors to come.
FLOOR = {
    "_version": 0,
    "errors": 0,
    "pooling": 0,
    "reasons": 0,
    "report": 0,
    "needed": 1,
    "tree": 0,
    "weights": 20,
    "apart": 10,
    "examples": 10,
    "frechet": 10,
    "inputs": 10,
    "operators": 10,
    "page": 2,
    "plots": 12,
    "rendering": 4,
    "passes": 12,
    "skipping": 10,
    "presets": 10,
    "schedule": 10,
    "scores": 10,
    "shapes": 10,
    "stats": 10,
    "bindings": 20,
    "calls": 20,
    "boundary": 20,
    "clock": 20,
    "conditions": 20,
    "hooks": 20,
    "macs": 20,
    "metrics": 20,
    "models": 20,
    "adaptors": 30,
    "counts": 30,
    "branches": 25,
    "drawing": 15,
    "recorder": 30,
    "timeline": 30,
    "graph": 40,
    "solvers": 40,
    "state": 40,
    "counting": 50,
    "dominance": 50,
    "emit": 50,
    "levels": 50,
    "embeddings": 55,
    "planner": 57,
    "builder": 60,
    "refusal": 65,
    "finder": 70,
    "injection": 70,
    "hand": 72,
    "choice": 74,
    "regions": 80,
    "blocks": 90,
    "cost": 90,
    "running": 86,
    "preparation": 88,
    "engine": 90,
    "layers": 93,
    "nested": 95,
    "adaptive": 95,
    "budget": 100,
    "flops": 100,
    "compiled": 100,
    "capture": 110,
    "modes": 115,
    "wrapper": 120,
    "acceptance": 122,
    "attach": 124,
    "diffusers": 130,
    "analysis": 130,
    "bench_report": 15,
    "benchmark": 130,
    "timing": 10,
    "progress": 10,
    "ddim": 10,
    "inversion": 125,
    "editing": 130,
    "evaluation": 130,
    "training": 130,
    "__init__": 200,
    "demo": 210,
    "cli": 220,
    "__main__": 230,
}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
MODULES = [
    ".".join(("clockwork_hooks", *path.with_suffix("").parts)).removesuffix(".__init__")
    for path in FILES
    if path.name != "__main__.py"
]


def imports(path: Path) -> Iterator[str]:
    """The package's own modules that a file imports, at its top or within functions: "graph", "demo", "__init__"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            if head == "clockwork_hooks":
                yield rest[0] if rest and rest[0] in FLOOR else "__init__"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_downwards(path: Path) -> None:
    own = path.parts[0] if len(path.parts) > 1 else path.stem  # a package inside is one floor
    assert own in FLOOR, f"{path} has no floor yet: add it to FLOORS"
    inside = own if len(path.parts) > 1 else None
    wrong = {name for name in imports(ROOT / path) if FLOOR[name] >= FLOOR[own] and name != inside}
    assert not wrong, f"{path} imports from its own floor or above"


def test_the_table_names_files_that_exist() -> None:
    assert set(FLOOR) == {path.parts[0] if len(path.parts) > 1 else path.stem for path in FILES}


def test_exports() -> None:
    """Every public name has a home, type checkers see the same ones, and no module of ours takes a name's place."""
    assert ch.__all__ == sorted({*ch._HOME, "__version__"})
    assert {"wrap", "ClockworkWrapper", "Schedule", "Adaptor", "IdentityAdaptor", "ClockworkError"} <= set(ch.__all__)
    seen: dict[str, str] = {}
    for node in ast.walk(ast.parse(Path(ch.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("clockwork_hooks"):
            home = str(node.module).removeprefix("clockwork_hooks").removeprefix(".")
            seen |= {alias.name: home for alias in node.names}
    assert seen == ch._HOME | dict.fromkeys(ch._PARTS, "") | {"__version__": "_version"}
    assert not set(FLOOR) & set(ch.__all__), "importing such a module would replace the name"


def test_public_names_are_there_in_every_way() -> None:
    space: dict[str, object] = {}
    exec("from clockwork_hooks import *", space)
    for name in ch.__all__:
        value = getattr(ch, name)
        assert space[name] is value
        if name != "__version__":
            assert value is getattr(importlib.import_module(value.__module__), name)
            assert pickle.loads(pickle.dumps(value)) is value
    assert {*ch.__all__, *ch._PARTS} <= set(dir(ch))
    assert all(isinstance(getattr(ch, part), types.ModuleType) for part in ch._PARTS)
    with pytest.raises(AttributeError, match="module 'clockwork_hooks' has no attribute 'rap'"):
        _ = ch.rap


@pytest.mark.parametrize("name", [name for name in ch.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    """Each one, and each public method and property of the classes."""
    value = getattr(ch, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("clockwork_hooks.")
    if isinstance(value, type):
        own = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        bare = [k for k, v in own.items() if callable(v) or isinstance(v, (property, classmethod, staticmethod))]
        assert [k for k in bare if not inspect.getdoc(getattr(value, k))] == []


@pytest.mark.parametrize("name", [name for name in MODULES if ".demo" not in name])
def test_modules_export_what_they_have(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for exported in getattr(module, "__all__", []):
        assert hasattr(module, exported)


def test_an_import_costs_nothing_and_wrapping_only_what_wraps() -> None:
    """In a fresh interpreter: which modules are loaded, after the import and after what most users do next."""
    code = """
import sys
import clockwork_hooks as ch
print(*(name for name in sys.modules if name.startswith("clockwork_hooks.") or name == "torch"))
import torch
before = set(sys.modules)
ch.wrap, ch.Schedule.every(2).preview(8), ch.find_regions
print(*sorted(set(sys.modules) - before))
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    imported, wrapping = (line.split() for line in made.stdout.splitlines())
    assert imported == ["clockwork_hooks._version"]
    own = {name.split(".")[1] for name in wrapping if name.startswith("clockwork_hooks.")}
    assert {"wrapper", "regions", "schedule"} <= own
    assert not own & {"analysis", "blocks", "cli", "cost", "demo", "diffusers", "editing", "evaluation", "flops"}
    assert not own & {"metrics", "models", "plots", "training"}
    assert not [name for name in wrapping if name.startswith(("torch._dynamo", "torch._inductor"))]
    light = {"clockwork_hooks", "torch", "numpy", *sys.stdlib_module_names}  # torch has loaded numpy
    assert {name.partition(".")[0] for name in wrapping} <= light


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(module)
    assert found.failed == 0


# What is not made by hand is shown where it comes from.
MADE_BY = {
    "Benchmark": "bench",
    "ClockworkWrapper": "wrap",
    "Diagram": "diagram",
    "DistillResult": "distill",
    "Drift": "measure_drift",
    "Evaluation": "evaluate",
    "FlopsReport": "flops_report",
    "Plan": "plan",
    "Region": "find_region",
    "Robustness": "measure_robustness",
}


@pytest.mark.parametrize("name", [name for name in ch.__all__ if name != "__version__"])
def test_public_names_have_an_example(name: str) -> None:
    """Errors have a page each, docs/errors."""
    value = getattr(ch, name)
    if not (isinstance(value, type) and issubclass(value, Exception)):
        assert ">>>" in str(inspect.getdoc(getattr(ch, MADE_BY.get(name, name))))
