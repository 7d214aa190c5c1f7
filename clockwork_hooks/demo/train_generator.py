"""Training of the generator: UNet and text encoder, jointly, with v-prediction and caption dropout.

The whole step (drawing the batch, noise, both networks, backward, AdamW, moving average) is one CUDA graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clockwork_hooks.demo.captions import encode
from clockwork_hooks.demo.model import TRAIN_STEPS, new_unet
from clockwork_hooks.demo.pool import ScenePool
from clockwork_hooks.demo.text import TextEncoder
from clockwork_hooks.demo.weights import read_json, read_tensors, save_half, write_json, write_tensors
from clockwork_hooks.errors import ArgumentError

__all__ = ["Options", "Trainer", "train_generator"]

Log = Callable[[dict[str, Any]], None]
_SHARD_BYTES = 15 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """How to train.

    Attributes:
        minutes: of the whole run, over which the learning rate falls; a resumed run goes on where it was.
        batch: scenes an iteration.
        pool: scenes held ready; 1/16 of them is drawn anew every `refresh_every` iterations.
        rate: peak learning rate of AdamW.
        dropout: chance of training on the empty caption, for classifier-free guidance.
        decay: of the moving average of the weights.
        compile: compile the UNet; two minutes at the start, faster after.
        seed: of the weights, the scenes and the noise.
        save_every: seconds between checkpoints.
        log_every: iterations between log records.
    """

    device: str = "cuda"
    minutes: float = 15.0
    batch: int = 512
    pool: int = 1_000_000
    refresh_every: int = 1000
    rate: float = 8e-4
    dropout: float = 0.1
    decay: float = 0.9995
    compile: bool = False
    seed: int = 0
    save_every: float = 60.0
    log_every: int = 100


class Trainer:
    """Weights, their moving average, the optimizer and the graphed step."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device = options, torch.device(options.device)
        self.unet = new_unet().to(self.device, memory_format=torch.channels_last)
        self.text = TextEncoder().to(self.device)
        names = {f"unet.{n}": p for n, p in self.unet.named_parameters()}
        names |= {f"text.{n}": p for n, p in self.text.named_parameters()}
        self.names, self.parameters = list(names), list(names.values())
        self.average = [p.detach().clone() for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.first = [torch.zeros_like(p) for p in self.average]
        self.second = [torch.zeros_like(p) for p in self.average]
        self.rate, self.keep, self.count, self.loss = (torch.zeros((), device=self.device) for _ in range(4))
        self.iteration, self.seconds = 0, 0.0
        self.run: Any = torch.compile(self.unet, dynamic=False) if options.compile else self.unet
        self.empty = torch.from_numpy(encode([""])).to(self.device)
        cosine = torch.tensor(_alphas_cumprod(), device=self.device, dtype=torch.float64)
        self.signal, self.noise = cosine.sqrt().float(), (1 - cosine).sqrt().float()
        self.step_: Callable[[], None] | None = None

    def batch_loss(self, pool: ScenePool) -> Tensor:
        """The v-prediction loss of a random batch of the pool, timesteps stratified over the batch."""
        options, device = self.options, self.device
        rows = torch.randint(0, len(pool.images), (options.batch,), device=device)
        latents = F.pixel_unshuffle(pool.images[rows].float() / 127.5 - 1, 2)
        dropped = torch.rand(options.batch, 1, device=device) < options.dropout
        tokens = torch.where(dropped, self.empty, pool.tokens[rows])
        spread = torch.arange(options.batch, device=device) + torch.rand(options.batch, device=device)
        t = (spread * (TRAIN_STEPS / options.batch)).long().clamp(max=TRAIN_STEPS - 1)
        signal, sigma = self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]
        noise = torch.randn_like(latents)
        noisy = (signal * latents + sigma * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = self.run(noisy, t, encoder_hidden_states=self.text(tokens)).sample
        return F.mse_loss(velocity.float(), signal * noise - sigma * latents)

    @torch.no_grad()
    def update(self) -> None:
        """Clip, AdamW and moving average, over lists of tensors; no value goes to the host."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.count += 1
        torch._foreach_lerp_(self.first, grads, 0.1)
        torch._foreach_mul_(self.second, 0.99)
        torch._foreach_addcmul_(self.second, grads, grads, 0.01)
        scale = torch._foreach_div(self.second, 1 - 0.99**self.count)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        change = torch._foreach_div(self.first, scale)
        torch._foreach_mul_(change, -self.rate / (1 - 0.9**self.count))
        torch._foreach_mul_(self.parameters, 1 - 0.01 * self.rate)
        torch._foreach_add_(self.parameters, change)
        torch._foreach_mul_(self.average, self.keep)
        torch._foreach_add_(self.average, torch._foreach_mul(self.parameters, 1 - self.keep))

    def prepare(self, pool: ScenePool) -> None:
        """Make the step; on CUDA, warm it up (with a rate of 0) and record it as a graph."""

        def step() -> None:
            torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
            loss = self.batch_loss(pool)
            loss.backward()
            self.loss.copy_(loss.detach())
            self.update()

        self.step_ = step
        if self.device.type != "cuda":
            return
        kept = [
            tensor.detach().clone()
            for tensor in (*self.parameters, *self.average, *self.first, *self.second, self.count)
        ]
        self.keep.fill_(1.0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        with torch.no_grad():
            live = (*self.parameters, *self.average, *self.first, *self.second, self.count)
            for tensor, before in zip(live, kept, strict=True):
                tensor.copy_(before)
        self.step_ = graph.replay

    def step(self, fraction: float) -> None:
        """One iteration. Args: fraction of the whole training that is over, for the learning rate."""
        warm = min(1.0, (self.iteration + 1) / 500)
        self.rate.fill_(self.options.rate * warm * max(0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))), 0.01))
        self.keep.fill_(min(self.options.decay, (1 + self.iteration) / (10 + self.iteration)))
        if self.step_ is None:
            raise ArgumentError(
                "a step is prepared before it runs", seen={"prepared": False}, do="call prepare(pool) first"
            )
        self.step_()
        self.iteration += 1

    def save(self, folder: Path) -> None:
        """Write a checkpoint: weights, average and AdamW state in files of at most 15 MiB, and its position."""
        kinds = (
            ("weights", self.parameters, torch.float32),
            ("average", self.average, torch.float16),
            ("first", self.first, torch.bfloat16),
            ("second", self.second, torch.bfloat16),
        )
        tensors = {f"{kind}/{n}": t.to(p) for kind, ts, p in kinds for n, t in zip(self.names, ts, strict=True)}
        shards: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > _SHARD_BYTES:
                shards.append({})
            shards[-1][name] = tensor
        for number, shard in enumerate(shards):
            write_tensors(folder / f"state_{number}.safetensors", shard)
        position = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "count": int(self.count),
            "shards": len(shards),
        }
        write_json(folder / "state.json", position)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        position = read_json(folder / "state.json")
        tensors: dict[str, Tensor] = {}
        for number in range(position["shards"]):
            tensors |= read_tensors(folder / f"state_{number}.safetensors")
        kinds = {"weights": self.parameters, "average": self.average, "first": self.first, "second": self.second}
        for kind, values in kinds.items():
            for name, value in zip(self.names, values, strict=True):
                value.copy_(tensors[f"{kind}/{name}"])
        self.iteration, self.seconds = position["iteration"], position["seconds"]
        self.count.fill_(position["count"])
        torch.manual_seed(self.options.seed + self.iteration)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as they ship: fp16, the UNet in diffusers' layout."""
        average = dict(zip(self.names, self.average, strict=True))
        unet, text = new_unet(), TextEncoder()
        unet.load_state_dict({n[5:]: t for n, t in average.items() if n.startswith("unet.")})
        text.load_state_dict({n[5:]: t for n, t in average.items() if n.startswith("text.")})
        unet.save_config(folder / "unet")
        save_half(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
        save_half(text, folder / "text_encoder" / "model.safetensors")


def _alphas_cumprod() -> list[float]:
    from diffusers import DDPMScheduler

    from clockwork_hooks.demo.model import SCHEDULE

    scheduler: Any = DDPMScheduler(**SCHEDULE)
    values: list[float] = scheduler.alphas_cumprod.tolist()
    return values


def train_generator(options: Options, *, checkpoint: Path, weights: Path, log: Log, resume: bool) -> Trainer:
    """Train until the time is over, saving a checkpoint and the shippable weights as it goes.

    Args:
        options: how to train.
        checkpoint: folder of the checkpoint.
        weights: folder for the fp16 weights of the moving average.
        log: takes one record every `log_every` iterations.
        resume: go on from the checkpoint, if there is one.

    Returns:
        The trainer, after its last step.
    """
    trainer = Trainer(options)
    if resume and (checkpoint / "state.json").exists():
        trainer.load(checkpoint)
    pool = ScenePool.draw(options.pool, options.seed + 1000 + trainer.iteration, options.device)
    trainer.prepare(pool)
    log({"stage": "generator", "ready": True, "iteration": trainer.iteration, "batch": options.batch})
    before, started, saved = trainer.seconds, time.monotonic(), time.monotonic()
    budget = options.minutes * 60
    while trainer.seconds < budget:
        trainer.step(trainer.seconds / budget)
        if trainer.iteration % options.log_every == 0:
            loss = float(trainer.loss)  # waits for the device
            trainer.seconds = before + time.monotonic() - started
            log(
                {
                    "stage": "generator",
                    "iteration": trainer.iteration,
                    "loss": loss,
                    "seconds": round(trainer.seconds, 1),
                }
            )
        if trainer.iteration % options.refresh_every == 0:
            pool.refresh(options.pool // 16)
        if time.monotonic() - saved > options.save_every:
            trainer.save(checkpoint)
            trainer.export(weights)
            saved = time.monotonic()
    trainer.save(checkpoint)
    trainer.export(weights)
    return trainer
