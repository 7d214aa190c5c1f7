"""The second model of `benchmarks/second_model.py`: another code base's UNet, preconditioned as EDM is, unconditional.

The network is denoising-diffusion-pytorch's `Unet`, called as that package's own `ElucidatedDiffusion` calls it, with
c_noise in the place of a timestep. Everything around it (preconditioning, loss, sampler) is Karras et al., "Elucidating
the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364), Sec. 5 and Tab. 1; the sampler of the rows is
DPM-Solver++ (2M) over its list of sigmas. Scenes are those of the demo model, without their captions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.harness import environment, reason, say
from clockwork_hooks.demo.model import LATENT_SHAPE, to_images
from clockwork_hooks.demo.scenes import IMAGE_SIZE, draw_split, render_bytes
from clockwork_hooks.demo.weights import write_json

__all__ = ["SecondModel", "Shape", "train"]

# Of the sampler. Chosen at 8 plain steps, on noises that judge and calibrate nothing (seeds from 7,000,000 on), with
# weights of 9.2 minutes: Fréchet of 384 pictures 407 (σ from 160: 521, 40: 465, 20: 803; down to 0.05: 404). From 20
# the steps follow their own curve more closely (33.1 dB to 40 steps, 32 noises, in the place of 28.2), but the start,
# noise alone, lacks what the scenes' brightness still has there.
SIGMA_MIN, SIGMA_MAX, RHO = 0.02, 80.0, 7.0
LOG_MEAN, LOG_STD = 0.0, 1.6  # of ln σ in training: flat scenes are laid out at larger σ than photographs
WEIGHTS, CURVE, PICTURES = "second_model.safetensors", "second_model_training.json", "second_model.png"
_EXAMPLE = Path(__file__).parents[1] / "examples" / "denoising_diffusion.py"


@dataclass(frozen=True, slots=True)
class Shape:
    """What weights are of: the options of the package's `Unet`, and the root mean square of the pixels."""

    dim: int = 48
    dim_mults: tuple[int, ...] = (1, 2, 4)
    sigma_data: float = 0.75

    def build(self) -> nn.Module:
        """A fresh UNet over the scenes' (12, 32, 32) latents: `pixel_unshuffle`d pictures, as the demo model has."""
        spec = importlib.util.spec_from_file_location("denoising_diffusion_example", _EXAMPLE)
        assert spec is not None  # a file that is there
        assert spec.loader is not None
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)  # its `package()` also imports where torchvision is not installed
        options = {"dim": self.dim, "dim_mults": self.dim_mults, "channels": LATENT_SHAPE[0]}
        unet: nn.Module = example.package().Unet(**options, random_fourier_features=True)
        return unet


def sigmas_of(steps: int) -> list[float]:
    """Karras' list, and the final 0 (arXiv 2206.00364, Eq. 5)."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    share = [k / max(steps - 1, 1) for k in range(steps)]
    return [*((high + part * (low - high)) ** RHO for part in share), 0.0]


def log_snr(time: float) -> float:
    """Of the time that the UNet is called with, c_noise = ln σ / 4."""
    return -8 * time


class SecondModel:
    """The UNet, its preconditioning and its sampler.

    Attributes:
        unet: what is called, and wrapped.
        shape: of it.
        facts: what the file of its weights says about the training.
    """

    def __init__(self, unet: nn.Module, shape: Shape, facts: dict[str, Any] | None = None) -> None:
        self.unet, self.shape, self.facts = unet, shape, facts or {}

    @property
    def weight(self) -> Tensor:
        """A weight: says device and dtype."""
        return next(self.unet.parameters())

    def scales(self, sigma: Any) -> tuple[Any, Any, Any]:
        """c_skip, c_out, c_in of a σ (Tab. 1)."""
        data = self.shape.sigma_data
        total = sigma**2 + data**2
        return data**2 / total, sigma * data / total**0.5, 1 / total**0.5

    def denoised(self, noisy: Tensor, sigma: float) -> Tensor:
        """D(x; σ) of float32 latents (B, 12, 32, 32) (Eq. 7)."""
        skip, out, into = self.scales(sigma)
        times = torch.full((len(noisy),), math.log(sigma) / 4, device=noisy.device, dtype=self.weight.dtype)
        return skip * noisy + out * self.unet((into * noisy).to(self.weight.dtype), times).float()

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int) -> Tensor:
        """DPM-Solver++ (2M) in σ (arXiv 2211.01095, Algorithm 2): one call of the UNet a step.

        Args:
            noise: (B, 12, 32, 32) standard normal, float32.
            steps: how many.

        Returns:
            Latents.
        """
        sigmas = sigmas_of(steps)
        x, before = sigmas[0] * noise, None
        for k in range(steps):
            sigma, following = sigmas[k], sigmas[k + 1]
            clean = self.denoised(x, sigma)
            if following == 0:
                return clean
            step, towards = math.log(sigma / following), clean
            if before is not None:
                half = step / (2 * math.log(sigmas[k - 1] / sigma))  # 1 / (2 r), r the ratio of the steps' lengths
                towards = (1 + half) * clean - half * before
            x = following / sigma * x - math.expm1(-step) * towards
            before = clean
        return x

    def pictures(self, noise: Tensor, steps: int) -> Tensor:
        """`sample` as pictures (B, 3, 64, 64) in [0, 1]."""
        return to_images(self.sample(noise, steps))

    def noise(self, count: int, seed: int) -> Tensor:
        """Standard normal latents, drawn on the CPU: a seed gives the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((count, *LATENT_SHAPE), generator=generator).to(self.weight.device)

    def save(self, path: Path) -> None:
        """Weights in fp16, and in the same file what they are of."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().half().contiguous().cpu() for name, value in self.unet.state_dict().items()}
        about = {"shape": asdict(self.shape), "facts": self.facts}
        save_file(tensors, path, metadata={"second_model": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SecondModel:
        """Read what `save` wrote."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["second_model"])
        shape = Shape(**{**about["shape"], "dim_mults": tuple(about["shape"]["dim_mults"])})
        unet = shape.build()
        unet.load_state_dict(load_file(path))
        return cls(unet.to(device, dtype).eval().requires_grad_(False), shape, about["facts"])


# -- training --------------------------------------------------------------------------------------------------------


class Pool:
    """Rendered scenes of the training combinations on the device; the oldest are drawn anew as training goes on."""

    def __init__(self, count: int, seed: int, device: torch.device) -> None:
        self.rng, self.place = np.random.default_rng(seed), 0
        self.images = torch.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
        self.refresh(count)

    def refresh(self, count: int) -> None:
        """Draw so many anew."""
        rows = (torch.arange(count, device=self.images.device) + self.place) % len(self.images)
        self.images[rows] = render_bytes(draw_split(count, self.rng, test=False), self.images.device)
        self.place += count

    def draw(self, count: int) -> Tensor:
        """Latents in [-1, 1] of a random batch."""
        rows = torch.randint(0, len(self.images), (count,), device=self.images.device)
        return F.pixel_unshuffle(self.images[rows].float() / 127.5 - 1, 2)


def loss_of(model: SecondModel, call: Any, clean: Tensor) -> Tensor:
    """The loss of Eq. 8: with its weight λ(σ) = 1 / c_out², an ordinary mean square of what the network emits."""
    count = len(clean)
    spread = (torch.arange(count, device=clean.device) + torch.rand(count, device=clean.device)) / count  # stratified
    normal = torch.special.ndtri(spread.clamp(1e-6, 1 - 1e-6))
    sigma = (LOG_MEAN + LOG_STD * normal).exp()[:, None, None, None]
    skip, out, into = model.scales(sigma)
    noisy = clean + sigma * torch.randn_like(clean)
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=clean.is_cuda):
        emitted = call((into * noisy).contiguous(memory_format=_layout(clean)), sigma.flatten().log() / 4)
    return F.mse_loss(emitted.float(), (clean - skip * noisy) / out)


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.is_cuda else torch.contiguous_format


def compiled(model: SecondModel, clean: Tensor) -> Any:
    """The UNet compiled, if a step with it works; else as it is, with the reason printed.

    What it saves on a GPU: autocast computes `RMSNorm`'s norm in float32, and all up to the next convolution stays so.
    Eager, a forward pass of 256 scenes is 680 kernels that move 25 GB; a backward pass is about twice that.
    """
    started = time.monotonic()
    # torch 2.11 fuses a norm with the gradient of its weight, of (1, C, 1, 1), and returns that as (C,): an error in
    # the backward pass, with channels_last alone (pytorch/pytorch pull request 177782)
    options = {"triton.mix_order_reduction": False}
    try:
        call = torch.compile(model.unet, dynamic=False, options=options)
        loss_of(model, call, clean).backward()
    except Exception as error:  # whatever a compiler may raise: training goes on without it
        say(f"not compiled: {reason(error)}")
        return model.unet
    model.unet.zero_grad(set_to_none=True)
    say(f"compiled in {time.monotonic() - started:.0f} s")
    return call


def train(options: argparse.Namespace) -> int:
    """Train for so many minutes, and save the moving average of the weights, the loss curve and a few pictures."""
    torch.manual_seed(options.seed)
    started, device = time.monotonic(), torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # shapes never change
    pool = Pool(options.pool, options.seed + 1000, device)
    power = pool.draw(min(options.pool, 4096)).square().mean().sqrt()
    if options.start is None:
        shape = Shape(dim=options.dim, sigma_data=round(float(power), 3))
        model = SecondModel(shape.build(), shape)
    else:
        model = SecondModel.load(options.start)
    unet = model.unet.to(device).train()
    learned = [parameter for name, parameter in unet.named_parameters() if name != "time_mlp.0.weights"]
    for parameter in learned:  # a loaded model's are frozen; the random frequencies of the time always are
        parameter.requires_grad_(True)
    call = compiled(model, pool.draw(options.batch)) if options.compile else unet
    optimizer = torch.optim.AdamW(learned, lr=options.rate, betas=(0.9, 0.99))
    iteration, curve, before = 0, list[dict[str, float]](), time.monotonic()

    def mean(averaged: Any, current: Any, _count: Any) -> None:
        """Short at first, so that the random weights of the start are soon forgotten."""
        torch._foreach_lerp_(averaged, current, 1 - min(options.decay, (1 + iteration) / (10 + iteration)))

    average = AveragedModel(unet, multi_avg_fn=mean)
    count = sum(parameter.numel() for parameter in learned)
    say(f"training {count / 1e6:.2f}M parameters after {before - started:.0f} s of preparation")
    while (passed := (time.monotonic() - started) / (60 * options.minutes)) < 1 or iteration == 0:
        rate = options.rate * min(1, (iteration + 1) / 300) * max(0.5 * (1 + math.cos(math.pi * passed)), 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, call, pool.draw(options.batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        average.update_parameters(unet)
        iteration += 1
        if iteration % options.log_every == 0 or iteration == 1:
            now = time.monotonic()
            curve.append({"iteration": iteration, "loss": float(loss.detach()), "seconds": round(now - started, 1)})
            if now - before > 20 or iteration == 1:
                say(f"iteration {iteration}: loss {curve[-1]['loss']:.4f}")
                before = now
        if iteration % 500 == 0:
            pool.refresh(options.pool // 16)
    return _finish(options, SecondModel(average.module.eval(), model.shape, model.facts), iteration, curve)


def _finish(options: argparse.Namespace, model: SecondModel, iteration: int, curve: list[dict[str, float]]) -> int:
    """Write the weights and what is known about them."""
    tail = [one["loss"] for one in curve[-20:]]
    model.facts = {
        **environment(str(options.device), options.seed), "minutes": options.minutes, "iterations": iteration,
        "batch": options.batch, "rate": options.rate, "decay": options.decay, "loss": sum(tail) / len(tail),
        "before": None if options.start is None else {name: model.facts[name] for name in ("minutes", "iterations")},
        "parameters": sum(parameter.numel() for parameter in model.unet.parameters()),
    }  # fmt: skip
    model.save(options.out / WEIGHTS)
    write_json(options.out / CURVE, {**model.facts, "shape": asdict(model.shape), "curve": curve})
    again = SecondModel.load(options.out / WEIGHTS, options.device)
    _draw(again.pictures(again.noise(options.shown, 1), 20), options.out / PICTURES)
    size = (options.out / WEIGHTS).stat().st_size / 2**20
    say(f"{iteration} iterations, loss {model.facts['loss']:.4f}; {size:.1f} MiB in {options.out / WEIGHTS}")
    return 0


def _draw(pictures: Tensor, path: Path) -> None:
    """Pictures side by side, eight in a row."""
    from PIL import Image

    rows = [torch.cat(list(row), 2) for row in pictures.split(8) if len(row) == min(8, len(pictures))]
    whole = (torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    Image.fromarray(whole).save(path)
