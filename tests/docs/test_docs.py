"""The documentation: every page is reached, every public name is described, nothing is fetched."""

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import clockwork_hooks as ch
from benchmarks import few_steps

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(part)


def test_the_navigation_has_every_page_once() -> None:
    """A new page needs a line under `nav` in mkdocs.yml."""
    files = [*DOCS.rglob("*.md"), *(path.with_suffix(".md") for path in DOCS.rglob("*.ipynb"))]
    assert sorted(pages(CONFIG["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in files)


def test_the_api_page_has_every_public_name_once() -> None:
    """A new name needs a line under its topic in docs/api.md."""
    described = re.findall(r"^::: clockwork_hooks\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(described) == sorted(set(ch.__all__) - {"__version__"})


@pytest.mark.parametrize(
    "module",
    ["adaptors", "comfyui", "diffusers", "editing", "graph", "metrics", "models", "regions", "schedule", "training"],
)
def test_the_api_page_has_what_the_modules_for_users_have(module: str) -> None:
    """Functions and classes; constants and aliases of types say what they are where they stand."""
    described = re.findall(
        r"^::: clockwork_hooks\.(?:\w+\.)?(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M
    )
    assert len(described) == len(set(described))
    home = importlib.import_module(f"clockwork_hooks.{module}")
    wanted = {
        name for name in home.__all__ if inspect.isclass(getattr(home, name)) or inspect.isroutine(getattr(home, name))
    }
    assert wanted <= set(described)


def test_the_tree_has_every_file_of_every_package_once() -> None:
    """The table of docs/design.md."""
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    tree = dict(re.findall(r"^\| `(\w+)/` \|[^|]*\| (.*) \|$", text, re.M))
    homes = [path.parent for path in (ROOT / "clockwork_hooks").glob("*/__init__.py")]
    assert {package: sorted(re.findall(r"`(\w+)`", files)) for package, files in tree.items()} == {
        home.name: sorted(path.stem for path in home.glob("*.py") if path.stem != "__init__") for home in homes
    }


def test_what_the_table_of_where_to_change_what_names_is_there() -> None:
    """Of docs/design.md: a file, and a name that it defines."""
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    table = text.split("## Where to change what", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| [^|]* \| `([\w/.]+)` \| `([\w.]+)` \|$", table, re.M)
    assert len(rows) == len(re.findall(r"^\| ", table, re.M)) - 1  # the heads have no code
    for file, names in rows:
        value: Any = importlib.import_module(f"clockwork_hooks.{file.removesuffix('.py').replace('/', '.')}")
        for name in names.split("."):
            value = getattr(value, name)


def test_the_site_fetches_nothing() -> None:
    """No fonts of Google's, no pictures of other sites, no plugin that asks the network."""
    assert CONFIG["theme"]["font"] is False
    assert {next(iter(plugin)) if isinstance(plugin, dict) else plugin for plugin in CONFIG["plugins"]} == {
        "search", "offline", "mkdocstrings"
    }  # fmt: skip
    for path in DOCS.rglob("*.md"):
        fetched = re.search(r"!\[[^\]]*\]\(https?:|<(img|script|link)[^>]*https?:", path.read_text(encoding="utf-8"))
        assert not fetched, path


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_a_page_begins_with_what_it_is_for(page: str) -> None:
    """A title, then a sentence; and who cannot see its pictures is told what they show."""
    text = (DOCS / page).read_text(encoding="utf-8")
    title, first, *_ = (part for part in text.split("\n\n") if not part.startswith("<!--"))
    assert re.match(r"# \S", title)
    assert re.match(r"[A-Z`*\[]", first), first
    assert not first.startswith("- "), first
    for alt in re.findall(r"!\[([^\]]*)\]", text):
        assert len(alt) > 12, alt


def test_what_the_design_names_is_there() -> None:
    """Each file that docs/design.md names, and in the table of what to change where, what stands in that file."""
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    for file in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert (ROOT / "clockwork_hooks" / file).exists() or (ROOT / file).exists(), file
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+)\.py` \| `([\w.]+)` \|$", text, re.M)
    assert len(rows) > 10
    for file, name in rows:
        value: Any = importlib.import_module(f"clockwork_hooks.{file.replace('/', '.')}")
        for part in name.split("."):
            value = getattr(value, part)


def test_the_limits_are_those_that_were_measured() -> None:
    """`python -m benchmarks.few_steps` renders the JSON; its sentences say what the rows say."""
    data = json.loads(few_steps.RESULT.read_text(encoding="utf-8"))
    assert f"<!-- few steps -->\n{few_steps.markdown(data)}<!-- /few steps -->" in (DOCS / "limits.md").read_text(
        "utf-8"
    )
    by = {(row["sampler"], row["steps"], row["kind"]): row for row in data["rows"]}
    for (sampler, steps, kind), row in by.items():
        if kind == "identity":
            assert row["psnr"] < by[sampler, steps, "fewer"]["psnr"]
        if kind == "trained":
            assert abs(row["psnr"] - by[sampler, steps, "fewer"]["psnr"]) < 0.3
    assert by["ddim", 4, "fewer"]["macs"] < by["ddim", 4, "identity"]["macs"]
