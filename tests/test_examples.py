"""The examples of samplers run, stay short, and sample what a plain UNet with a hook samples."""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.demo import DEMO_PROMPTS, DemoModel, load_demo
from tests.pipelines.oracle import every, letters, replay

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = ("ddim_loop", "denoising_diffusion", "diffusion_policy", "k_diffusion_samplers", "monai_3d")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_is_run_by_some_test(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") < 60
    tests = "".join(test.read_text(encoding="utf-8") for test in Path(__file__).parent.rglob("test_*.py"))
    assert path.stem in NAMES or f"examples/{path.name}" in tests or f'example("{path.stem}")' in tests


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in str(ast.get_docstring(ast.parse(text)))
    example(name).main()
    assert "with the adaptor" in capsys.readouterr().out


def same_as_by_hand(
    unet: nn.Module, exit: str, passes: list[tuple[str, int]], sample: Callable[[], Tensor], share: float
) -> None:
    """Twice in a row, bit for bit, with at least that share of adaptor passes; the plain sample is another one."""
    unet.eval()
    with torch.no_grad():
        expected = replay(unet, exit, passes, sample)
        with ch.wrap(unet, clock=2) as cw:
            for _ in range(2):
                with cw.trajectory():  # the steps of these samplers are numbers of their own
                    assert torch.equal(sample(), expected)
            assert cw.stats.adaptor_passes == 2 * letters(passes).count("A") >= 2 * share * len(passes), cw.report()
        assert not torch.equal(sample(), expected)


@pytest.fixture(scope="module")
def demo() -> DemoModel:
    return load_demo()


def test_ddim_by_hand(demo: DemoModel) -> None:
    ddim, hidden = example("ddim_loop").ddim, demo.encode_prompts(DEMO_PROMPTS[:1])
    same_as_by_hand(demo.unet, "up_blocks.1", every(2, [1] * 4), lambda: ddim(demo.unet, hidden, steps=4), 0.5)


# Heun's second evaluation has the time of the next step's first: 1, 2, 2, ... evaluations at one time
EVALUATIONS = {"sample_heun": [1, 2, 2, 2]}


@pytest.mark.parametrize("sampler", example("k_diffusion_samplers").SAMPLERS)
def test_k_diffusion(demo: DemoModel, sampler: str) -> None:
    sample, hidden = example("k_diffusion_samplers").sample, demo.encode_prompts(DEMO_PROMPTS[:1], guided=False)
    passes = every(2, EVALUATIONS.get(sampler, [1] * 4))
    same_as_by_hand(demo.unet, "up_blocks.1", passes, lambda: sample(demo.unet, hidden, sampler, steps=4), 0.4)


def test_denoising_diffusion_pytorch() -> None:
    module = example("denoising_diffusion")
    unet, diffusion = module.build()
    same_as_by_hand(unet, "ups.1.3", every(2, [1] * 10), lambda: module.sample(diffusion), 0.5)


def test_a_controller_that_replans() -> None:
    module = example("diffusion_policy")
    policy = module.Policy()
    same_as_by_hand(policy, "up", 3 * every(2, [1] * 6), lambda: module.control(policy, plans=3), 0.5)


def test_a_volume_of_monai() -> None:
    module = example("monai_3d")
    unet = module.build()
    same_as_by_hand(unet, "up_blocks.1", every(2, [1] * 8), lambda: module.sample(unet), 0.5)
