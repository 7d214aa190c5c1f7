"""The learned adaptors: they fit the region, start as the identity, and come back from disk as they were saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.adaptors import LearnedAdaptor
from clockwork_hooks.models import load_model
from tests.zoo import ZOO
from tests.zoo.case import ZooCase

KINDS = [ch.ResNetAdaptor]


def region_of(case: ZooCase, **options: Any) -> ch.Region:
    return ch.find_region(case.model, *case.args, **options, **case.kwargs)


def alive(adaptor: LearnedAdaptor) -> LearnedAdaptor:
    """With no layer at zero: what it returns depends on all that it is given."""
    with torch.no_grad():
        for parameter in adaptor.parameters():
            parameter.normal_(std=0.1)
    return adaptor


def rollout(case: ZooCase, adaptor: Any, **options: Any) -> list[Tensor]:
    """Outputs of four steps, two of them with the adaptor."""
    name = next((n for n in ("timestep", "time", "timesteps") if n in case.kwargs), None)
    made = []
    with torch.no_grad(), ch.wrap(case.model, adaptor, **options) as cw:
        for t in (900, 600, 300, 1):
            args, kwargs = list(case.args), dict(case.kwargs)
            for k, value in enumerate(args[1:2], 1):
                args[k] = torch.full_like(value, t) if isinstance(value, Tensor) else t
            if name:
                kwargs[name] = torch.full_like(kwargs[name], t)
            if len(args) + len(kwargs) == 1:
                cw.step()
            out = cw(*args, **kwargs)
            made.append(out if isinstance(out, Tensor) else out[0])
        assert cw.stats.adaptor_passes >= 1
    return made


@pytest.fixture(scope="module")
def sd15() -> ZooCase:
    return ZOO["sd15"]()


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_on_sd15(kind: Any) -> None:
    unet, args, kwargs = load_model("sd15")
    region = ch.find_region(unet, *args, cut="paper", **kwargs)
    with torch.device("meta"):
        adaptor = kind.for_region(region)
    cost = ch.flops_report(unet, *args, adaptor=adaptor, region=region, **kwargs).adaptor_macs
    count = sum(parameter.numel() for parameter in adaptor.parameters())
    assert adaptor.width == 320
    assert isinstance(adaptor.down, nn.Conv2d)
    assert isinstance(adaptor.up, nn.ConvTranspose2d)
    assert adaptor.down.kernel_size == adaptor.up.kernel_size == (4, 4)
    assert isinstance(adaptor.residual, nn.Conv2d)
    assert adaptor.residual.weight.shape == (640, 960, 1, 1)
    # strided 960→320, two blocks with the time, transposed 320→640, the residual, the text
    weights = 16 * 960 * 320 + 4 * 9 * 320**2 + 2 * 1280 * 320 + 16 * 320 * 640 + 960 * 640 + 768 * 320
    biases = 320 + 2 * (2 * 320 + 2 * 2 * 320 + 320) + 640 + 640 + 320
    assert count == weights + biases
    assert 13e6 < count < 15e6
    half = 16 * 16
    assert cost == (
        half * (16 * 960 * 320 + 4 * 9 * 320**2 + 16 * 320 * 640) + 4 * half * 960 * 640 + 2 * 1280 * 320 + 768 * 320
    )
    assert 7.2e9 < 2 * cost < 7.4e9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ZOO))
def test_a_fresh_adaptor_is_the_identity(name: str, kind: Any) -> None:
    """On every UNet of the zoo, bit for bit; with other weights it is not."""
    case = ZOO[name]()
    region = region_of(case)
    adaptor = kind.for_region(region)
    expected = rollout(case, "identity", region=region)
    assert all(map(torch.equal, rollout(case, adaptor, region=region), expected))
    assert not all(map(torch.equal, rollout(case, alive(adaptor), region=region), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(sd15: ZooCase, kind: Any, tmp_path: Path) -> None:
    """`wrap` finds the region that it was made for, the paper's cut, and gives the same images."""
    region = region_of(sd15, cut="paper")
    adaptor = alive(kind.for_region(region))
    adaptor.facts = {"sampler": "DPM++ 2M", "steps": 8, "clock": 2}
    adaptor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = LearnedAdaptor.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert (loaded.facts, loaded.region, loaded.arguments) == (adaptor.facts, adaptor.region, adaptor.arguments)
    assert all(map(torch.equal, loaded.state_dict().values(), adaptor.state_dict().values()))
    expected = rollout(sd15, adaptor, region=region)
    assert all(map(torch.equal, rollout(sd15, str(tmp_path), region=region), expected))
    # the exit of the traced call is not kept here, so the second step is full; the fourth is an adaptor pass in both
    assert torch.equal(rollout(sd15, tmp_path)[-1], expected[-1])
    card = (tmp_path / "README.md").read_text()
    assert "DPM++ 2M" in card
    assert region.fingerprint in card


def test_a_loaded_adaptor_goes_where_the_exit_is(sd15: ZooCase, tmp_path: Path) -> None:
    ch.ResNetAdaptor.for_region(region_of(sd15)).save_pretrained(tmp_path)
    unet = ZOO["sd15"]().model.to(torch.bfloat16)
    text = sd15.kwargs["encoder_hidden_states"].bfloat16()
    with torch.inference_mode(), ch.wrap(unet, tmp_path) as cw:
        for t in (900, 600):
            cw(sd15.args[0].bfloat16(), torch.tensor(t), encoder_hidden_states=text)
        assert cw.stats.adaptor_passes == 1
    parameters = list(cw.adaptor.parameters())  # type: ignore[attr-defined]
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert not any(parameter.is_inference() for parameter in parameters)


def test_another_region_is_refused(sd15: ZooCase, tmp_path: Path) -> None:
    """The error names what differs, at `wrap` or at the first call, which leaves the UNet as it was."""
    ch.ResNetAdaptor.for_region(region_of(sd15, cut="paper")).save_pretrained(tmp_path)
    with pytest.raises(ch.AdaptorError) as raised:
        ch.wrap(sd15.model, tmp_path, region=region_of(sd15))
    assert {
        "cut": "paper → outer",
        "entry path": "down_blocks.0.downsamplers.0.conv → down_blocks.0.attentions.1",
        "exit path": "up_blocks.2.attentions.2 → up_blocks.2.upsamplers.0.conv",
    }.items() <= raised.value.seen.items()
    other = ZOO["unet2d"]()
    before = [dict(vars(module)) for module in other.model.modules()]
    cw = ch.wrap(other.model, tmp_path)
    with pytest.raises(ch.AdaptorError, match="serves the region that it was made for") as raised:
        cw(*other.args)
    assert raised.value.seen["model"] == "UNet2DConditionModel → UNet2DModel"
    assert raised.value.seen["text width"] == "24 → none"
    assert before == [dict(vars(module)) for module in other.model.modules()]
