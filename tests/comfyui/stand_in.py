"""A stand-in for ComfyUI where there is none: written anew, with the calling convention that the node meets there.

What it shares with the real one: clones that share a diffusion model, wrappers around a run, an evaluation and a call,
conditions that are batched where their shapes agree, new dictionaries of options in every call, windows, areas, prompts
for a part of the sampling, guidance that calls the model once more, and weights that are patched for a run.
"""

from __future__ import annotations

import copy
import itertools
import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

EXIT = "up"


class UNet(nn.Module):
    """One level below the highest; time and text matter inside and outside of it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.time, self.text, self.inner_text = nn.Linear(1, 32), nn.Linear(16, 32), nn.Linear(16, 64)
            self.stem, self.down = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 64, 4, 2, 1)
            self.body, self.up = nn.Conv2d(64, 64, 3, padding=1), nn.ConvTranspose2d(64, 64, 4, 2, 1)
            self.out = nn.Conv2d(96, 4, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        control: Any = None,
        transformer_options: Any = None,
    ) -> Tensor:
        transformer_options["original_shape"] = list(x.shape)  # the model writes to what it is given
        emb = self.time(timesteps[:, None] / 1000).sin() + self.text(context).mean(1)
        skip = self.stem(x) + emb[:, :, None, None]
        inner = self.body(self.down(skip).tanh() + self.inner_text(context).mean(1)[:, :, None, None])
        h = self.up(inner.tanh())
        for patch in transformer_options.get("patches", {}).get("output_block_patch", ()):
            h, skip = patch(h, skip, transformer_options)
        output: Tensor = self.out(torch.cat([h, skip], 1))
        return output


class Sampling:
    """Noise levels of a variance-exploding model."""

    def percent_to_sigma(self, share: float) -> float:
        return 1e9 if share <= 0 else 0.0 if share >= 1 else 14.6 ** (1 - 2 * share)

    def timestep(self, sigma: Tensor) -> Tensor:
        return (300 * (sigma + 1e-3).log10() + 600).round()


class Executor:
    """Calls wrappers one inside the other, the original innermost."""

    def __init__(self, original: Callable[..., Any], owner: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs) if self.wrappers else self.original(*args, **kwargs)


def _around(kind: str, original: Callable[..., Any], owner: Any, wrappers: Any) -> Executor:
    return Executor(original, owner, [one for ones in wrappers.get(kind, {}).values() for one in ones])


class Patcher:
    """A model and what is put on it; clones share the model."""

    def __init__(self, model: Any) -> None:
        self.model, self.wrappers, self.model_options, self.patches = model, {}, {"transformer_options": {}}, {}

    def clone(self) -> Patcher:
        clone = Patcher(self.model)
        clone.wrappers = {kind: {key: list(ones) for key, ones in by.items()} for kind, by in self.wrappers.items()}
        clone.model_options, clone.patches = copy.deepcopy(self.model_options), dict(self.patches)
        return clone

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def set_model_output_block_patch(self, patch: Any) -> None:
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault("output_block_patch", []).append(
            patch
        )


class Model:
    """What ComfyUI calls a base model."""

    def __init__(self) -> None:
        self.diffusion_model, self.model_sampling = UNet().eval().requires_grad_(False), Sampling()
        self.current_patcher: Any = None

    def apply_model(self, x: Tensor, t: Tensor, **more: Any) -> Any:
        wrappers = more["transformer_options"].get("wrappers", {})
        return _around("apply_model", self._apply_model, self, wrappers)(x, t, None, more.pop("c_crossattn"), **more)

    def _apply_model(self, x: Tensor, t: Tensor, _: Any, text: Tensor, control: Any = None, **more: Any) -> Tensor:
        sigma = t.view(-1, 1, 1, 1)
        noise = self.diffusion_model(
            x / (sigma**2 + 1).sqrt(), self.model_sampling.timestep(t), context=text, control=control, **more
        )
        return x - sigma * noise


def _all(args: Any) -> Any:
    return calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])


def _windows(conds: Any, x: Tensor, options: Any, run: Callable[..., Any]) -> Any:
    handler = options.get("context_handler")
    if handler is None:
        return run(conds, x, options)
    sums, counts = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
    for begin in range(0, len(x) - handler.length + 1, handler.length // 2):
        window = SimpleNamespace(index_list=list(range(begin, begin + handler.length)))
        options["transformer_options"]["context_window"] = window
        for total, one in zip(sums, run(conds, x[window.index_list], options), strict=True):
            total[window.index_list] += one
        counts[window.index_list] += 1
    return [total / counts for total in sums]


def calc_cond_batch(model: Any, conds: Any, x: Tensor, sigma: Tensor, options: Any) -> Any:
    """Predictions for each list of conditions; those whose shapes agree are one call of the model."""

    def run(conds: Any, x: Tensor, options: Any) -> Any:
        jobs = [
            (k, one)
            for k, ones in enumerate(conds)
            for one in ones or ()
            if one["low"] <= float(sigma[0]) <= one["high"]
        ]
        sums, counts = [torch.zeros_like(x) for _ in conds], [torch.full_like(x, 1e-9) for _ in conds]
        while jobs:
            shape = jobs[0][1]["text"].shape, jobs[0][1]["area"], jobs[0][1]["hooks"]
            batch = [job for job in jobs if (job[1]["text"].shape, job[1]["area"], job[1]["hooks"]) == shape]
            batch = batch[-1:] if options.get("little_memory", bool)() else batch
            jobs = [job for job in jobs if not any(job is one for one in batch)]
            high, wide, top, left = shape[1] or (*x.shape[2:], 0, 0)
            part = (..., slice(top, top + high), slice(left, left + wide))
            model.current_patcher = SimpleNamespace(current_hooks=shape[2])
            Hooks.apply(shape[2], model.diffusion_model, float(sigma[0]))
            transformer_options = dict(options["transformer_options"])  # a new one in each call
            transformer_options |= {
                "cond_or_uncond": [k for k, _ in batch],
                "uuids": [one["uuid"] for _, one in batch],
                "sigmas": sigma.clone(),
            }
            text = torch.cat([one["text"].expand(len(x), -1, -1) for _, one in batch])
            times = torch.cat([sigma[: len(x)]] * len(batch))
            predicted = model.apply_model(
                torch.cat([x[part]] * len(batch)), times, c_crossattn=text, transformer_options=transformer_options
            )
            for (k, one), output in zip(batch, predicted.chunk(len(batch)), strict=True):
                sums[k][part] += output * one["strength"]
                counts[k][part] += one["strength"]
        return [total / count for total, count in zip(sums, counts, strict=True)]

    return _windows(conds, x, options, run)


class Guider:
    """Classifier-free guidance."""

    def __init__(self, patcher: Patcher, positive: Any, negative: Any, cfg: float) -> None:
        self.model_patcher, self.cfg = patcher, cfg
        self.conds = [_converted(positive, patcher), _converted(negative, patcher)]
        self.model_options = copy.copy(patcher.model_options)
        transformer_options = self.model_options["transformer_options"] = copy.copy(
            self.model_options["transformer_options"]
        )
        transformer_options["wrappers"] = patcher.wrappers

    def __call__(self, x: Tensor, sigma: Tensor, *, model_options: Any) -> Any:
        return _around(
            "predict_noise", self.predict_noise, self, self.model_options["transformer_options"]["wrappers"]
        )(x, sigma, model_options)

    def predict_noise(self, x: Tensor, sigma: Tensor, options: Any) -> Tensor:
        model = self.model_patcher.model
        conds = [self.conds[0], None if self.cfg == 1 else self.conds[1]]
        both = options.get("sampler_calc_cond_batch_function", _all)(
            {"model": model, "conds": conds, "input": x, "sigma": sigma, "model_options": options}
        )
        guided: Tensor = both[0] if self.cfg == 1 else both[1] + self.cfg * (both[0] - both[1])
        if "guide" in options:
            (more,) = calc_cond_batch(model, [self.conds[0]], 0.9 * x, sigma, options)
            guided = guided + options["guide"] * (both[0] - more)
        return guided

    def sample(self, sampler: Any, sigmas: Tensor, x: Tensor, callback: Any) -> Any:
        options = {**self.model_options}
        transformer_options = options["transformer_options"] = {
            **options["transformer_options"],
            "sample_sigmas": sigmas,
        }
        run = _around("sampler_sample", sampler.sample, sampler, transformer_options["wrappers"])
        return run(self, sigmas, {"model_options": options}, callback, x)


def _converted(conds: Any, patcher: Patcher) -> Any:
    sampling = patcher.get_model_object("model_sampling")
    return [
        {
            "text": text,
            "uuid": uuid.uuid4(),
            "area": more.get("area"),
            "hooks": more.get("hooks"),
            "strength": more.get("strength", 1.0),
            "high": sampling.percent_to_sigma(more.get("start_percent", 0.0)),
            "low": sampling.percent_to_sigma(more.get("end_percent", 1.0)),
        }
        for text, more in conds
    ]


class KSAMPLER:
    """A sampler by its function."""

    def __init__(self, function: Any) -> None:
        self.sampler_function = function

    def sample(self, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, x: Tensor) -> Any:
        def report(info: Any) -> None:
            if callback is not None:
                callback(info["i"], info["denoised"], x, len(sigmas) - 1)

        model = lambda x, sigma: guider(x, sigma * x.new_ones(len(x)), **extra_args)  # noqa: E731
        return self.sampler_function(model, x, sigmas, report)


def sample_euler(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        denoised = model(x, now)
        callback({"i": i, "denoised": denoised})
        x = x + (x - denoised) / now * (then - now)
    return x


def sample_heun(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        denoised = model(x, now)
        callback({"i": i, "denoised": denoised})
        slope = (x - denoised) / now
        if then > 0:
            other = x + slope * (then - now)
            slope = (slope + (other - model(other, then)) / then) / 2
        x = x + slope * (then - now)
    return x


def sample_dpm_2(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        denoised = model(x, now)
        callback({"i": i, "denoised": denoised})
        slope = (x - denoised) / now
        if then > 0:
            middle = (now * then).sqrt()
            other = x + slope * (middle - now)
            slope = (other - model(other, middle)) / middle
        x = x + slope * (then - now)
    return x


SAMPLERS = {"euler": sample_euler, "heun": sample_heun, "dpm_2": sample_dpm_2}


def model() -> Patcher:
    return Patcher(Model())


@torch.no_grad()
def sample(
    patcher: Patcher,
    sampler: Any = "euler",
    *,
    steps: int = 6,
    cfg: float = 5.0,
    batch: int = 1,
    size: int = 16,
    positive: Any = None,
    negative: Any = None,
    seed: int = 1,
    latent: Tensor | None = None,
    denoise: float = 1.0,
    callback: Any = lambda *_: None,
) -> Tensor:
    sigmas = torch.cat([torch.logspace(1.16, -1.5, int(steps / denoise))[-steps:], torch.zeros(1)])
    noise = torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))
    x = noise * sigmas[0] + (0 if latent is None else latent)
    state, unet = {}, patcher.model.diffusion_model
    for key, change in patcher.patches.items():  # the model is loaded
        weight = unet.get_parameter(key)
        state[key] = weight.clone()
        weight.add_(change)
    try:
        guider = Guider(patcher, positive or cond(1), negative or cond(2), cfg)
        return guider.sample(KSAMPLER(SAMPLERS.get(sampler, sampler)), sigmas, x, callback)
    finally:
        for key, weight in state.items():
            unet.get_parameter(key).copy_(weight)


def cond(seed: int, tokens: int = 7, **more: Any) -> Any:
    return [[torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed)), dict(more)]]


def windows(patcher: Patcher) -> Patcher:
    clone = patcher.clone()
    clone.model_options["context_handler"] = SimpleNamespace(length=3)
    return clone


def skips(patcher: Patcher, when: Callable[[int], bool]) -> Patcher:
    """A clone that leaves the negative prompt out in some evaluations of each run."""
    clone, evaluations = patcher.clone(), Evaluations()

    def calc(args: Any) -> Any:
        if not when(evaluations.at):
            return _all(args)
        alone = _all({**args, "conds": [args["conds"][0], None]})
        return [alone[0], alone[0]]

    clone.model_options["sampler_calc_cond_batch_function"] = calc
    evaluations.watch(clone)
    return clone


def splits(patcher: Patcher, when: Callable[[int], bool]) -> Patcher:
    """A clone that has the memory for one condition a batch in some evaluations of each run."""
    clone, evaluations = patcher.clone(), Evaluations()
    evaluations.watch(clone)
    clone.model_options["little_memory"] = lambda: when(evaluations.at)
    return clone


class Evaluations:
    """Counts those of a run, from 0."""

    at = -1

    def watch(self, patcher: Any) -> None:
        """Count those of this patcher and of its clones."""
        patcher.add_wrapper_with_key("predict_noise", "evaluations", self.count)
        patcher.add_wrapper_with_key("sampler_sample", "evaluations", self.begin)

    def begin(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.at = -1
        return executor(*args, **kwargs)

    def count(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.at += 1
        return executor(*args, **kwargs)


def third_call(patcher: Patcher) -> Patcher:
    clone = patcher.clone()
    clone.model_options["guide"] = 0.3
    return clone


class Hooks:
    """Changes one element of the weights, past all counters, by as much as its keyframe says; back for other calls."""

    def __init__(self, strengths: dict[float, float]) -> None:
        self.strengths, self.hooks = strengths, [SimpleNamespace(strength=0.0)]

    @staticmethod
    def apply(hooks: Hooks | None, unet: Any, sigma: float) -> None:
        if hooks is not None:
            hooks.hooks[0].strength = next(
                strength for low, strength in sorted(hooks.strengths.items(), reverse=True) if sigma >= low
            )
        unet.body.bias.data[5] = 0.0 if hooks is None else hooks.hooks[0].strength


def keyframed(prompt: Any) -> Any:
    """The prompt with a LoRA of its own that grows weaker in the second step."""
    return [[text, {**more, "hooks": Hooks({5.0: 1.0, 0.0: 0.3})}] for text, more in prompt]


def lora(patcher: Patcher) -> Patcher:
    clone, generator = patcher.clone(), torch.Generator().manual_seed(7)
    unet = patcher.model.diffusion_model
    for key in ("stem.weight", "body.weight"):
        clone.patches[key] = 0.05 * torch.randn(unet.get_parameter(key).shape, generator=generator)
    return clone
