"""The extension for Forge and A1111, called as these call it; on Forge's own UNet where FORGE_PATH names a checkout."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.comfyui import stand_in as comfy
from tests.pipelines.oracle import replay
from tests.snapshot import snapshot
from tests.zoo.third_party import stand_ins

SCRIPT = Path(__file__).parents[1] / "examples/forge/scripts/clockwork.py"
CALLBACKS: list[Callable[[Any], None]] = []


@pytest.fixture(scope="module")
def script() -> Any:
    """The extension's script, in a web UI of which there is no more than it imports."""
    names: dict[str, dict[str, Any]] = {
        "gradio": {},
        "modules": {"__path__": []},
        "modules.scripts": {"Script": object, "AlwaysVisible": object()},
        "modules.script_callbacks": {
            "on_cfg_denoiser": CALLBACKS.append,
            "remove_current_script_callbacks": CALLBACKS.clear,
        },
    }
    with stand_ins(names):
        spec = importlib.util.spec_from_file_location("examples_forge_clockwork", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def forge_unet() -> tuple[nn.Module, str]:
    """Forge's UNet, tiny, and the path of its exit; or a stand-in."""
    folder = os.environ.get("FORGE_PATH")
    if folder is None:
        return comfy.UNet().eval().requires_grad_(False), "up"
    sys.path[:0] = [path for path in (folder, f"{folder}/packages_3rdparty") if path not in sys.path]
    argv, sys.argv = sys.argv, ["webui", "--always-cpu"]
    try:
        with stand_ins({"sentencepiece": {"SentencePieceProcessor": object}}):
            unets = importlib.import_module("backend.nn.unet")
    finally:
        sys.argv = argv
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = unets.IntegratedUNet2DConditionModel(
            in_channels=4, model_channels=32, out_channels=4, num_res_blocks=[1, 1], channel_mult=(1, 2), num_heads=4,
            transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=16,
            use_spatial_transformer=True,
        ).eval()  # fmt: skip
        for parameter in unet.parameters():
            parameter.requires_grad_(False).normal_(std=0.08 if parameter.ndim > 1 else 0.1)
    return unet, "output_blocks.1.2.conv"


class WebUI:
    """What calls the script: a run of txt2img."""

    def __init__(self, unet: nn.Module, script: Any, *, forge: bool) -> None:
        inner = SimpleNamespace(diffusion_model=unet)
        objects = SimpleNamespace(unet=SimpleNamespace(model=inner)) if forge else None
        self.sd_model = SimpleNamespace(model=inner, forge_objects=objects)
        self.unet, self.script = unet, script

    @torch.no_grad()
    def sample(
        self,
        function: Any,
        clock: int,
        start: float = 0.0,
        *,
        steps: int = 6,
        stop: int = -1,
        skip: Callable[[int], bool] = lambda evaluation: False,
        split: Callable[[int], bool] = lambda evaluation: False,
        again: bool = False,
    ) -> Tensor:
        p = SimpleNamespace(sd_model=self.sd_model, steps=steps, sampler=SimpleNamespace(funcname=function.__name__))
        self.script.process_before_every_sampling(p, clock, start, x=None, noise=None, c=None, uc=None)
        sigmas = torch.cat([torch.logspace(1.16, -1.5, steps), torch.zeros(1)])
        text, nothing = comfy.cond(1)[0][0], comfy.cond(2)[0][0]
        count = itertools.count()

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            for callback in list(CALLBACKS):
                callback(SimpleNamespace(sampling_step=0, total_sampling_steps=steps))
            conds = [0] if skip(at := next(count)) else [1, 0]
            if at == stop:
                raise InterruptedError

            def call(x: Tensor, conds: list[int]) -> Tensor:
                options = {"cond_or_uncond": conds, "sigmas": sigma.expand(len(x)), "cond_mark": torch.ones(len(conds))}
                output: Tensor = self.unet(
                    torch.cat([x] * len(conds)) / (sigma**2 + 1).sqrt(),
                    comfy.Sampling().timestep(sigma.expand(len(conds))).float(),
                    context=torch.cat([(text, nothing)[cond] for cond in conds]), control=None,
                    transformer_options=options,
                )  # fmt: skip
                return output

            batches = [[cond] for cond in conds] if split(at) else [conds]
            both = torch.cat([call(x, batch) for batch in batches])
            noise = both[:1] + 5 * (both[-1:] - both[:1])
            noise = noise + 0.3 * (both[-1:] - call(0.9 * x, [0])) if again else noise
            return x - sigma * noise

        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * sigmas[0]
        latents: Tensor = function(denoise, x, sigmas, lambda _: None)
        self.script.postprocess(p, None, clock, start)
        return latents


@pytest.mark.parametrize("forge", [True, False])
@pytest.mark.parametrize(
    ("function", "passes"),
    [(comfy.sample_euler, "FAFAFA"), (comfy.sample_heun, "FFAFAFAFAFA"), (comfy.sample_dpm_2, "FFAFAFAFAFA")],
)
def test_pictures_are_those_of_a_hook(script: Any, forge: bool, function: Any, passes: str) -> None:
    unet, exit = forge_unet()
    webui = WebUI(unet, script.Clockwork(), forge=forge)
    before, plain = snapshot(unet), webui.sample(function, 1)
    wanted = replay(unet, exit, [(kind, 0) for kind in passes], lambda: webui.sample(function, 1))
    assert not torch.equal(wanted, plain)
    for _ in range(2):
        assert torch.equal(webui.sample(function, 2), wanted)
    assert snapshot(unet) == before
    assert torch.equal(webui.sample(function, 1), plain)
    assert CALLBACKS == []


@pytest.mark.parametrize(("runs", "passes"), [(1, "FFFAFA"), (2, "FAFAFA")])
def test_the_negative_prompt_left_out_in_every_other_step(script: Any, runs: int, passes: str) -> None:
    """In the first run the first batch without it is recorded; in all others it is served as well."""
    unet, exit = forge_unet()
    webui, skip = WebUI(unet, script.Clockwork(), forge=True), lambda evaluation: evaluation % 2 == 1
    left, feature = iter(passes), [torch.empty(0)]

    def serve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        feature[0] = output.clone() if next(left) == "F" else feature[0][-len(output) :]  # the prompt's is the last row
        return feature[0].clone()

    handle = unet.get_submodule(exit).register_forward_hook(serve)
    wanted = webui.sample(comfy.sample_euler, 1, skip=skip)
    handle.remove()
    pictures = [webui.sample(comfy.sample_euler, 2, skip=skip) for _ in range(runs)]
    assert torch.equal(pictures[-1], wanted)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@pytest.mark.parametrize(("split", "full"), [(lambda _: False, 6), (lambda _: True, 9), (lambda at: at % 2 == 1, 15)])
def test_a_condition_that_comes_again_where_memory_splits_batches(script: Any, split: Any, full: int) -> None:
    """Where the batches change, the order of calls tells nothing: its own call is not served by what the other left."""
    unet, exit = forge_unet()
    webui = WebUI(unet, script.Clockwork(), forge=True)
    calls = 2 if full == 6 else 3
    slots = [slot for step in range(6) for slot in range(calls)] if full < 15 else [0] * 15
    kinds = ["FA"[full < 15 and k // calls % 2] for k in range(len(slots))]
    run = lambda clock: webui.sample(comfy.sample_euler, clock, split=split, again=True)  # noqa: E731
    wanted = replay(unet, exit, list(zip(kinds, slots, strict=True)), lambda: run(1))
    for _ in range(2):
        assert torch.equal(run(2), wanted)
    assert (kinds.count("F"), torch.equal(wanted, run(1))) == (full, full == 15)


def test_the_second_slider_with_two_evaluations_a_step(script: Any) -> None:
    unet, exit = forge_unet()
    webui = WebUI(unet, script.Clockwork(), forge=True)
    passes = [(kind, 0) for kind in "FFFFFFFFAFA"]  # from step 4: its second evaluation begins the clock
    wanted = replay(unet, exit, passes, lambda: webui.sample(comfy.sample_dpm_2, 1))
    assert torch.equal(webui.sample(comfy.sample_dpm_2, 2, 0.5), wanted)


def test_the_second_slider(script: Any) -> None:
    unet, exit = forge_unet()
    webui = WebUI(unet, script.Clockwork(), forge=True)
    run = lambda: webui.sample(comfy.sample_euler, 1)  # noqa: E731
    wanted = replay(unet, exit, [(kind, 0) for kind in "FFFFAF"], run)
    assert torch.equal(webui.sample(comfy.sample_euler, 2, 0.5), wanted)


def test_a_run_that_is_given_up_leaves_the_next_one_alone(script: Any) -> None:
    unet, _ = forge_unet()
    webui = WebUI(unet, script.Clockwork(), forge=True)
    wanted, plain = webui.sample(comfy.sample_euler, 2), webui.sample(comfy.sample_euler, 1)
    with pytest.raises(InterruptedError):
        webui.sample(comfy.sample_euler, 2, stop=3)
    assert torch.equal(webui.sample(comfy.sample_euler, 1), plain)
    assert torch.equal(webui.sample(comfy.sample_euler, 2), wanted)


def test_a_model_without_a_region_is_sampled_in_full(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor, timesteps: Any = None, context: Any = None, **_: Any) -> Tensor:
            output: Tensor = self.two(self.one(x) + context.mean() + timesteps.mean() / 1000)
            return output

    webui = WebUI(Flat().eval(), script.Clockwork(), forge=False)
    plain = webui.sample(comfy.sample_euler, 1)
    assert torch.equal(webui.sample(comfy.sample_euler, 2), plain)
    assert "Clockwork: every step is full" in capsys.readouterr().out
    assert torch.equal(webui.sample(comfy.sample_euler, 2), plain)
