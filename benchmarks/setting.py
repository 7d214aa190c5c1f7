"""The models of the latency benchmarks and the loop that runs them: a real scheduler, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clockwork_hooks.analysis.benchmark import twin
from clockwork_hooks.demo.model import LATENT_SHAPE, new_unet
from clockwork_hooks.models import PRESETS, example_inputs

TINY = {
    "sd15": {"block_out_channels": (16, 32, 32, 32), "cross_attention_dim": 16, "norm_num_groups": 8},
    "sdxl": {
        "block_out_channels": (16, 32, 32),
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}
GUIDANCE = 7.5
SMALL = {  # for a CPU: (what a preset's configuration has instead, size of the latents)
    "small SD": ({"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "norm_num_groups": 8}, (32, 32)),
}


@dataclass(slots=True)
class Model:
    """A UNet with random weights, and how it is called.

    Attributes:
        name: preset.
        unet: the original; sides run twins of it, which share its weights.
        size: spatial shape of the latents.
    """

    name: str
    unet: nn.Module
    size: tuple[int, ...]
    device: str
    dtype: torch.dtype
    known: dict[Any, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.unet.parameters())

    @property
    def weight_bytes(self) -> int:
        """What they take."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.unet.parameters())

    def twin(self) -> Any:
        """Another UNet object on the same weights: wrapping one leaves the others alone, and costs no memory."""
        return twin(self.unet)

    def conditions(self, batch: int) -> dict[str, Any]:
        """Everything but sample and time, the same tensors for all sides."""
        if batch not in self.known:
            self.known[batch] = self.random_conditions(batch, batch)
        return self.known[batch]

    def random_conditions(self, batch: int, seed: int) -> dict[str, Any]:
        """Conditions drawn from a seed."""
        _, kwargs = example_inputs("UNet2DConditionModel", self.unet.config, batch=batch, size=self.size)
        drawn: dict[str, Any] = _random(kwargs, torch.Generator().manual_seed(seed), self.device, self.dtype)
        return drawn


def build(name: str, device: str, dtype: torch.dtype, *, tiny: bool = False) -> Model:
    """The architecture of a preset, of the demo model, or of a small SD, with random weights."""
    import diffusers

    if name == "demo":
        config, size = dict(new_unet().config), LATENT_SHAPE[1:]
    else:
        preset, (changes, small) = PRESETS["sd15" if name in SMALL else name], SMALL.get(name, ({}, None))
        config = {**preset.config, **changes, **(TINY[name] if tiny else {})}
        size = (16, 16) if tiny else small or preset.size
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            unet = diffusers.UNet2DConditionModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    unet = nn.Module.to(unet, device, dtype).eval().requires_grad_(False)
    return Model(name, unet, size, device, dtype)


def _random(value: Any, generator: torch.Generator, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _random(item, generator, device, dtype) for key, item in value.items()}
    if isinstance(value, Tensor):
        return torch.randn(value.shape, generator=generator).to(device, dtype)
    return value


class Loop:
    """One sampling loop: DPM-Solver++ (2M), guidance in one batch, as the Stable Diffusion pipelines run it.

    Args:
        model: what is sampled from.
        batch: of the UNet: two for each image.
        steps: denoising steps.
    """

    def __init__(self, model: Model, batch: int, steps: int) -> None:
        from diffusers import DPMSolverMultistepScheduler

        self.model, self.batch, self.steps = model, batch, steps
        self.scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type="dpmsolver++"
        )
        generator = torch.Generator().manual_seed(1)
        shape = (batch // 2, model.unet.config.in_channels, *model.size)
        self.noise = torch.randn(shape, generator=generator).to(model.device, model.dtype)
        self.conditions = model.conditions(batch)

    @property
    def images(self) -> int:
        """How many one run makes."""
        return self.batch // 2

    def generate(self, unet: Any) -> Callable[[Any, int], Tensor]:
        """A sampler as `ch.calibrate` takes it: the seed draws the noise, a batch may bring conditions of its own."""

        def sample(batch: Any, seed: int) -> Tensor:
            self.noise = torch.randn(self.noise.shape, generator=torch.Generator().manual_seed(seed)).to(self.noise)
            self.conditions = batch if isinstance(batch, dict) else self.conditions
            return self(unet)

        return sample

    @torch.no_grad()
    def __call__(self, call: Callable[..., Any]) -> Tensor:
        """Sample; `call` stands for the UNet."""
        begin = getattr(call, "begin", None)
        if begin is not None:
            begin()
        self.scheduler.set_timesteps(self.steps, device=self.model.device)
        latents = self.noise * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            both = self.scheduler.scale_model_input(torch.cat([latents, latents]), t)
            plain, told = call(both, t, **self.conditions, return_dict=False)[0].chunk(2)
            latents = self.scheduler.step(plain + GUIDANCE * (told - plain), t, latents, return_dict=False)[0]
        return latents
