"""The demo model: a small text-to-image diffusion model of captioned scenes.

Pictures (3, 64, 64) are diffused as `pixel_unshuffle`d "latents" (12, 32, 32): a fixed, lossless rearrangement in the
place of a VAE. The UNet is an ordinary `diffusers.UNet2DConditionModel` with no attention at its highest level.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clockwork_hooks.demo.captions import MAX_TOKENS, VOCABULARY, encode
from clockwork_hooks.demo.classifier import AttributeClassifier
from clockwork_hooks.demo.weights import WEIGHTS, load_module, read_json
from clockwork_hooks.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image

GUIDANCE = 1.5  # measured: above 2, grey backgrounds darken
LATENT_SHAPE = (12, 32, 32)
TRAIN_STEPS = 1000
SCHEDULE = {"num_train_timesteps": TRAIN_STEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
DEMO_PROMPTS = (
    "a large red circle left of a small blue square on a dark green background",
    "a small yellow star above a large cyan ring on a dark blue background",
    "a large green triangle in the centre on a white background",
    "a small pink cross right of a large orange circle on a black background",
    "a large white star at the top left on a dark red background",
    "a large blue square below a small red triangle on a grey background",
    "a small orange ring left of a small green star on a white background",
    "a large pink circle above a large yellow square on a dark green background",
    "a small cyan triangle at the bottom right on a dark blue background",
    "a large yellow cross left of a large blue ring on a grey background",
    "a small white circle below a large pink star on a black background",
    "a large orange square at the left on a dark blue background",
    "a small red ring right of a small cyan square on a dark red background",
    "on a white background a large blue star above a small green circle",
    "a large cyan cross to the left of a small white triangle on a dark green background",
    "a small green ring at the top on a grey background",
)

StepCallback = Callable[[int, int, Tensor], None]
TEXT_WIDTH = 128


def new_unet(**changes: Any) -> Any:
    """A UNet of the demo's architecture with fresh weights.

    One plain level at 32×32, cross-attention at 16×16 and in the middle at 8×8. 80% of its MACs lie below the
    first downsampling, so a clock of 2 saves 40%.

    Args:
        changes: other values for `UNet2DConditionModel`'s options.

    Returns:
        A `diffusers.UNet2DConditionModel`.
    """
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": LATENT_SHAPE[1],
        "in_channels": LATENT_SHAPE[0],
        "out_channels": LATENT_SHAPE[0],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (48, 128, 128),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": (2, 4, 4),  # heads, in spite of its name: 32 channels each
        "norm_num_groups": 16,
    }
    return UNet2DConditionModel(**(options | changes))


def to_latents(images: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] to latents (B, 12, 32, 32) in [-1, 1]."""
    return F.pixel_unshuffle(images * 2 - 1, 2)


def to_images(latents: Tensor) -> Tensor:
    """Latents (B, 12, 32, 32) to pictures (B, 3, 64, 64), clipped to [0, 1]."""
    return ((F.pixel_shuffle(latents.float(), 2) + 1) / 2).clamp(0, 1)


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] → a Pillow picture."""
    from PIL import Image

    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


@dataclass(slots=True)
class DemoModel:
    """The parts of the demo model and the sampler over them.

    Attributes:
        unet: `diffusers.UNet2DConditionModel`, latents (B, 12, 32, 32) and hidden states (B, 18, 128) to v.
        text_encoder: token ids to hidden states.
        classifier: reads attributes off pictures; fp32 always.
        info: what `weights/training.json` says about the training.
    """

    unet: Any
    text_encoder: TextEncoder
    classifier: AttributeClassifier
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the text encoder is."""
        return self.text_encoder.norm.weight.device

    def scheduler(self, name: str = "dpm++") -> Any:
        """A fresh diffusers scheduler on the model's noise schedule, with trailing timesteps.

        Args:
            name: one of `SCHEDULERS`.

        Raises:
            ArgumentError: another name.
        """
        import diffusers

        if name not in SCHEDULERS:
            raise ArgumentError(
                "the demo has a few schedulers, by name",
                seen={"name": repr(name)},
                do=f"choose one of {', '.join(SCHEDULERS)}",
            )
        kind, options = SCHEDULERS[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`algorithm_types dpmsolver", FutureWarning)  # the paper's Tab. 4 has it
            return getattr(diffusers, kind)(**SCHEDULE, timestep_spacing="trailing", **options)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, guided: bool = True) -> Tensor:
        """Hidden states of prompts, after those of as many empty prompts where guided.

        Args:
            prompts: B captions.
            guided: prepend the unconditional branch.

        Returns:
            (2B, 18, 128) or (B, 18, 128) hidden states.

        Raises:
            UnknownWordError: a word that the model has never seen.
        """
        texts = [""] * len(prompts) + list(prompts) if guided else list(prompts)
        hidden: Tensor = self.text_encoder(torch.from_numpy(encode(texts)).to(self.device))
        return hidden

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 8,
        guidance: float = GUIDANCE,
        seed: int = 0,
        scheduler: str | Any = "dpm++",
        unet: Any = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Draw a picture for each prompt.

        One UNet call a step does both guidance branches: the unconditional half of the batch, then the conditional.
        Noise is drawn on the CPU, so a seed gives the same noise on every device.

        Args:
            prompts: B captions.
            steps: denoising steps.
            guidance: classifier-free guidance scale; 1 is the plain conditional model (both branches still run).
            seed: of the initial noise.
            scheduler: a name in `SCHEDULERS`, or a diffusers scheduler.
            unet: runs in the place of `self.unet`.
            callback: called after each step with its number, its timestep and the latents (B, 12, 32, 32).

        Returns:
            (B, 3, 64, 64) float32 pictures in [0, 1], on the model's device.

        Raises:
            UnknownWordError: a word that the model has never seen.
            ArgumentError: no steps, or an unknown scheduler.
        """
        latents = self.noise(len(prompts), seed)
        hidden = self.encode_prompts(prompts)
        return to_images(
            self.denoise(
                latents, hidden, steps=steps, guidance=guidance, scheduler=scheduler, unet=unet, callback=callback
            )
        )

    def noise(self, count: int, seed: int) -> Tensor:
        """Standard normal latents (count, 12, 32, 32), drawn on the CPU: a seed gives the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((count, *LATENT_SHAPE), generator=generator).to(self.device)

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        hidden: Tensor,
        *,
        steps: int = 8,
        guidance: float = GUIDANCE,
        scheduler: str | Any = "dpm++",
        unet: Any = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """The sampling loop of `sample`, from noise and hidden states that are there already.

        Args:
            noise: (B, 12, 32, 32) standard normal.
            hidden: (2B, 18, 128), as `encode_prompts` gives them.
            steps, guidance, scheduler, unet, callback: as in `sample`.

        Returns:
            (B, 12, 32, 32) float32 latents; `to_images` makes pictures of them.

        Raises:
            ArgumentError: no steps, or an unknown scheduler.
        """
        if steps < 1:
            raise ArgumentError("sampling takes at least one step", seen={"steps": steps}, do="pass a positive number")
        run = self.unet if unet is None else unet
        solver = self.scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        solver.set_timesteps(steps, device=self.device)
        latents: Tensor = noise * solver.init_noise_sigma
        for number, t in enumerate(solver.timesteps):
            both = solver.scale_model_input(torch.cat([latents, latents]), t).to(hidden.dtype)
            plain, guided = run(both, t, encoder_hidden_states=hidden).sample.float().chunk(2)
            latents = solver.step(plain + guidance * (guided - plain), t, latents).prev_sample
            if callback is not None:
                callback(number, int(t), latents)
        return latents


def load_demo(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, weights: Path = WEIGHTS
) -> DemoModel:
    """Load the demo model from the weights that ship with the package.

    Args:
        device: where to put it.
        dtype: of the UNet and the text encoder; the classifier stays in fp32.
        weights: another folder of weights, as `train` writes it.

    Returns:
        The model, in evaluation mode.

    Raises:
        WeightsError: a file is missing, corrupted, or of another architecture.
    """
    unet = new_unet(**_public(read_json(weights / "unet" / "config.json")))
    text_encoder, classifier = TextEncoder(), AttributeClassifier()
    load_module(unet, weights / "unet" / "diffusion_pytorch_model.safetensors")
    load_module(text_encoder, weights / "text_encoder" / "model.safetensors")
    load_module(classifier, weights / "classifier" / "model.safetensors")
    for module in (unet, text_encoder, classifier):
        module.eval().requires_grad_(False)
    return DemoModel(
        unet=nn.Module.to(unet, device, dtype),  # diffusers' own `to` warns of casts that are meant
        text_encoder=text_encoder.to(device, dtype),
        classifier=classifier.to(device),
        info=read_json(weights / "training.json"),
    )


def _public(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


class TextEncoder(nn.Module):
    """Token ids to hidden states for cross-attention.

    Padding is attended to like any word (as in Stable Diffusion), so no mask travels with the hidden states.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(len(VOCABULARY), TEXT_WIDTH)
        self.position = nn.Embedding(MAX_TOKENS, TEXT_WIDTH)
        self.layers = nn.ModuleList(_Layer(TEXT_WIDTH, heads=4) for _ in range(2))
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode captions.

        Args:
            tokens: (B, 18) int64 token ids, as `captions.encode` gives them.

        Returns:
            (B, 18, TEXT_WIDTH) hidden states.
        """
        hidden: Tensor = self.token(tokens) + self.position.weight
        for layer in self.layers:
            hidden = layer(hidden)
        normed: Tensor = self.norm(hidden)
        return normed


class _Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.norm_attention(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = hidden + self.mlp(self.norm_mlp(hidden))
        return result
