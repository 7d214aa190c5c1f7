"""Time and text are found by what the graph does with them, and reach the adaptor as they are at their producer."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.adaptors.stand_in import masked_mean
from clockwork_hooks.engine.passes import Pass
from tests.small_unet import Tiny
from tests.zoo import ZOO

T, X = {"time": (2, 64)}, {"text": (2, 7, 24)}
# What reading each model's code gives.
FOUND: dict[str, dict[str, tuple[int, ...]]] = {
    "unet2d": T,
    "sd15": {**T, **X},
    "sd15_controlnet": {**T, **X},  # the residuals are maps: no text
    "sdxl": {**T, "text": (2, 16)},  # text_embeds itself, though it enters through the time embedding; no time_ids
    "kandinsky22": {**T, "text": (2, 20)},  # the image embedding that is projected to tokens inside
    "unet1d": {},  # the time is concatenated with the sample
    "unet3d": {"time": (3, 64), "text": (3, 7, 24)},  # repeated for every frame
    "svd": {"time": (3, 128), "text": (3, 1, 24)},
    "plain": {},
    "ddpm_pytorch": T,
    "monai3d": {"time": (1, 32)},
    "a_unet1d": {"time": (2, 32)},
}


@pytest.mark.parametrize("name", list(FOUND))
def test_found_in_the_zoo(name: str) -> None:
    case = ZOO[name]()
    region = ch.find_region(case.model, *case.args, **case.kwargs)
    assert {key: sizes for key, sizes in region.inputs.items() if key != "entry"} == FOUND[name]
    assert region.inputs["entry"] == region.entry.shape


class Spy:
    """An identity that keeps what it was given."""

    def __call__(self, entry: Any, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        self.entry, self.time, self.text = entry, time, text
        return exit_cached


def spied(unet: nn.Module, x: Tensor, t: Any = "", **kwargs: Any) -> Spy:
    """What the adaptor gets at the second step."""
    spy = Spy()
    with torch.no_grad(), ch.wrap(unet, spy, region=ch.find_region(unet, x, 900, **kwargs)) as cw, cw.trajectory():
        cw(x, 900, **kwargs)
        cw(x, 600, **kwargs)
        assert cw.stats.adaptor_passes == 1
    return spy


def conditional(**options: Any) -> nn.Module:
    """A small UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    ).eval()


IMAGE, TEXT = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24)
MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_padding_is_left_out(dtype: torch.dtype) -> None:
    spy = spied(conditional(), IMAGE, encoder_hidden_states=TEXT, encoder_attention_mask=MASK.to(dtype))
    assert torch.allclose(spy.text, torch.stack([TEXT[0].mean(0), TEXT[1, :3].mean(0)]))


def test_without_a_mask_the_tokens_come() -> None:
    assert torch.equal(spied(conditional(), IMAGE, encoder_hidden_states=TEXT).text, TEXT)


def test_projected_text_comes_projected() -> None:
    unet = conditional(encoder_hid_dim=12)
    noise = torch.randn(2, 7, 12)
    projected = unet.encoder_hid_proj(noise)
    assert torch.equal(spied(unet, IMAGE, encoder_hidden_states=noise).text, projected)


def test_the_pooled_text_of_sdxl() -> None:
    case = ZOO["sdxl"]()
    spy = spied(case.model, case.args[0], **case.kwargs)
    assert torch.equal(spy.text, case.kwargs["added_cond_kwargs"]["text_embeds"])


def test_time_made_inside_or_beside_the_region() -> None:
    """Tiny adds its time at the top: nothing of it feeds the region, but its embedding is there to be had."""
    unet = Tiny()
    spy = spied(unet, torch.randn(2, 2, 16, 16))
    assert torch.equal(spy.time, unet.emb(torch.full((2, 1), 6.0)))
    assert spy.text is None


class Odd(nn.Module):
    """A UNet whose conditions look like text and are not, or do not and are."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        up = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}[dims]
        self.stem, self.head, self.map = conv(2, 8, 3, padding=1), conv(16, 2, 3, padding=1), conv(5, 16, 1)
        self.down, self.up = conv(8, 16, 4, 2, 1), up(16, 8, 4, 2, 1)
        self.body = conv(16, 16, 3, padding=1)
        self.time, self.mix = nn.Linear(1, 12), nn.Linear(12, 16)
        self.words, self.query, self.tokens = nn.Embedding(9, 6), nn.Linear(16, 10), nn.Linear(10, 20)

    def forward(self, x: Tensor, t: int, **c: Tensor) -> Tensor:
        h = self.stem(x)
        z = self.down(h)
        time = self.time(torch.as_tensor(t / 1000).to(x).reshape(1, 1)).sin()
        z = z + self.mix(time).reshape(1, 16, *(1,) * (x.ndim - 2))
        if "map" in c:
            z = z + self.map(c["map"])
        if "label" in c:
            z = z + nn.functional.pad(self.words(c["label"]), (0, 10)).reshape(-1, 16, *(1,) * (x.ndim - 2))
        if "size" in c:
            z = z + (c["size"].sum() + t)  # a number and a scalar feed the region too
            z = z * c["size"].cos().sum(1).reshape(-1, 1, *(1,) * (x.ndim - 2))
        if "words" in c:  # time and text side by side, as tokens of one context
            context = torch.cat([c["words"], time.expand(len(x), 12)[:, None, :10]], 1)
            key, value = self.tokens(context).split([10, 10], -1)
            query = self.query(z.flatten(2).mT)
            scores = query @ key.mT
            if "words_mask" in c:
                keep = nn.functional.pad(c["words_mask"], (0, 1), value=True)
                scores = scores.masked_fill(~keep[:, None], -1e4)
            z = z + nn.functional.pad(scores.softmax(-1) @ value, (0, 6)).mT.reshape(z.shape)
        return self.head(torch.cat([h, self.up(self.body(z))], 1))


def test_maps_and_sizes_are_no_text() -> None:
    image = torch.randn(2, 2, 8, 8)
    assert spied(Odd(), image, map=torch.randn(2, 5, 4, 4)).text is None
    assert spied(Odd(1), torch.randn(2, 2, 8), map=torch.randn(2, 5, 4)).text is None
    assert spied(Odd(), image, size=torch.randn(2, 6)).text is None


def test_a_label_becomes_its_embedding() -> None:
    unet = Odd()
    label = torch.tensor([1, 2])
    spy = spied(unet, torch.randn(2, 2, 8, 8), label=label)
    assert torch.equal(spy.text, unet.words(label))


def test_text_beside_time_in_one_context() -> None:
    """The context depends on the time, so the text is taken as it was passed, without its padding."""
    unet, image, words = Odd(), torch.randn(2, 2, 8, 8), torch.randn(2, 4, 10)
    assert torch.equal(spied(unet, image, words=words).text, words)
    mask = torch.tensor([[True] * 4, [True, False, False, True]])
    spy = spied(unet, image, words=words, words_mask=mask)
    assert torch.allclose(spy.text, torch.stack([words[0].mean(0), words[1, [0, 3]].mean(0)]))


def test_a_pass_that_is_run_again_has_them_too() -> None:
    """Compiled and captured passes, and those of training, call the forward itself, past the hooks on the UNet."""
    case = ZOO["sdxl"]()
    region = ch.find_region(case.model, *case.args, **case.kwargs)
    assert region.cut_plan.ports["text"].path == ""
    run = Pass(region.cut_plan, "full")
    run.enter(case.args, case.kwargs)
    assert run.captured["text"] is case.kwargs["added_cond_kwargs"]["text_embeds"]


def test_nothing_stays_on_the_root() -> None:
    """A condition taken from the UNet's own arguments leaves nothing behind."""
    case = ZOO["sdxl"]()

    def state() -> list[Any]:
        return [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in case.model.modules()]

    before = state()
    spied(case.model, case.args[0], **case.kwargs)
    assert before == state()


@settings(max_examples=50)
@given(keep=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3), frames=st.integers(1, 3))
def test_masked_mean(keep: list[list[bool]], frames: int) -> None:
    """Against a loop, for masks of every kind; a row without tokens is zero."""
    mask = torch.tensor(keep)
    tokens = torch.randn(len(keep) * frames, 5, 4)
    rows = zip(tokens, mask.repeat_interleave(frames, 0), strict=True)
    expected = torch.stack([row[m].mean(0) if m.any() else torch.zeros(4) for row, m in rows])
    scores = torch.zeros(mask.shape).masked_fill(~mask, -10000.0)
    kinds = [mask, scores, *((mask.long(), mask.float()) if mask.any() else ())]
    for kind in kinds:
        assert torch.allclose(masked_mean(tokens, kind), expected, atol=1e-6)
