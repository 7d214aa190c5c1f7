"""The examples of samplers run, stay short, and sample what a plain UNet with a hook samples."""

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.demo import DEMO_PROMPTS, DemoModel, load_demo
from clockwork_hooks.diffusers import wrap_pipeline
from tests.pipelines.oracle import every, letters, replay

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = (
    *(
        "ddim_loop",
        "denoising_diffusion",
        "diffusion_policy",
        "invokeai_loop",
        "k_diffusion_samplers",
        "lerobot_policy",
    ),
    *("monai_3d", "monai_maisi", "sdnext_loop", "server"),
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks for it there
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
    module = example(name)
    module.main(*(["eager"] if name == "lerobot_policy" else []))  # inductor takes half a minute
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


def test_maisi_draws_the_same_the_first_time_and_the_second() -> None:
    module = example("monai_maisi")
    unet = module.build()
    same_as_by_hand(unet, "up_blocks.1.upsampler", every(2, [1] * 8), lambda: module.sample(unet), 0.5)


def test_a_policy_of_lerobot_that_was_compiled() -> None:
    module = example("lerobot_policy")
    diffusion = module.Diffusion(backend="eager")
    diffusion.unet = diffusion.unet._orig_mod
    observed = [torch.full((2, 6), float(k)) for k in range(2)]
    plans = lambda: torch.cat([diffusion.conditional_sample(one, steps=6) for one in observed])  # noqa: E731
    expected = replay(diffusion.unet, "up", 2 * every(2, [1] * 6), plans)
    cw = ch.wrap(diffusion.unet, clock=2).compile(backend="eager")
    actions = []
    for one in observed:
        with cw.trajectory():
            actions.append(diffusion.conditional_sample(one, steps=6))
    assert torch.equal(torch.cat(actions), expected)
    assert cw.stats.adaptor_passes == 6
    cw.remove()
    assert not torch.equal(plans(), expected)


def test_the_loop_of_invokeai() -> None:
    module = example("invokeai_loop")
    unet = module.build()
    expected = replay(unet, "up_blocks.0", every(2, [1] * 8, branches=2), lambda: module.denoise(unet))
    with ch.wrap(unet, clock=2, ignore=("cross_attention_kwargs",)) as cw:
        for _ in range(2):
            assert torch.equal(module.denoise(unet), expected)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (16, 16), cw.report()


def test_the_pipelines_of_sdnext() -> None:
    module = example("sdnext_loop")
    text, image = module.build()
    passes = every(2, [1] * 8) + every(2, [2] * 5 + [1])
    run = lambda: torch.cat(module.draw(text, image))  # noqa: E731
    expected = replay(text.unet, "up_blocks.0", passes, run)
    with wrap_pipeline(text, schedule="every(2)").follow(image) as cw:
        for _ in range(2):
            assert torch.equal(run(), expected)
        assert cw.wrappers["unet"].stats.adaptor_passes == 2 * letters(passes).count("A")


def test_a_server_gives_every_client_what_it_would_get_alone(demo: DemoModel) -> None:
    """Draws and streams at the same time, in a pool of threads; no more features are kept than there are places."""
    module = example("server")
    service = module.Service(steps=4)
    alone = {seed: list(service.sample(seed))[-1] for seed in range(6)}
    text = {seed: [f"{float(x.mean()):.6f}\n" for x in service.sample(seed)] for seed in range(6)}
    service.cw.stats.clear()
    outputs: dict[int, Tensor] = {}
    lines: dict[int, list[str]] = {}
    most = 0

    async def draw(seed: int) -> None:
        outputs[seed] = await service.draw(seed)

    async def stream(seed: int) -> None:
        nonlocal most
        lines[seed] = []
        async for line in service.stream(seed):
            lines[seed].append(line)
            most = max(most, len(service.cw.report().cache))

    async def all_at_once() -> None:
        async with anyio.create_task_group() as group:
            for seed in range(3):
                group.start_soon(draw, seed)
                group.start_soon(stream, seed + 3)

    anyio.run(all_at_once)
    assert all(torch.equal(outputs[seed], alone[seed]) for seed in outputs)
    assert lines == {seed: text[seed] for seed in (3, 4, 5)}
    assert (service.cw.stats.full_passes, service.cw.stats.adaptor_passes) == (12, 12)
    assert 1 <= most <= 2
    assert service.cw.report().cache == {}


def test_the_server_streams_over_http() -> None:
    pytest.importorskip("fastapi")
    client = pytest.importorskip("fastapi.testclient").TestClient(example("server").app())
    lines = client.get("/stream", params={"seed": 3}).text.splitlines()
    assert len(lines) == 8
    assert client.get("/stream", params={"seed": 3}).text.splitlines() == lines
    assert client.get("/stream", params={"seed": 4}).text.splitlines() != lines
