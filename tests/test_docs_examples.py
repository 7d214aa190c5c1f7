"""Every Python block of the documentation runs, and what it says it prints or raises is what happens."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks import errors
from docs import generate_diagrams
from tests import test_analysis, test_editing
from tests.pipelines import parts
from tests.small_unet import Tiny

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {"regions.md", "errors.md", "index.md"}  # test_docs_regions.py; below; the README's


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def pipeline_names() -> dict[str, Any]:
    return {"ch": ch, "pipe": parts.text_to_image(), "prompt": "a cat"}


def sampler_names() -> dict[str, Any]:
    return {"ch": ch, "unet": torch.nn.Conv2d(3, 3, 1), "sigmas": [1.0, 0.5, 0.0]}


def compiler_names() -> dict[str, Any]:
    return {"ch": ch, "unet": Tiny().cuda()}


def analysis_names() -> dict[str, Any]:
    unet = test_analysis.made(upper=lambda t: 1 + 5 * t)
    return {"unet": unet, "generate": test_analysis.sampler(unet), "prompts": 1}


def editing_names() -> dict[str, Any]:
    latents, states = test_editing.things()
    names = dict(zip(("source_states", "target_states", "negative_states"), states, strict=True))
    return {"unet": test_editing.tiny(), "scheduler": test_editing.scheduler(), "latents": latents, **names}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "analysis.md": analysis_names,
    "editing.md": editing_names,
    "pipelines.md": pipeline_names,
    "samplers.md": sampler_names,
    "performance.md": compiler_names,
}
NEED_CUDA = {"performance.md"}
PAGES = sorted(path.name for path in DOCS.glob("*.md") if blocks(path) and path.name not in ELSEWHERE)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy on tensors, in diffusers
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other; what a block takes for granted stands in `NAMES`."""
    if page in NEED_CUDA and not torch.cuda.is_available():
        pytest.skip("its blocks need a CUDA device")
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "docs", **NAMES.get(page, dict)()}
    for block in blocks(DOCS / page):
        exec(block, space)


def test_the_start_shows_the_five_lines_of_the_readme() -> None:
    """They are run by test_readme.py."""
    assert blocks(DOCS / "index.md") == blocks(ROOT / "README.md")[:1]


def sections() -> dict[str, str]:
    title, *found = re.split(r"^## ", (DOCS / "errors.md").read_text(encoding="utf-8"), flags=re.M)
    parts = {"": title} | dict(section.split("\n", 1) for section in found)
    return {name.strip(): text for name, text in parts.items()}


def test_every_error_has_a_section() -> None:
    assert sorted(sections()) == sorted(known())


def known() -> list[str]:
    return ["", *(name for name in errors.__all__ if name != "ClockworkError")]


@pytest.mark.parametrize("name", known()[1:])
def test_an_errors_message_is_the_one_that_comes(name: str) -> None:
    """By running the example; where there is none, rule and advice stand in the code."""
    parts = sections()
    said = re.findall(r"^```text\n(.*?)\n```", parts[name], re.M | re.S)[0]
    examples = re.findall(r"^```python\n(.*?)^```", parts[name], re.M | re.S)
    if not examples:
        code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "clockwork_hooks").glob("*.py"))
        rule, *_ = lines = said.splitlines()
        assert rule in code
        assert issubclass(getattr(errors, name), Warning) or lines[-1].removeprefix("What to do: ") in code
        return
    space: dict[str, Any] = {"__name__": "docs"}
    exec(re.findall(r"^```python\n(.*?)^```", parts[""], re.M | re.S)[0], space)
    with pytest.raises(getattr(errors, name)) as caught:
        exec(examples[0], space)
    assert str(caught.value) == said


@pytest.mark.parametrize("name", generate_diagrams.NAMES)
def test_a_diagram_is_what_the_script_draws(name: str) -> None:
    """`python docs/generate_diagrams.py` draws them anew."""
    assert (DOCS / "diagrams" / f"{name}.svg").read_text(encoding="utf-8") == generate_diagrams.make(name).to_svg()
