from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clockwork_hooks.demo.captions import EXAMPLES, UnknownWordError, parse
from clockwork_hooks.demo.classifier import attribute_accuracy, score
from clockwork_hooks.demo.model import DEMO_PROMPTS, SCHEDULERS, DemoModel, load_demo, to_images, to_latents
from clockwork_hooks.demo.scenes import draw_scenes, render
from clockwork_hooks.demo.weights import WEIGHTS, WeightsError
from clockwork_hooks.errors import ArgumentError

if TYPE_CHECKING:
    from conftest import Run

# diffusers 0.42 hands numpy 2 a tensor in `set_timesteps`, in a way that torch and numpy will both give up
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def test_eight_steps_show_what_the_prompts_ask_for(model: DemoModel, run: Run) -> None:
    accuracy = attribute_accuracy(model.classifier, run.images, DEMO_PROMPTS)
    assert accuracy.total >= 0.9
    assert float(run.images.min()) >= 0.0
    assert float(run.images.max()) <= 1.0


def test_what_errors_advise_to_write_is_drawn(model: DemoModel) -> None:
    """A caption that leaves things open would not be: the model has learned from whole ones."""
    assert attribute_accuracy(model.classifier, model.sample(EXAMPLES, seed=1), EXAMPLES).total == 1.0


def test_the_judge_does_not_guess_at_half_denoised_samples(model: DemoModel, run: Run) -> None:
    assert score(model.classifier.read(run.halfway), parse(DEMO_PROMPTS)).total <= 0.1


def test_the_callback_sees_every_step(run: Run) -> None:
    numbers, timesteps = zip(*run.calls, strict=True)
    assert numbers == tuple(range(8))
    assert timesteps[0] == 999
    assert list(timesteps) == sorted(timesteps, reverse=True)


class Spy:
    """Stands in for the UNet: counts calls, returns noise-free zeros."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, latents: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        self.calls.append((latents, t, encoder_hidden_states))
        return SimpleNamespace(sample=torch.zeros_like(latents))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_batched_guidance_call_a_step(model: DemoModel, scheduler: str) -> None:
    spy = Spy()
    model.sample(DEMO_PROMPTS[:2], steps=5, scheduler=scheduler, unet=spy, seed=3)
    assert len(spy.calls) == (6 if scheduler == "pndm" else 5)  # PLMS evaluates its second step twice
    latents, t, hidden = spy.calls[0]
    assert latents.shape == (4, 12, 32, 32)
    assert torch.equal(latents[:2], latents[2:])
    assert int(t) == 999
    assert torch.equal(hidden[:2], model.encode_prompts(["", ""], guided=False))
    assert torch.equal(hidden[2:], model.encode_prompts(DEMO_PROMPTS[:2], guided=False))


def test_the_seed_decides_the_noise(model: DemoModel) -> None:
    spies = [Spy(), Spy(), Spy()]
    for spy, seed in zip(spies, (1, 1, 2), strict=True):
        model.sample(DEMO_PROMPTS[:1], steps=1, seed=seed, unet=spy)
    first, again, other = (spy.calls[0][0] for spy in spies)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_latents_are_lossless() -> None:
    images = render(draw_scenes(4, 0))
    assert to_latents(images).shape == (4, 12, 32, 32)
    assert torch.allclose(to_images(to_latents(images)), images, atol=1e-6)


def test_the_default_cut_saves_36_percent_at_clock_2(model: DemoModel) -> None:
    """The region: all below the first downsampler, and the last upsampler; attention products counted."""
    unet = model.unet
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(depth=4, display=False) as counter:
        unet(torch.zeros(1, 12, 32, 32), 500, encoder_hidden_states=torch.zeros(1, 18, 128))
    counts = {name: sum(operators.values()) for name, operators in counter.flop_counts.items()}
    above = sum(
        counts.get(f"UNet2DConditionModel.{name}", 0)
        for name in ("conv_in", "time_embedding", "down_blocks.0.resnets.0", "up_blocks.2", "conv_out")
    )
    share = 1 - above / counts["Global"]
    assert share / 2 >= 0.36
    assert share == pytest.approx(0.80, abs=0.01)
    assert counts["Global"] / 2e9 == pytest.approx(1.15, abs=0.02)  # GMACs


def test_there_is_no_attention_at_the_highest_level(model: DemoModel) -> None:
    assert not hasattr(model.unet.down_blocks[0], "attentions")
    assert not hasattr(model.unet.up_blocks[-1], "attentions")


def test_shipped_files_are_small_and_hold_no_code() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".md"}  # a model card


def test_shipped_weights_are_fp16() -> None:
    for path in WEIGHTS.rglob("*.safetensors"):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}


def test_diffusers_reads_the_unet(model: DemoModel) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(WEIGHTS / "unet", low_cpu_mem_usage=False)
    ours = model.unet.state_dict()
    assert all(torch.equal(value.float(), ours[name]) for name, value in unet.state_dict().items())


def test_half_precision_loads() -> None:
    model = load_demo(dtype=torch.bfloat16)
    assert model.unet.dtype == torch.bfloat16
    assert next(model.classifier.parameters()).dtype == torch.float32


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def scramble(path: Path) -> None:
    path.write_bytes(b"\x00" * 64)


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        ("unet/config.json", remove, "is missing"),
        ("unet/config.json", scramble, "cannot be read"),
        ("unet/diffusion_pytorch_model.safetensors", remove, "is missing"),
        ("unet/diffusion_pytorch_model.safetensors", truncate, "cannot be read"),
        ("text_encoder/model.safetensors", scramble, "cannot be read"),
        ("classifier/model.safetensors", truncate, "cannot be read"),
        ("training.json", remove, "is missing"),
    ],
)
def test_bad_weights_are_named(tmp_path: Path, file: str, harm: Callable[[Path], None], says: str) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(WEIGHTS, copy)
    harm(copy / file)
    with pytest.raises(WeightsError, match=says) as caught:
        load_demo(weights=copy)
    assert str(copy / file) in str(caught.value)
    assert "What to do:" in str(caught.value)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(WEIGHTS, copy)
    shutil.copy(copy / "classifier" / "model.safetensors", copy / "text_encoder" / "model.safetensors")
    with pytest.raises(WeightsError, match="tensors differ"):
        load_demo(weights=copy)


def test_arguments_are_checked(model: DemoModel) -> None:
    with pytest.raises(ArgumentError, match="steps: 0"):
        model.sample(DEMO_PROMPTS[:1], steps=0)
    with pytest.raises(ArgumentError, match="dpm\\+\\+"):
        model.sample(DEMO_PROMPTS[:1], scheduler="magic")
    with pytest.raises(UnknownWordError, match="dog"):
        model.sample(["a red dog"])


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, clockwork_hooks; before = set(sys.modules); import clockwork_hooks.demo; "
        "assert not {'diffusers', 'torch', 'numpy'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
