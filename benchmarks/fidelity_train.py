"""The training side of `benchmarks/fidelity.py`: a group's adaptors on the same trajectories, saved one a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity_bench import Bench
from benchmarks.fidelity_plan import Group, Row, Trained
from clockwork_hooks import adaptors as kinds
from clockwork_hooks.demo.captions import decode, write_captions
from clockwork_hooks.demo.model import LATENT_SHAPE, DemoModel, to_latents
from clockwork_hooks.demo.scenes import draw_split, render_bytes
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.training import Student, distill

__all__ = ["Prompts", "load", "student_errors", "train"]


@dataclass
class Prompts:
    """Training captions, by number: their hidden states and their rendered scenes wait on the device.

    Attributes:
        hidden: (N, 18, 128).
        empty: (1, 18, 128), of the empty prompt.
        images: (N, 3, 64, 64) uint8, for forward-noise training; None where it is not asked for.
    """

    model: DemoModel
    hidden: Tensor
    empty: Tensor
    images: Tensor | None

    @classmethod
    def draw(cls, model: DemoModel, count: int, *, images: bool, seed: int = 11) -> Prompts:
        """Scenes of the training combinations, so none that the evaluation asks for."""
        scenes = draw_split(count, seed, test=False)
        texts = decode(write_captions(scenes, seed))
        parts = [model.encode_prompts(texts[at : at + 4096], guided=False) for at in range(0, count, 4096)]
        pictures = render_bytes(scenes, model.device) if images else None
        return cls(model, torch.cat(parts), model.encode_prompts([""], guided=False), pictures)

    def generate(self, batch: Sequence[int], *, group: Group) -> None:
        """The group's sampler, from fresh noise."""
        told = self.hidden[list(batch)]
        noise = torch.randn(len(batch), *LATENT_SHAPE, device=self.model.device)
        sampler = group.sampler
        self.model.denoise(
            noise,
            torch.cat([self.empty.expand_as(told), told]),
            steps=sampler.steps,
            guidance=sampler.guidance,
            scheduler=sampler.scheduler,
        )

    def clean(self, batch: Sequence[int]) -> Tensor:
        """Latents of the scenes, once for each guidance branch."""
        assert self.images is not None  # drawn for forward-noise training
        latents = to_latents(self.images[list(batch)].float() / 255)
        return torch.cat([latents, latents])

    def noised(self, clean: Tensor, noise: Tensor, time: float) -> Tensor:
        """The model's own forward process at a timestep; both branches get the same noise."""
        half = noise[: len(noise) // 2]
        level = self.model.scheduler("ddim").alphas_cumprod[round(time)].item()
        return math.sqrt(level) * clean + math.sqrt(1 - level) * torch.cat([half, half])


def make(trained: Trained, region: Any) -> Any:
    """A fresh adaptor, its weights drawn with its seed."""
    with torch.random.fork_rng():
        torch.manual_seed(trained.seed)
        kind = getattr(kinds, trained.kind)
        return kind.for_region(region, inputs=trained.inputs, **dict(trained.options))


def train(
    group: Group, pairs: Sequence[tuple[Trained, Row]], model: DemoModel, folder: Path, *,
    updates: int, batch: int, minutes: float, captions: int,
) -> dict[str, Any]:  # fmt: skip
    """Train adaptors of a group that share a way of training and a seed, and save each in fp16 under `folder`.

    Args:
        group: whose sampler and region.
        pairs: the adaptors, with the rows that say their schedules.
        model: in float32.
        folder: of all adaptors.
        updates: gradient steps of each; what is trained for fewer steps a trajectory sees more trajectories.
        batch: prompts in a trajectory.
        minutes: at most.
        captions: different training captions.

    Returns:
        What `distill` tells about the run, without the losses in full.
    """
    mode, seed = pairs[0][0].mode, pairs[0][0].seed
    prompts = Prompts.draw(model, captions, images=mode == "forward_noise")
    bench = Bench(model, ((" ".join(["a", "red", "circle"]),),), (), ())
    region = bench.region(group)
    served = max(_adapted(row.schedule, group.sampler.steps) for _, row in pairs)
    students = {
        trained.name.replace("-", "_"): Student(make(trained, region), loss=trained.loss, schedule=row.schedule)
        for trained, row in pairs
    }
    images = {"images": prompts.clean, "add_noise": prompts.noised} if mode == "forward_noise" else {}
    result = distill(
        model.unet, students, partial(prompts.generate, group=group), prompts=range(captions), region=region,
        mode=mode, guidance=group.sampler.guidance, progress=False, trajectories=math.ceil(updates / served),
        minutes=minutes, batch=batch, lr=1e-3, decay="cosine", warmup=0.05, hold=2, buffer_gb=8, tf32=True, seed=seed,
        **images,
    )  # fmt: skip
    told = result.to_dict()
    for trained, row in pairs:
        adaptor = result.students[trained.name.replace("-", "_")].adaptor
        facts = {**asdict(group.sampler), "schedule": str(row.schedule), "loss": trained.loss, "mode": mode}
        adaptor.facts = {**adaptor.facts, **facts}
        adaptor.half().save_pretrained(folder / trained.name)
    for student in told["students"].values():
        student.pop("losses")
    return told


def load(folder: Path, trained: Trained, device: Any, dtype: torch.dtype) -> Any:
    """A saved adaptor, ready for use."""
    kind = getattr(kinds, trained.kind)
    return kind.from_pretrained(folder / trained.name).to(device=device, dtype=dtype)


@torch.no_grad()
def student_errors(
    group: Group, row: Row, bench: Bench, adaptor: Any, prompts: Sequence[str]
) -> dict[str, dict[int, float]]:
    """How wrong an adaptor is where its own sampling leads it, step by step.

    The student samples; at each of its adaptor steps the full pass says what the region would have emitted there.

    Returns:
        "feature": step → ‖made - true‖ / ‖true‖ of the region's exit; "output": the same of the guided output.
    """
    from clockwork_hooks.training.trajectory import Needs, TrajectoryRecorder

    recorder = TrajectoryRecorder(bench.model.unet, region=bench.region(group))
    try:
        trajectory = recorder.record(
            lambda batch: bench.sample(tuple(batch), 0, group.sampler),
            list(prompts),
            student=(adaptor, row.schedule),
            needs=lambda step: Needs(True, False, False, True),
        )
    finally:
        recorder.remove()
    found: dict[str, dict[int, float]] = {"feature": {}, "output": {}}
    for step in trajectory.steps:
        for call in step.calls:
            if call.student_exit is None:
                continue
            found["feature"][step.step] = _relative(call.student_exit, call.exit)
            both = (_guided(call.student_output, group), _guided(call.output, group))
            found["output"][step.step] = _relative(*both)
    return found


def _guided(output: Tensor, group: Group) -> Tensor:
    plain, told = output.float().chunk(2)
    return plain + group.sampler.guidance * (told - plain)


def _relative(made: Tensor, true: Tensor) -> float:
    return float((made.float() - true.float()).norm() / true.float().norm())


def _adapted(schedule: Schedule, steps: int) -> int:
    return steps - schedule.full_steps(steps)


def by_mode(group: Group) -> Mapping[str, list[tuple[Trained, Row]]]:
    """The group's adaptors by their way of training: each way is a run of its own."""
    found: dict[str, list[tuple[Trained, Row]]] = {}
    for trained, row in group.trained:
        found.setdefault(trained.mode, []).append((trained, row))
    return found
