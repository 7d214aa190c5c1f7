"""The package as a whole: who imports whom, what is exported, what an import costs, and that the examples run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import clockwork_hooks as ch

ROOT = Path(ch.__file__).parent

# Package or root module → what its files may import from the project, beside their own package. Examples in docstrings
# do not count, imports within functions and for type checkers do.
BASE = {"_numbers", "_tree", "_version", "errors"}
CORE = BASE | {"adaptors", "clock", "engine", "graph", "regions", "reports", "schedule"}
MAY_IMPORT: dict[str, set[str]] = {
    "_generate": set(),
    "_numbers": set(),
    "_tree": set(),
    "_version": set(),
    "errors": set(),
    "metrics": {"errors"},
    "schedule": {"errors"},
    "models": {"_tree", "errors"},
    "graph": {"_tree", "errors"},
    "reports": {"_numbers", "_version", "errors"},
    "regions": BASE | {"graph", "reports"},
    "clock": {"_tree", "graph"},
    "adaptors": BASE | {"clock", "graph", "regions", "reports", "schedule"},
    "engine": CORE,
    "comfyui": CORE,
    "diffusers": CORE,
    "editing": CORE,
    "training": CORE | {"_generate"},
    "analysis": CORE | {"_generate", "metrics"},
    "demo": CORE | {"analysis", "editing", "metrics"},
    "cli": CORE | {"analysis", "demo", "models", "training"},
    "__main__": {"cli"},
}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
PATHS = {
    ".".join(("clockwork_hooks", *path.with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
    if path.name != "__main__.py"
}
MODULES = list(PATHS)


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, at its top, within functions or for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "clockwork_hooks")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if str(node.module).partition(".")[0] == "clockwork_hooks":
                yield from (name if name in MODULES else str(node.module) for name in names)


def home(module: str) -> str:
    """Package or root module that a module of ours belongs to."""
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py" or len(path.parts) > 1], ids=str)
def test_packages_import_what_the_table_says(path: Path) -> None:
    own = path.parts[0] if len(path.parts) > 1 else path.stem
    others = {home(module) for module in imports(ROOT / path)} - {own}
    assert others <= MAY_IMPORT[own], f"{path} imports {sorted(others - MAY_IMPORT[own])}"


def test_no_cycle_between_files() -> None:
    """A sort by who imports whom ends. Packages' `__init__` only pass names on."""
    needs = {module: set(imports(ROOT / path)) - {module} for module, path in PATHS.items()}
    TopologicalSorter({m: targets for m, targets in needs.items() if PATHS[m].name != "__init__.py"}).prepare()


def test_packages_say_what_they_are() -> None:
    packages = [path.parts[0] for path in FILES if len(path.parts) == 2 and path.name == "__init__.py"]
    assert {home(module) for module in MODULES} - {"__init__"} == set(MAY_IMPORT) - {"__main__"}
    for package in packages:
        sentence = str(importlib.import_module(f"clockwork_hooks.{package}").__doc__).split("\n\n")[0]
        assert sentence.endswith(".")
        assert len(sentence) > 20


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
    assert not set(MAY_IMPORT) & set(ch.__all__), "importing such a module would replace the name"


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
    hint = r"no attribute 'wrap_pipeline'; write: from clockwork_hooks\.diffusers import wrap_pipeline$"
    with pytest.raises(AttributeError, match=hint):
        _ = ch.wrap_pipeline
    for name, module in ch._ELSEWHERE.items():
        assert name in importlib.import_module(f"clockwork_hooks.{module}").__all__
    with pytest.raises(AttributeError, match=r"module 'clockwork_hooks' has no attribute 'rap'$"):
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
    if dataclasses.is_dataclass(value):
        public = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        assert [one for one in public if not re.search(rf"\b{one}\b", str(value.__doc__))] == []


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

class UNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = torch.nn.Conv2d(3, 8, 3, 1, 1), torch.nn.Conv2d(8, 32, 4, 2, 1)
        self.up, self.head = torch.nn.ConvTranspose2d(32, 8, 4, 2, 1), torch.nn.Conv2d(16, 3, 3, 1, 1)

    def forward(self, x, t):
        h = self.stem(x)
        return self.head(torch.cat([h, self.up(self.down(h)) * t], 1))

with torch.no_grad(), ch.wrap(UNet(), clock=2) as cw:
    for t in torch.tensor((900.0, 700.0, 500.0)):
        cw(torch.zeros(1, 3, 16, 16), t)
assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 1), cw.region.line
print(*(name for name in sys.modules if name.startswith("clockwork_hooks.")))
print(*sorted(set(sys.modules) - before))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    imported, wrapping, called, loaded = (line.split() for line in process.stdout.splitlines())
    assert imported == ["clockwork_hooks._version"]
    own = {name.split(".")[1] for name in wrapping if name.startswith("clockwork_hooks.")}
    assert {"engine", "regions", "schedule"} <= own
    assert not own & {"analysis", "cli", "demo", "diffusers", "editing", "metrics", "models", "training"}
    reports = {name.removeprefix("clockwork_hooks.reports") for name in called if ".reports" in name}
    assert reports <= {"", ".report"}, "what draws, sets tables and pages waits until it is asked for"
    assert "clockwork_hooks.regions.blocks" not in called
    assert not [name for name in wrapping if name.startswith(("torch._dynamo", "torch._inductor"))]
    light = {"clockwork_hooks", "torch", "numpy", *sys.stdlib_module_names}  # torch has loaded numpy
    assert {name.partition(".")[0] for name in wrapping} <= light
    compiler = [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor"))]
    assert not compiler, "torch's compiler takes seconds to load, and first calls compile nothing"
    first = {name.partition(".")[0] for name in loaded}  # by the first calls; fvcore's handles come from their file
    assert not first & {"fvcore", "iopath", "tabulate", "typer", "rich", "matplotlib", "PIL", "diffusers"}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(module)
    assert results.failed == 0


# What is not made by hand is shown where it comes from.
MADE_BY = {
    "Benchmark": "bench",
    "Calibration": "calibrate",
    "ClockworkWrapper": "wrap",
    "Diagram": "diagram",
    "DistillResult": "distill",
    "Drift": "measure_drift",
    "Evaluation": "evaluate",
    "FlopsReport": "flops_report",
    "Plan": "plan",
    "Region": "find_region",
    "Robustness": "measure_robustness",
    "Tuning": "tune",
}


@pytest.mark.parametrize("name", [name for name in ch.__all__ if name != "__version__"])
def test_public_names_have_an_example(name: str) -> None:
    """Errors have a page each, docs/errors."""
    value = getattr(ch, name)
    if not (isinstance(value, type) and issubclass(value, Exception)):
        assert ">>>" in str(inspect.getdoc(getattr(ch, MADE_BY.get(name, name))))
