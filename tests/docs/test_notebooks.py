"""The notebooks run, say what they are kept with, and become pages of the site."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs import notebook_pages

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of other processes
FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def notebook_of(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))
    return data


def said(notebook: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, text) of every output; of a picture only that it is one."""
    outputs = [
        output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in notebook_pages.outputs(cell)
    ]
    return [(kind, "" if kind in notebook_pages.PICTURES else text.replace("█", "").strip()) for kind, text in outputs]


def test_there_are_two() -> None:
    assert NAMES == ["own_unet", "pipeline"]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning"
)  # of the kernel's sockets and loops
@pytest.mark.parametrize("name", ["own_unet", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_a_notebook_says_what_it_is_kept_with(name: str, tmp_path: Path) -> None:
    """10 and 30 s of CPU time, imports included; on another machine numbers differ in their last digits."""
    script = [sys.executable, ROOT / "docs" / "run_notebooks.py", name, "--out", tmp_path]
    subprocess.run(script, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": PATHS})
    now, then = said(notebook_of(name, tmp_path)), said(notebook_of(name))
    assert [(kind, NUMBER.sub("#", text)) for kind, text in now] == [
        (kind, NUMBER.sub("#", text)) for kind, text in then
    ]
    for (_, new), (_, old) in zip(now, then, strict=True):
        assert list(map(float, NUMBER.findall(new))) == pytest.approx(
            list(map(float, NUMBER.findall(old))), rel=0.1, abs=0.01
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_a_page(name: str) -> None:
    """It begins with what it is for, has all cells and pictures, and no machine's paths."""
    notebook = notebook_of(name)
    text, pictures = notebook_pages.page(notebook, name)
    title, first, note, *_ = text.split("\n\n")
    assert title.startswith("# Notebook: ")
    assert note == f"*[This page as a notebook]({name}.ipynb).*"
    assert first.startswith("For those who")
    for cell in notebook["cells"]:
        assert "".join(cell["source"]).split("\n", 1)[0].replace("own_unet.ipynb", "own_unet.md") in text
    assert not re.search(rf"\]\((?!{name}\.)\w+\.ipynb\)", text)  # on the site, pages lead to pages
    assert pictures
    for file, data in pictures.items():
        assert re.search(rf"!\[[^\]]{{20,}}\]\({file}\)", text)
        assert data.startswith((b"\x89PNG", b"<svg"))
    assert not re.search(r"/(tmp|home|work|root)/", text)


def test_links_lead_to_files_of_the_repository_and_to_pages_of_the_site() -> None:
    links = 0
    docs, others = ROOT / "docs", (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    for page in (*docs.rglob("*.md"), *docs.rglob("*.ipynb"), *others):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!\w+://|#)([^)#\s]+)", text):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"
            links += 1
    assert links > 100
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert "(notebooks/pipeline.ipynb)" in index
    assert "(notebooks/pipeline.md)" in notebook_pages.on_page_markdown(index)
