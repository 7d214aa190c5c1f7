"""Retrain or measure the demo model: `python -m clockwork_hooks.demo.train --help`.

The generator is UNet and text encoder, trained jointly, with v-prediction and caption dropout. On CUDA the step
(drawing the batch, noise, both networks, backward, AdamW) is one graph; the moving average follows it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from clockwork_hooks.analysis.timing import device_name
from clockwork_hooks.demo.captions import MAX_TOKENS, encode, write_captions
from clockwork_hooks.demo.classifier import judge_classifier, train_classifier
from clockwork_hooks.demo.evaluate import evaluate, sweep_guidance
from clockwork_hooks.demo.model import GUIDANCE, SCHEDULE, TRAIN_STEPS, TextEncoder, load_demo, new_unet
from clockwork_hooks.demo.scenes import IMAGE_SIZE, draw_split, render_bytes
from clockwork_hooks.demo.weights import WEIGHTS, read_json, read_tensors, save_half, write_json, write_tensors
from clockwork_hooks.errors import ArgumentError

Log = Callable[[dict[str, Any]], None]
_SHARD_BYTES = 15 * 2**20
STORED = {"weights": torch.float32, "average": torch.float16, "first": torch.bfloat16, "second": torch.bfloat16}


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
    """Networks, their moving average, the optimizer and the step.

    Attributes:
        networks: "unet" and "text", which learn.
        average: the moving average of their weights.
        optimizer: AdamW of all of them.
        loss: of the last step, on the device.
        iteration: steps so far.
        seconds: of training so far, earlier runs included.
    """

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device = options, torch.device(options.device)
        unet = new_unet().to(self.device, memory_format=torch.channels_last)
        self.networks = nn.ModuleDict({"unet": unet, "text": TextEncoder().to(self.device)})
        self.average = AveragedModel(self.networks, multi_avg_fn=self._average)
        self.loss = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(),
            lr=torch.zeros((), device=self.device),  # a tensor, so that a recorded step reads it anew
            betas=(0.9, 0.99),
            capturable=self.device.type == "cuda",
        )
        for parameter in self.networks.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # at a rate of 0: makes the state that a checkpoint is loaded into
        for state in self.optimizer.state.values():
            state["step"].zero_()
        self.iteration, self.seconds = 0, 0.0
        self.predict: Any = torch.compile(unet, dynamic=False) if options.compile else unet
        self.empty = torch.from_numpy(encode([""])).to(self.device)
        cosine = torch.tensor(_alphas_cumprod(), device=self.device, dtype=torch.float64)
        self.signal, self.noise = cosine.sqrt().float(), (1 - cosine).sqrt().float()
        self.learn: Callable[[], None] | None = None

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
            text = self.networks["text"](tokens)
            velocity = self.predict(noisy, t, encoder_hidden_states=text).sample
        return F.mse_loss(velocity.float(), signal * noise - sigma * latents)

    def update(self) -> None:
        """Clip the gradients and change the weights; no value goes to the host."""
        nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()

    def _average(self, averaged: Any, current: Any, _count: Any) -> None:
        """Short at first, so that the random weights of the start are soon forgotten."""
        keep = min(self.options.decay, (1 + self.iteration) / (10 + self.iteration))
        torch._foreach_lerp_(averaged, current, 1 - keep)

    def prepare(self, pool: ScenePool) -> None:
        """Make the step; on CUDA, warm it up (with a rate of 0) and record it as a graph."""

        def learn() -> None:
            self.optimizer.zero_grad(set_to_none=False)
            loss = self.batch_loss(pool)
            loss.backward()
            self.loss.copy_(loss.detach())
            self.update()

        self.learn = learn
        if self.device.type != "cuda":
            return
        live = [*self._state().values(), *(state["step"] for state in self.optimizer.state.values())]
        before = [tensor.detach().clone() for tensor in live]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                learn()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            learn()
        with torch.no_grad():
            for tensor, value in zip(live, before, strict=True):
                tensor.copy_(value)
        self.learn = graph.replay

    def step(self, fraction: float) -> None:
        """One iteration. Args: fraction of the whole training that is over, for the learning rate."""
        if self.learn is None:
            raise ArgumentError(
                "a step has to be prepared before it runs", seen={"prepared": False}, do="call prepare(pool) first"
            )
        warm = min(1.0, (self.iteration + 1) / 500)
        rate = self.options.rate * warm * max(0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))), 0.01)
        self.optimizer.param_groups[0]["lr"].fill_(rate)
        self.learn()
        self.average.update_parameters(self.networks)
        self.iteration += 1

    def _state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: weights, their average, and the optimizer's two moments."""
        tensors: dict[str, Tensor] = {}
        weights, average = self.networks.named_parameters(), self.average.module.parameters()
        for (name, weight), mean in zip(weights, average, strict=True):
            state = self.optimizer.state[weight]
            tensors |= {f"weights/{name}": weight, f"average/{name}": mean}
            tensors |= {f"first/{name}": state["exp_avg"], f"second/{name}": state["exp_avg_sq"]}
        return tensors

    def save(self, folder: Path) -> None:
        """Write a checkpoint in files of at most 15 MiB: the state in the precisions of `STORED`, and its position."""
        shards: list[dict[str, Tensor]] = [{}]
        for name, live in self._state().items():
            tensor = live.detach().to(STORED[name.partition("/")[0]])
            if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > _SHARD_BYTES:
                shards.append({})
            shards[-1][name] = tensor
        for number, shard in enumerate(shards):
            write_tensors(folder / f"state_{number}.safetensors", shard)
        write_json(folder / "state.json", {"iteration": self.iteration, "seconds": self.seconds, "shards": len(shards)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        position = read_json(folder / "state.json")
        tensors: dict[str, Tensor] = {}
        for number in range(position["shards"]):
            tensors |= read_tensors(folder / f"state_{number}.safetensors")
        for name, live in self._state().items():
            live.copy_(tensors[name])
        self.iteration, self.seconds = position["iteration"], position["seconds"]
        self.average.n_averaged.fill_(self.iteration)
        for state in self.optimizer.state.values():
            state["step"].fill_(self.iteration)
        torch.manual_seed(self.options.seed + self.iteration)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as they ship: fp16, the UNet in diffusers' layout."""
        unet, text = (self.average.module[name] for name in ("unet", "text"))  # type: ignore[index]
        unet.save_config(folder / "unet")
        save_half(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
        save_half(text, folder / "text_encoder" / "model.safetensors")


def _alphas_cumprod() -> list[float]:
    from diffusers import DDPMScheduler

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


@dataclass(slots=True)
class ScenePool:
    """Scenes ready for training.

    Attributes:
        images: (N, 3, 64, 64) uint8.
        tokens: (N, 18) int64.
        refreshed: how many scenes were drawn anew since the start.
    """

    images: Tensor
    tokens: Tensor
    rng: np.random.Generator
    refreshed: int = 0

    @classmethod
    def draw(cls, count: int, seed: int, device: torch.device | str) -> ScenePool:
        """Fill a pool with `count` scenes of the training combinations."""
        images = torch.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
        pool = cls(
            images, torch.zeros((count, MAX_TOKENS), dtype=torch.int64, device=device), np.random.default_rng(seed)
        )
        pool.refresh(count)
        pool.refreshed = 0
        return pool

    def refresh(self, count: int) -> None:
        """Replace the `count` oldest scenes by new ones: the stream is endless, the memory is not."""
        size = len(self.images)
        scenes = draw_split(count, self.rng, test=False)
        tokens = torch.from_numpy(write_captions(scenes, self.rng, leave_out=0.1))
        images = render_bytes(scenes, self.images.device)
        rows = (torch.arange(count, device=images.device) + self.refreshed) % size
        self.images[rows] = images
        self.tokens[rows] = tokens.to(images.device)
        self.refreshed += count


# -- the command line -----------------------------------------------------------------------------------------------


_ABOUT = """\
The demo model is trained in two parts, then measured:

  1. the attribute classifier, the judge (a minute on a GPU):
       python -m clockwork_hooks.demo.train classifier --weights out/weights
  2. the generator, UNet and text encoder (a quarter of an hour on an H200):
       python -m clockwork_hooks.demo.train generator --weights out/weights --checkpoint out/checkpoint --compile
  3. the results (two minutes):
       python -m clockwork_hooks.demo.train evaluate --weights out/weights

A stopped generator run goes on with --resume. Everything is safetensors and JSON; the log is JSON lines.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Args: arguments, without the program's name. Returns: the exit status."""
    options = _parser().parse_args(arguments)
    if str(options.device).startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    run: Callable[[argparse.Namespace], None] = options.run
    run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clockwork_hooks.demo.train", description=_ABOUT, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{classifier,generator,evaluate}")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
        sub.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the weights that ship")
        sub.add_argument("--seed", type=int, default=0, help="of everything drawn")
        return sub

    judge = command("classifier", _classifier, "train the attribute classifier and measure it")
    judge.add_argument("--minutes", type=float, default=1.2, help="training time")
    judge.add_argument("--batch", type=int, default=512, help="scenes an iteration")
    judge.add_argument("--scenes", type=int, default=400_000, help="different scenes")

    maker = command("generator", _generator, "train UNet and text encoder")
    maker.add_argument("--checkpoint", type=Path, default=Path("checkpoint"), help="folder of the resumable state")
    maker.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    maker.add_argument("--minutes", type=float, default=15.0, help="training time in all, over which the rate falls")
    maker.add_argument("--batch", type=int, default=512, help="scenes an iteration")
    maker.add_argument("--pool", type=int, default=1_000_000, help="scenes held ready on the device")
    maker.add_argument("--rate", type=float, default=8e-4, help="peak learning rate")
    maker.add_argument(
        "--compile", action="store_true", help="compile the UNet: two minutes at the start, faster after"
    )
    maker.add_argument("--log-every", type=int, default=100, help="iterations between log records")

    measure = command("evaluate", _evaluate, "measure attributes and Fréchet distance")
    measure.add_argument("--count", type=int, default=10_240, help="held-out captions")
    measure.add_argument("--steps", type=int, nargs="+", default=[8, 50], help="step counts")
    measure.add_argument("--guidance", type=float, default=None, help="scale (the model's own, if not given)")
    measure.add_argument(
        "--sweep", type=float, nargs="*", default=[], help="guidance scales to try first, 2048 captions"
    )
    measure.add_argument("--batch", type=int, default=1024, help="prompts at a time")
    measure.add_argument("--result", type=Path, default=Path("demo_model.json"), help="where the results go")
    return parser


def _classifier(options: argparse.Namespace) -> None:
    log = _logger(options.weights)
    classifier = train_classifier(
        device=options.device, seconds=60 * options.minutes, log=log, batch=options.batch, scenes=options.scenes,
        seed=options.seed,
    )  # fmt: skip
    save_half(classifier, options.weights / "classifier" / "model.safetensors")
    shares = judge_classifier(classifier)
    _note(options, "classifier", {"judged": shares})
    for name, row in shares.items():
        print(f"{name}: right {row['total']:.4f}, unreadable {row['unreadable']:.4f}")


def _generator(options: argparse.Namespace) -> None:
    names = {one.name for one in fields(Options)}
    trainer = train_generator(
        Options(**{name: value for name, value in vars(options).items() if name in names}),
        checkpoint=options.checkpoint,
        weights=options.weights,
        log=_logger(options.weights),
        resume=options.resume,
    )
    outcome = {"iterations": trainer.iteration, "seconds": round(trainer.seconds), "loss": float(trainer.loss)}
    _note(options, "generator", outcome)


def _evaluate(options: argparse.Namespace) -> None:
    model = load_demo(options.device, weights=options.weights)
    guidance = GUIDANCE if options.guidance is None else options.guidance
    result: dict[str, Any] = {"what": "the demo model, plain (no clockwork)", **_circumstances(options)}
    result |= {"captions": options.count, "scheduler": "dpm++ (2M), trailing", "guidance": guidance}
    result["classifier"] = judge_classifier(model.classifier)
    if options.sweep:
        result["sweep"] = sweep_guidance(model, options.sweep, steps=options.steps, batch=options.batch)
        for row in result["sweep"]:
            print(json.dumps(row), flush=True)
    result["plain"] = evaluate(model, steps=options.steps, count=options.count, guidance=guidance, batch=options.batch)
    write_json(options.result, result)
    print(json.dumps(result["plain"], indent=1))


def _note(options: argparse.Namespace, part: str, values: dict[str, Any]) -> None:
    """Write what a part's training was into training.json, beside what is there of the other part."""
    path = options.weights / "training.json"
    notes = read_json(path) if path.exists() else {}
    write_json(path, notes | {part: _circumstances(options) | values})


def _circumstances(options: argparse.Namespace) -> dict[str, Any]:
    import diffusers

    return {
        "command": " ".join(["python -m clockwork_hooks.demo.train", *sys.argv[1:]]),
        "seed": options.seed,
        "device": device_name(options.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _logger(folder: Path) -> Log:
    """A log that appends JSON lines to `training.log.jsonl` and prints them."""
    folder.mkdir(parents=True, exist_ok=True)

    def log(record: dict[str, Any]) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        with (folder / "training.log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return log


if __name__ == "__main__":
    sys.exit(main())
