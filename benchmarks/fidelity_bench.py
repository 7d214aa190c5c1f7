"""The evaluation side of `benchmarks/fidelity.py`: one group's rows with `ch.evaluate`, everything on the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from benchmarks.fidelity_plan import Group, Row, Sampler
from clockwork_hooks.analysis.evaluation import Evaluation, Variant
from clockwork_hooks.demo.captions import parse
from clockwork_hooks.demo.evaluate import Attributes, held_out_prompts, reference_statistics
from clockwork_hooks.demo.model import LATENT_SHAPE, DemoModel, load_demo, to_images
from clockwork_hooks.metrics import Frechet, Paired

__all__ = ["Bench", "Judged"]


@dataclass(frozen=True, slots=True)
class Judged(Attributes):
    """`Attributes` that reads each batch of captions once."""

    def observe(self, images: Tensor, plain: Tensor | None, conditions: Any) -> Tensor:
        return Attributes.observe(self, images, plain, _parsed(conditions))


@functools.lru_cache(maxsize=64)
def _parsed(prompts: tuple[str, ...]) -> Any:
    return parse(prompts)


@dataclass
class Bench:
    """The demo model, held-out captions in batches, and the reference of the Fréchet distance.

    Attributes:
        model: UNet and text encoder in `dtype`.
        batches: captions, each batch sampled at once.
        seeds: evaluation seeds.
    """

    model: DemoModel
    batches: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...]
    metrics: tuple[Any, ...]
    _noise: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _hidden: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    _regions: dict[tuple[str | int, int], ch.Region] = field(default_factory=dict)

    @classmethod
    def make(cls, device: str, *, images: int, batch: int, seeds: int, dtype: torch.dtype) -> Bench:
        """Load the model and render the reference: at least 8,192 scenes, or as many as there are pictures."""
        model = load_demo(device, dtype)
        prompts = held_out_prompts(images)
        batches = tuple(tuple(prompts[at : at + batch]) for at in range(0, images, batch))
        reference = reference_statistics(model, images if images < 1024 else max(images, 8192))
        metrics = (Frechet(model.classifier.features, reference), Judged(model.classifier), Paired())
        return cls(model, batches, tuple(range(seeds)), metrics)

    def sample(self, prompts: tuple[str, ...], seed: int, sampler: Sampler, steps: int | None = None) -> Tensor:
        """Pictures of a batch; noise and hidden states are made once and kept on the device."""
        key = (len(prompts), seed)
        if key not in self._noise:
            self._noise[key] = self.model.noise(*key)
        if prompts not in self._hidden:
            self._hidden[prompts] = self.model.encode_prompts(prompts)
        latents = self.model.denoise(
            self._noise[key],
            self._hidden[prompts],
            steps=steps or sampler.steps,
            guidance=sampler.guidance,
            scheduler=sampler.scheduler,
        )
        return to_images(latents)

    def region(self, group: Group, batch: int | None = None) -> ch.Region:
        """The region that a group's adaptor passes skip, found for calls of this batch: wrappers need no trace."""
        size = 2 * (batch or len(self.batches[0]))
        key = (group.region, size)
        if key not in self._regions:
            device, dtype = self.model.device, self.model.text_encoder.norm.weight.dtype
            hidden = self.model.encode_prompts([""], guided=False).repeat(size, 1, 1)
            call = (torch.zeros(size, *LATENT_SHAPE, device=device, dtype=dtype), torch.tensor(1, device=device))
            if isinstance(group.region, int):
                found = ch.find_regions(self.model.unet, *call, encoder_hidden_states=hidden)[group.region]
            else:
                found = ch.find_region(self.model.unet, *call, cut=group.region, encoder_hidden_states=hidden)
            self._regions[key] = found
        return self._regions[key]

    def evaluate(self, group: Group, rows: Sequence[Row], adaptors: Mapping[str, Any]) -> Evaluation:
        """Measure rows of a group, and its plain row.

        Args:
            group: whose sampler and region.
            rows: which of its rows.
            adaptors: name of a trained adaptor → the module.
        """
        region = self.region(group)
        variants = {row.label: self.variant(row, group.sampler, region, adaptors) for row in rows}
        return ch.evaluate(
            self.model.unet,
            lambda prompts, seed: self.sample(prompts, seed, group.sampler),
            self.batches,
            variants,
            metrics=self.metrics,
            seeds=self.seeds,
        )

    def variant(self, row: Row, sampler: Sampler, region: ch.Region, adaptors: Mapping[str, Any]) -> Variant:
        """A row as `ch.evaluate` takes it."""

        def generate(prompts: tuple[str, ...], seed: int) -> Tensor:
            if row.deepcache is None:
                return self.sample(prompts, seed, sampler, row.steps)
            with deepcache(self.model, sampler, row.deepcache):
                return self.sample(prompts, seed, sampler, row.steps)

        if row.adaptor is None:
            return Variant(generate=generate)
        adaptor = row.adaptor if isinstance(row.adaptor, str) else adaptors[row.adaptor.name]
        return Variant({"adaptor": adaptor, "schedule": row.schedule, "region": region}, generate)

    def timed(self, variant: Variant, prompts: tuple[str, ...]) -> float:
        """Seconds that one batch takes, nothing else running."""
        assert variant.generate is not None  # `variant` always gives one
        with ch.wrap(self.model.unet, **variant.wrap) if variant.wrap else nullcontext():
            self._wait()
            started = time.perf_counter()
            variant.generate(prompts, 0)
            self._wait()
            return time.perf_counter() - started

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


@contextmanager
def deepcache(model: DemoModel, sampler: Sampler, branch: int) -> Iterator[None]:
    """The peer's own package on the same UNet: DeepCache 0.1.1 (arXiv 2312.00858), interval 2."""
    from DeepCache import DeepCacheSDHelper

    solver = model.scheduler(sampler.scheduler)
    solver.set_timesteps(sampler.steps)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=model.unet, scheduler=solver))
    helper.set_params(cache_interval=2, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
