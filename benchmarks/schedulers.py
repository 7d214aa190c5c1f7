"""Which passes does each scheduler of diffusers get, as it is and with its steps declared? Writes docs/schedulers.md.

    python -m benchmarks.schedulers --out docs/schedulers.md

Eight steps at clock 2, a small UNet with random weights: passes depend on times and calls, not on what is predicted.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.report import Table, table

STEPS = 8
SHAPE = (1, 2, 8, 8)
TOKENS = "its samples are tokens"
SKIPPED = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "VQDiffusionScheduler": TOKENS,
    "HeliosDMDScheduler": "takes its video pipeline's own stages",
    "HeliosScheduler": "takes its video pipeline's own stages",
    "PiflowScheduler": "takes a model that predicts a grid of policies",
    "RFD4ProteinaScheduler": "its samples are proteins",
}

Model = Callable[[Tensor, Any], Tensor]
Begin = Callable[[], None]


def rollout(name: str, model: Model, begin: Begin, *, steps: int = STEPS, seed: int = 0) -> None:
    """One trajectory with the diffusers scheduler of this name.

    Args:
        name: its class name.
        model: what calls the UNet with a sample (1, 2, 8, 8) and a time.
        begin: called before the evaluations of each denoising step: the loop knows them.
        steps: how many.
        seed: of the noise.
    """
    import diffusers

    torch.manual_seed(seed)
    scheduler = getattr(diffusers, name)()
    _LOOPS.get(name, _ordinary)(scheduler, model, begin, steps)


def _ordinary(scheduler: Any, model: Model, begin: Begin, steps: int) -> None:
    options = {"intermediate_timesteps": None} if type(scheduler).__name__ == "SCMScheduler" else {}
    scheduler.set_timesteps(steps, **options)
    x = torch.randn(SHAPE) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps[: -1 if options else None]:
        if getattr(scheduler, "state_in_first_order", True):
            begin()
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        made = scheduler.step(model(scaled, t), t, x)
        x = made[0] if isinstance(made, tuple) else made.prev_sample


def _karras_ve(scheduler: Any, model: Model, begin: Begin, steps: int) -> None:
    """Karras et al. 2022, algorithm 2: churn, a step, a correction."""
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        begin()
        now, then = scheduler.schedule[t], scheduler.schedule[t - 1] if t > 0 else torch.tensor(0.0)
        noisy, hat = scheduler.add_noise_to_input(x, now)
        slope = model((noisy + 1) / 2, hat / 2)
        made = scheduler.step(slope, hat, then, noisy)
        if then > 0:
            other = model((made.prev_sample + 1) / 2, then / 2)
            made = scheduler.step_correct(other, hat, then, noisy, made.prev_sample, made.derivative)
        x = made.prev_sample


def _repaint(scheduler: Any, model: Model, begin: Begin, steps: int) -> None:
    """Lugmayr et al. 2022: noise is added again and again, on the way down."""
    scheduler.set_timesteps(steps, jump_length=2, jump_n_sample=2)
    original, mask, x = torch.randn(SHAPE), torch.ones(SHAPE).tril(), torch.randn(SHAPE)
    last = scheduler.timesteps[0] + 1
    for t in scheduler.timesteps:
        if t < last:
            begin()
            x = scheduler.step(model(x, t), t, x, original, mask).prev_sample
        else:
            x = scheduler.undo_step(x, last)
        last = t


def _score_sde_ve(scheduler: Any, model: Model, begin: Begin, steps: int) -> None:
    """Song et al. 2021: a correction at the same time before each prediction."""
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    x = torch.randn(SHAPE) * scheduler.init_noise_sigma
    for k, t in enumerate(scheduler.timesteps):
        begin()
        times = scheduler.sigmas[k] * torch.ones(len(x))
        for _ in range(scheduler.config.correct_steps):
            x = scheduler.step_correct(model(x, times), x).prev_sample
        x = scheduler.step_pred(model(x, times), t, x).prev_sample


def _cogvideox_dpm(scheduler: Any, model: Model, begin: Begin, steps: int) -> None:
    scheduler.set_timesteps(steps)
    x, old = torch.randn(SHAPE) * scheduler.init_noise_sigma, None
    for k, t in enumerate(scheduler.timesteps):
        begin()
        back = scheduler.timesteps[k - 1] if k else None
        x, old = scheduler.step(model(x, t), old, t, back, x, return_dict=False)


def _wuerstchen(scheduler: Any, model: Model, begin: Begin, steps: int) -> None:
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps[:-1]:
        begin()
        ratio = t.expand(len(x))
        x = scheduler.step(model(x, ratio), ratio, x).prev_sample


_LOOPS: dict[str, Callable[[Any, Model, Begin, int], None]] = {
    "KarrasVeScheduler": _karras_ve,
    "RePaintScheduler": _repaint,
    "ScoreSdeVeScheduler": _score_sde_ve,
    "CogVideoXDPMScheduler": _cogvideox_dpm,
    "DDPMWuerstchenScheduler": _wuerstchen,
}


def names() -> list[str]:
    """All schedulers of the installed diffusers."""
    import diffusers

    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name != "FlaxScheduler")


def passes(name: str, *, declared: bool) -> tuple[str, str, str]:
    """(passes, one group of letters a step; what the schedule wants; why they differ) of one trajectory."""
    unet = _unet()
    with ch.wrap(unet, clock=2) as cw, torch.no_grad():
        made: list[str] = []

        def begin() -> None:
            made.append("")
            if declared:
                cw.step()

        def model(sample: Tensor, time: Any) -> Tensor:
            before = cw.stats.adaptor_passes
            output: Tensor = unet(sample, time).sample
            made[-1] += "A" if cw.stats.adaptor_passes > before else "F"
            return output

        rollout(name, model, begin)
        wanted = [("F" if cw.schedule.is_full(k) else "A") * len(calls) for k, calls in enumerate(made, 1)]
        return " ".join(made), " ".join(wanted), "" if made == wanted else _why(cw, len(made))


def _why(cw: ch.ClockworkWrapper, steps: int) -> str:
    found = [reason for reason in cw.stats.reasons if reason not in ("first step", "scheduled")]
    if len(cw.stats.trajectories) > 1:
        found.append("times that rise begin a trajectory")
    if cw.stats.trajectories[-1].steps != steps:
        found.append("evaluations at other times count as steps")
    return "; ".join(found)


def _unet() -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    channels = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8, 32), "norm_num_groups": 8}
    return UNet2DModel(8, **channels, **blocks, layers_per_block=1, add_attention=False).eval()


def make() -> str:
    """The page."""
    import diffusers

    rows = []
    for name in names():
        if name in SKIPPED:
            rows.append((name, "", "", f"not for a UNet like this: {SKIPPED[name]}"))
            continue
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            (plain, wanted, why), (told, _, but) = (passes(name, declared=declared) for declared in (False, True))
        notes = [f"as it is: {why}" if why else "", f"declared: {but}" if but else ""]
        marks = [f"{made}{' ✓' if made == wanted else ''}" for made in (plain, told)]
        rows.append((name, *marks, ". ".join(filter(None, notes))))
    page: Table = table(
        "Passes of eight steps at clock 2", ("scheduler", "as it is", "declared", "why not exact"), rows
    )
    return f"""# The schedulers of diffusers

F is a full pass, A an adaptor pass, one group of letters a denoising step; ✓ where the passes are exactly the
schedule's. "As it is": `wrap(unet)` and nothing else. "Declared": `cw.step()` before the evaluations of each step,
as `clockwork_hooks.diffusers.wrap_pipeline` does for pipelines. [timeline.md](timeline.md) explains the reasons.

Made by `python -m benchmarks.schedulers --out docs/schedulers.md` with diffusers {diffusers.__version__}.

{page.to_markdown()}
"""


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/schedulers.md"), help="the page to write")
    parser.parse_args().out.write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
