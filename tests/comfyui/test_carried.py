"""A calibrated adaptor is carried from diffusers to ComfyUI's own UNet: one file, the same weights, equal samples."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from tests.layouts import TEXT, layouts

Net = tuple[nn.Module, Callable[..., Tensor]]
TIMES = torch.tensor([900, 750, 600, 450, 300, 150])
SCHEDULE = ch.Schedule.every(2)


def comfyui() -> dict[str, Net]:
    """SD 1.5's UNet with few channels in diffusers' code, and ComfyUI's own with its weights by ComfyUI's own table."""
    from diffusers import UNet2DConditionModel

    from tests.comfyui import real

    torch.manual_seed(0)
    theirs = real.model().model.diffusion_model
    ours = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,  # heads, as in SD 1.5
    ).eval()
    names = real.load("comfy.utils").unet_to_diffusers(real.CONFIG)
    weights = ours.state_dict()
    theirs.load_state_dict({names[name]: value for name, value in weights.items()})
    return {
        "diffusers": (ours, lambda net, x, t, text: net(x, t, encoder_hidden_states=text, return_dict=False)[0]),
        "comfyui": (theirs, lambda net, x, t, text: net(x, timesteps=t.expand(len(x)), context=text)),
    }


@torch.no_grad()
def sample(net: Net, batch: Tensor, seed: int) -> Tensor:
    unet, call = net
    x = torch.randn(len(batch), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    for t in TIMES:
        x = x - 0.3 * call(unet, x, t, batch)
    return x


@pytest.mark.parametrize(
    "where",
    [
        "ldm",
        pytest.param(
            "comfyui", marks=pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names none")
        ),
    ],
)
def test_a_calibrated_adaptor_is_carried(where: str, tmp_path: Path) -> None:
    """Saved by diffusers' code, loaded in the other: nearer to plain than the identity is, and the same sample."""
    nets: dict[str, Any] = layouts() if where == "ldm" else comfyui()
    width = TEXT if where == "ldm" else 16
    random = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 5, width, generator=random) for _ in range(3)]
    own, generate = nets["diffusers"], lambda batch, seed: sample(nets["diffusers"], batch, seed)
    ch.calibrate(own[0], generate, batches, schedule=SCHEDULE).save_pretrained(tmp_path)
    plain = {name: sample(nets[name], batches[0], 7) for name in ("diffusers", where)}
    torch.testing.assert_close(plain[where], plain["diffusers"], atol=1e-4, rtol=1e-4)
    samples = {}
    for name in plain:
        with ch.wrap(nets[name][0], tmp_path) as cw:
            samples[name] = sample(nets[name], batches[0], 7)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3)
        assert type(cw.adaptor).__name__ == "CalibratedAdaptor"
    torch.testing.assert_close(samples[where], samples["diffusers"], atol=1e-4, rtol=1e-4)
    with ch.wrap(nets[where][0], schedule=SCHEDULE, region=ch.Choice(**cw.adaptor.region_options)):
        identity = sample(nets[where], batches[0], 7)
    errors = [float((one - plain[where]).norm()) for one in (samples[where], identity)]
    assert 0 < errors[0] < errors[1]
