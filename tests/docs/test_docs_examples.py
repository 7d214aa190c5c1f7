"""Every Python block of the documentation runs, and what it says it prints or raises is what happens."""

import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks import errors
from clockwork_hooks.demo.captions import CaptionError
from docs import generate_diagrams
from tests import test_analysis, test_editing, test_metrics
from tests.pipelines import parts
from tests.small_unet import Tiny

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = {"regions.md", "index.md"}  # test_docs_regions.py; test_readme.py


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def pipeline_names() -> dict[str, Any]:
    return {"ch": ch, "pipe": parts.text_to_image(), "prompt": "a cat"}


def integration_names() -> dict[str, Any]:
    """A UNet under each client's names, and loops that call it."""
    unet, schedulers = parts.plain_unet(), parts.scheduler()
    x = torch.zeros(1, 3, 16, 16)

    def loop(*_: Any, **__: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([unet(x, t).sample for t in (900.0, 600.0, 300.0)])

    class Pipeline:
        def __init__(self) -> None:
            self.unet, self.scheduler = unet, schedulers

        __call__ = loop

    policy = SimpleNamespace(
        diffusion=SimpleNamespace(unet=SimpleNamespace(_orig_mod=Tiny())), select_action=lambda observation: None
    )
    return {
        "ch": ch,
        "pipeline": SimpleNamespace(unet=unet),
        "denoise": loop,
        "text_to_image": Pipeline(),
        "image_to_image": Pipeline(),
        "policy": policy,
        "observation": None,
        "volumes": unet,
        "inferer": SimpleNamespace(sample=loop),
        "noise": x,
        "scheduler": schedulers,
        "net": SimpleNamespace(model=unet),
        "t_steps": [80.0, 10.0, 0.0],
        "edm_sampler": loop,
        "latents": x,
    }


def sampler_names() -> dict[str, Any]:
    """A loop that calls no UNet stands for each library's: what is declared around it is what the page shows."""
    x, sigmas = torch.zeros(1, 2, 8, 8), torch.tensor([1.0, 0.5, 0.0])

    def loop(*_: Any, **__: Any) -> torch.Tensor:
        return x

    return {
        "ch": ch,
        "unet": Tiny(),
        "sigmas": sigmas,
        "sampling": SimpleNamespace(sample_dpmpp_sde=loop, sample_dpm_adaptive=loop),
        "sigma_min": 0.02,
        "sigma_max": 14.6,
        "denoise": loop,
        "x": x,
        "t_steps": sigmas,
        "edm_sampler": loop,
        "net": None,
        "latents": x,
        "times": sigmas,
        "torchdiffeq": SimpleNamespace(odeint=loop),
        "field": loop,
    }


def timeline_names() -> dict[str, Any]:
    """A guided call and one without the prompt's other half."""
    unet = Tiny()
    names = {
        "x": torch.randn(1, 2, 8, 8),
        "t": torch.tensor(900),
        "cond": torch.ones(1, 3),
        "uncond": torch.zeros(1, 3),
    }
    return {"torch": torch, "unet": unet, "cw": ch.wrap(unet), **names}


def compiler_names() -> dict[str, Any]:
    return {"ch": ch, "unet": Tiny().cuda()}


def analysis_names() -> dict[str, Any]:
    unet = test_analysis.tiny(upper=lambda t: 1 + 5 * t)
    return {"unet": unet, "generate": test_analysis.sampler(unet), "prompts": 1}


def editing_names() -> dict[str, Any]:
    latents, states = test_editing.things()
    names = dict(zip(("source_states", "target_states", "negative_states"), states, strict=True))
    return {"unet": test_editing.tiny(), "scheduler": test_editing.scheduler(), "latents": latents, **names}


def training_names() -> dict[str, Any]:
    """Also the folders of a CLIP model and of an adaptor, where the page's blocks run."""
    pipe = parts.text_to_image()
    test_metrics.tiny_clip(Path("clip-folder"))
    region = ch.find_region(pipe.unet, torch.zeros(2, 4, 16, 16), torch.tensor(1), torch.zeros(2, 16, 16))
    ch.ResNetAdaptor.for_region(region, width=8).save_pretrained("my-adaptor")
    pictures = torch.rand(2, 4, 3, 32, 32).unbind()
    captions = ["a cat", "a dog", "a house", "a tree"]
    return {"pipe": pipe, "captions": captions, "pictures": pictures, "features": test_metrics.Extractor()}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "analysis.md": analysis_names,
    "editing.md": editing_names,
    "integrations.md": integration_names,
    "pipelines.md": pipeline_names,
    "samplers.md": sampler_names,
    "timeline.md": timeline_names,
    "performance.md": compiler_names,
    "training.md": training_names,
}
FEWER = {"editing.md": (r"steps=\d+", "steps=8")}  # page → what is run in the place of which words: to be quick
NEED_CUDA = {"performance.md"}
PAGES = sorted(path.name for path in DOCS.glob("*.md") if blocks(path) and path.name not in ELSEWHERE)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy on tensors, in diffusers
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other; what one takes for granted stands in `NAMES`, what it prints in ```output below it."""
    if page in NEED_CUDA and not torch.cuda.is_available():
        pytest.skip("its blocks need a CUDA device")
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "docs", **NAMES.get(page, dict)()}
    text = (DOCS / page).read_text(encoding="utf-8")
    for block, shown in re.findall(r"^```python\n(.*?)^```\n(?:\n```output\n(.*?)^```)?", text, re.M | re.S):
        capsys.readouterr()
        exec(re.sub(*FEWER[page], block) if page in FEWER else block, space)
        if shown:
            assert capsys.readouterr().out.rstrip() == shown.rstrip()


KINDS = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
ERRORS = [name for name in KINDS if name != "ClockworkError"]  # the base has the index
CASE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?|^```text\n(.*?)^```", re.M | re.S)


def test_every_error_has_its_page() -> None:
    """And no other: what is raised names the page."""
    pages = {path.relative_to(ROOT).as_posix() for path in (DOCS / "errors").glob("*.md")}
    kinds = [getattr(errors, name) for name in KINDS]
    named = {
        kind("a rule").page if issubclass(kind, ch.ClockworkError) else f"docs/errors/{kind.__name__}.md"
        for kind in kinds
    }
    assert pages == named
    index = (DOCS / "errors" / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\)", index, re.M) == sorted(ERRORS, key=index.index)
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == set(ERRORS)


def test_a_kind_of_a_public_error_has_its_page_and_says_so() -> None:
    error = CaptionError("a rule")
    assert error.page == "docs/errors/DemoError.md"
    if sys.version_info >= (3, 11):
        assert "".join(traceback.format_exception(error)).endswith(
            "\nCauses and fixes: clockwork-hooks explain DemoError\n"
        )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile imports what is deprecated
@pytest.mark.parametrize("name", ERRORS)
def test_the_examples_of_an_errors_page_say_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block with a message below it raises the error with it, others raise nothing; a lone message is in the code."""
    monkeypatch.chdir(tmp_path)
    kind, page = getattr(errors, name), (DOCS / "errors" / f"{name}.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "clockwork_hooks").rglob("*.py"))
    space: dict[str, Any] = {"__name__": "docs"}
    exec(blocks(DOCS / "errors" / "index.md")[0], space)
    raised = 0
    with warnings.catch_warnings():
        for example, message, lone in CASE.findall(page):
            if lone:
                assert re.search(re.escape(lone.strip()).replace(re.escape("..."), ".*"), code), lone
            elif message:
                with pytest.raises(kind if issubclass(kind, Warning) else ch.ClockworkError) as caught:
                    exec(example, space)
                assert type(caught.value) is kind or kind is errors.DemoError, caught.value
                assert isinstance(caught.value, kind)
                said = re.escape(message.rstrip("\n")).replace(re.escape("..."), ".*")
                assert re.fullmatch(said, str(caught.value)), caught.value
                raised += 1
            else:
                exec(example, space)
    assert raised
    assert "**Cause:**" in page
    assert page.count("**Fix:**") >= raised


@pytest.mark.parametrize("name", generate_diagrams.NAMES)
def test_a_diagram_is_what_the_script_draws(name: str) -> None:
    """`python docs/generate_diagrams.py` draws them anew."""
    assert (DOCS / "diagrams" / f"{name}.svg").read_text(encoding="utf-8") == generate_diagrams.make(name).to_svg()
