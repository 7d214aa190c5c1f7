"""One small latent-diffusion UNet in three codes: diffusers' own, the LDM's (also ComfyUI's), and one of nested chains.

The second and third are written as those codes are: other names, other nesting, attention and gates in other words.
Their weights are copied from the first.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS, TEXT, HEADS, GROUPS = (16, 32, 32), 12, 2, 4
EMBEDDING = 4 * WIDTHS[0]


def diffusers_layout() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=WIDTHS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=GROUPS,
        attention_head_dim=HEADS,  # diffusers' name for their number
        cross_attention_dim=TEXT,
    ).eval()


def embedded(t: Any, rows: int) -> Tensor:
    half = WIDTHS[0] // 2
    angles = torch.as_tensor(t).reshape(-1, 1) * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], 1).expand(rows, -1)


# -- the LDM's ---------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, b))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, b), nn.SiLU(), nn.Dropout(0), nn.Conv2d(b, b, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(width, width, False), nn.Sequential(nn.Linear(width, width), nn.Dropout(0))
        self.to_k, self.to_v = nn.Linear(text, width, False), nn.Linear(text, width, False)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        text = x if text is None else text
        q, k, v = (
            layer(y).reshape(len(x), y.shape[1], HEADS, -1).permute(0, 2, 1, 3).flatten(0, 1)
            for layer, y in ((self.to_q, x), (self.to_k, text), (self.to_v, text))
        )
        weights = (torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        out = torch.einsum("bij,bjd->bid", weights, v)
        return self.to_out(out.reshape(len(x), HEADS, x.shape[1], -1).permute(0, 2, 1, 3).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, width), CrossAttention(width, TEXT)
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(width), nn.Dropout(0), nn.Linear(4 * width, width))})
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), text) + x
        return self.ff["net"](self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(GROUPS, width, eps=1e-6), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        b, c, height, width = h.shape
        h = self.transformer_blocks[0](h.reshape(b, c, -1).transpose(1, 2).contiguous(), text)
        return self.proj_out(h.transpose(1, 2).reshape(b, c, height, width)) + x


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Stage(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb, text)
        return x


class LDM(nn.Module):
    """openaimodel.py's UNetModel."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.time_embed = nn.Sequential(nn.Linear(a, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.input_blocks = nn.ModuleList(
            [
                Stage(First(4, a, 3, padding=1)),
                Stage(ResBlock(a, a), SpatialTransformer(a)),
                Stage(Downsample(a)),
                Stage(ResBlock(a, b), SpatialTransformer(b)),
                Stage(Downsample(b)),
                Stage(ResBlock(b, c)),
            ]
        )
        self.middle_block = Stage(ResBlock(c, c), SpatialTransformer(c), ResBlock(c, c))
        self.output_blocks = nn.ModuleList(
            [
                Stage(ResBlock(c + c, c)),
                Stage(ResBlock(c + b, c), Upsample(c)),
                Stage(ResBlock(c + b, b), SpatialTransformer(b)),
                Stage(ResBlock(b + a, b), SpatialTransformer(b), Upsample(b)),
                Stage(ResBlock(b + a, a), SpatialTransformer(a)),
                Stage(ResBlock(a + a, a), SpatialTransformer(a)),
            ]
        )
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, a), nn.SiLU(), nn.Conv2d(a, 4, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Any = None, context: Tensor | None = None) -> Tensor:
        emb, text = self.time_embed(embedded(timesteps, len(x))), torch.empty(0) if context is None else context
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, text)
            skips.append(x)
        x = self.middle_block(x, emb, text)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], 1), emb, text)
        return self.out(x)


# -- nested chains, as refiners writes them -----------------------------------------------------------------------


class Chain(nn.Module):
    """Its children one after another."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for k, layer in enumerate(layers):
            self.add_module(f"{type(layer).__name__}_{k + 1}", layer)

    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        for layer in self.children():
            x = layer(x, context) if isinstance(layer, Chain) else layer(x)
        return x


class Sum(Chain):
    """The sum of what its children make of one input; the last is called first."""

    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        terms = [
            layer(x, context) if isinstance(layer, Chain) else layer(x) for layer in reversed(list(self.children()))
        ]
        return terms[1] + terms[0]


class AddTime(Chain):
    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        time, convolution = self.children()
        bias = time(F.silu(context["time"])).unflatten(1, (-1, 1, 1))
        return bias + convolution(x)


class Attend(Chain):
    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        query, key, value, out = self.children()
        other = context["text"] if key.in_features == TEXT else x
        v, k, q = (
            layer(y).view(len(x), -1, HEADS, value.out_features // HEADS).transpose(1, 2)
            for layer, y in ((value, other), (key, other), (query, x))
        )
        return out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        value, gate = torch.split(x, half, dim=-1)
        return F.gelu(gate) * value


class Tokens(Chain):
    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        y = super().forward(x.flatten(2).permute(0, 2, 1), context)
        return y.permute(0, 2, 1).unflatten(2, x.shape[2:])


def residual_block(a: int, b: int) -> Chain:
    time = AddTime(nn.Linear(EMBEDDING, b), nn.Conv2d(a, b, 3, padding=1))
    body = Chain(nn.GroupNorm(GROUPS, a), nn.SiLU(), time, nn.GroupNorm(GROUPS, b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1))
    return Sum(body, nn.Identity() if a == b else nn.Conv2d(a, b, 1))


def attention_block(width: int) -> Chain:
    def attend(text: int) -> Chain:
        projections = nn.Linear(width, width, False), nn.Linear(text, width, False), nn.Linear(text, width, False)
        return Sum(Chain(nn.LayerNorm(width), Attend(*projections, nn.Linear(width, width))), nn.Identity())

    gate = Chain(nn.LayerNorm(width), nn.Linear(width, 8 * width), Gate(), nn.Linear(4 * width, width))
    tokens = Tokens(attend(width), attend(TEXT), Sum(gate, nn.Identity()))
    body = Chain(nn.GroupNorm(GROUPS, width, eps=1e-6), nn.Conv2d(width, width, 1), tokens, nn.Conv2d(width, width, 1))
    return Sum(body, nn.Identity())


class Concatenate(Chain):
    def __init__(self, index: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.index = index

    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        return super().forward(torch.cat([x, context[f"skip {self.index}"]], 1), context)


class Keep(Chain):
    def __init__(self, index: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.index = index

    def forward(self, x: Tensor, context: dict[str, Tensor]) -> Tensor:
        context[f"skip {self.index}"] = x = super().forward(x, context)
        return x


class Chains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.TimestepEncoder = Chain(nn.Linear(a, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.Down = Chain(
            Keep(0, nn.Conv2d(4, a, 3, padding=1)),
            Keep(1, residual_block(a, a), attention_block(a)),
            Keep(2, nn.Conv2d(a, a, 3, 2, 1)),
            Keep(3, residual_block(a, b), attention_block(b)),
            Keep(4, nn.Conv2d(b, b, 3, 2, 1)),
            Keep(5, residual_block(b, c)),
        )
        self.Middle = Chain(residual_block(c, c), attention_block(c), residual_block(c, c))
        up = nn.Upsample(scale_factor=2)
        self.Up = Chain(
            Concatenate(5, residual_block(c + c, c)),
            Concatenate(4, residual_block(c + b, c), up, nn.Conv2d(c, c, 3, padding=1)),
            Concatenate(3, residual_block(c + b, b), attention_block(b)),
            Concatenate(2, residual_block(b + a, b), attention_block(b), up, nn.Conv2d(b, b, 3, padding=1)),
            Concatenate(1, residual_block(b + a, a), attention_block(a)),
            Concatenate(0, residual_block(a + a, a), attention_block(a)),
        )
        self.Head = Chain(nn.GroupNorm(GROUPS, a), nn.SiLU(), nn.Conv2d(a, 4, 3, padding=1))

    def forward(self, x: Tensor, *, timestep: Any, clip_text_embedding: Tensor) -> Tensor:
        context = {"text": clip_text_embedding}
        context["time"] = self.TimestepEncoder(embedded(timestep, len(x)), context)
        return self.Head(self.Up(self.Middle(self.Down(x, context), context), context), context)


# -- the weights ---------------------------------------------------------------------------------------------------

_RESNET = {
    "norm1": ("in_layers.0", "Chain_1.GroupNorm_1"),
    "conv1": ("in_layers.2", "Chain_1.AddTime_3.Conv2d_2"),
    "time_emb_proj": ("emb_layers.1", "Chain_1.AddTime_3.Linear_1"),
    "norm2": ("out_layers.0", "Chain_1.GroupNorm_4"),
    "conv2": ("out_layers.3", "Chain_1.Conv2d_6"),
    "conv_shortcut": ("skip_connection", "Conv2d_2"),
}
_ATTENTION = {
    "norm": "Chain_1.GroupNorm_1",
    "proj_in": "Chain_1.Conv2d_2",
    "proj_out": "Chain_1.Conv2d_4",
    **{
        f"transformer_blocks.0.{ours}": f"Chain_1.Tokens_3.{theirs}"
        for k in (1, 2)
        for ours, theirs in (
            (f"norm{k}", f"Sum_{k}.Chain_1.LayerNorm_1"),
            (f"attn{k}.to_q", f"Sum_{k}.Chain_1.Attend_2.Linear_1"),
            (f"attn{k}.to_k", f"Sum_{k}.Chain_1.Attend_2.Linear_2"),
            (f"attn{k}.to_v", f"Sum_{k}.Chain_1.Attend_2.Linear_3"),
            (f"attn{k}.to_out.0", f"Sum_{k}.Chain_1.Attend_2.Linear_4"),
        )
    },
    "transformer_blocks.0.norm3": "Chain_1.Tokens_3.Sum_3.Chain_1.LayerNorm_1",
    "transformer_blocks.0.ff.net.0.proj": "Chain_1.Tokens_3.Sum_3.Chain_1.Linear_2",
    "transformer_blocks.0.ff.net.2": "Chain_1.Tokens_3.Sum_3.Chain_1.Linear_4",
}


def _pairs() -> Iterator[tuple[str, str, str]]:
    """(prefix in diffusers, in the LDM's, in chains) of resnets, attentions and single layers."""
    yield "time_embedding.linear_1", "time_embed.0", "TimestepEncoder.Linear_1"
    yield "time_embedding.linear_2", "time_embed.2", "TimestepEncoder.Linear_3"
    yield "conv_in", "input_blocks.0.0", "Down.Keep_1.Conv2d_1"
    for level, k in enumerate((1, 3, 5)):
        yield f"down_blocks.{level}.resnets.0", f"input_blocks.{k}.0", f"Down.Keep_{k + 1}.Sum_1"
        if level < 2:
            yield f"down_blocks.{level}.attentions.0", f"input_blocks.{k}.1", f"Down.Keep_{k + 1}.Sum_2"
            conv = f"input_blocks.{k + 1}.0.op", f"Down.Keep_{k + 2}.Conv2d_1"
            yield f"down_blocks.{level}.downsamplers.0.conv", *conv
    for k, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{part}", f"middle_block.{k}", f"Middle.Sum_{k + 1}"
    for k in range(6):
        level, layer = divmod(k, 2)
        yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{k}.0", f"Up.Concatenate_{k + 1}.Sum_1"
        if level:
            yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{k}.1", f"Up.Concatenate_{k + 1}.Sum_2"
        if layer and level < 2:
            at = 2 if level else 1
            conv = f"output_blocks.{k}.{at}.conv", f"Up.Concatenate_{k + 1}.Conv2d_{at + 2}"
            yield f"up_blocks.{level}.upsamplers.0.conv", *conv
    yield "conv_norm_out", "out.0", "Head.GroupNorm_1"
    yield "conv_out", "out.2", "Head.Conv2d_3"


def _renamed(name: str, column: int) -> str:
    """A parameter's name of diffusers in another code."""
    for prefixes in _pairs():
        ours, theirs = prefixes[0], prefixes[column]
        if name.startswith(f"{ours}."):
            module, _, parameter = name.removeprefix(f"{ours}.").rpartition(".")
            if ".resnets." in f".{ours}":
                module = _RESNET[module][column - 1]
            elif ".attentions." in f".{ours}" and column == 2:
                module = _ATTENTION[module]
            return ".".join(part for part in (theirs, module, parameter) if part)
    raise KeyError(name)


def layouts() -> dict[str, tuple[nn.Module, Callable[..., Tensor]]]:
    """Each code's network, with how it is called: (network, (network, x, t, text) → output)."""
    one, two, three = diffusers_layout(), LDM().eval(), Chains().eval()
    for column, other in ((1, two), (2, three)):
        other.load_state_dict({_renamed(name, column): value for name, value in one.state_dict().items()})
    return {
        "diffusers": (one, lambda net, x, t, text: net(x, t, encoder_hidden_states=text, return_dict=False)[0]),
        "ldm": (two, lambda net, x, t, text: net(x, timesteps=t.expand(len(x)), context=text)),
        "chains": (three, lambda net, x, t, text: net(x, timestep=t, clip_text_embedding=text)),
    }
