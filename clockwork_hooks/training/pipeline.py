"""What `distill` needs to train an adaptor for a diffusers text-to-image pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clockwork_hooks.errors import ArgumentError, need


def pipeline_arguments(
    *,
    path: str | Path | None = None,
    pipe: Any = None,
    prompts: str | Path | Sequence[str],
    steps: int = 8,
    guidance: float = 7.5,
    scheduler: str | None = "DPMSolverMultistepScheduler",
    height: int | None = None,
    width: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of `distill` from a pipeline and prompts; nothing is decoded to pictures.

    Args:
        path: a diffusers folder, or the id of a repository.
        pipe: a pipeline that is loaded already, in the place of `path`; used as it is.
        prompts: a text file with a prompt a line, or a sequence of prompts.
        steps: denoising steps.
        guidance: classifier-free guidance scale; both branches run in one call, the unconditional one first.
        scheduler: class name of a diffusers scheduler; None keeps the pipeline's own.
        height, width: of the pictures, in pixels; None for the pipeline's own.
        dtype: "float32", "float16" or "bfloat16".
        device: where to train.

    Raises:
        ArgumentError: there is no pipeline, no prompt, no such scheduler or dtype.

    Source: arXiv 2312.08128, Sec. 5.1 (8 steps of DPM++, guidance 7.5).
    """
    need("pipelines are those of diffusers", "diffusers", "transformers", install="clockwork-hooks[diffusers]")
    import diffusers

    texts = read_prompts(prompts) if isinstance(prompts, (str, Path)) else prompts
    if pipe is None:
        kind = getattr(torch, dtype, None)
        if path is None or kind not in (torch.float32, torch.float16, torch.bfloat16):
            raise ArgumentError(
                "a pipeline has a path and a floating dtype",
                seen={"path": path, "dtype": dtype},
                do='pass path="folder of a diffusers pipeline", dtype="float16"',
            )
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=kind).to(device)
    if scheduler is not None:
        scheduler_class = getattr(diffusers, scheduler, None)
        if scheduler_class is None:
            raise ArgumentError(
                "a scheduler is a class of diffusers", seen={"scheduler": scheduler}, do="DPMSolverMultistepScheduler"
            )
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}

    def generate(batch: Sequence[str]) -> Any:
        return pipe(
            list(batch), num_inference_steps=steps, guidance_scale=guidance, output_type="latent", **size
        )  # its noise comes from torch's own random numbers, seeded by `distill`

    facts = {"sampler": type(pipe.scheduler).__name__, "model": str(path or type(pipe).__name__)}
    weights: Any = guidance if guidance > 1 else (1.0,)
    return {"unet": pipe.unet, "generate": generate, "prompts": texts, "guidance": weights, "facts": facts}


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines are left out.

    Raises:
        ArgumentError: there is no such file, or no prompt in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            "prompts are read from a text file, one a line", seen={"file": path, "error": error}, do="pass its path"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ArgumentError(
            "prompts are read from a text file, one a line",
            seen={"file": path, "prompts": 0},
            do="write some into it",
        )
    return prompts


def read_dataset(name: str, column: str = "text") -> list[str]:
    """Prompts of a column of a Hugging Face dataset's training split.

    Args:
        name: what `datasets.load_dataset` takes.
        column: with the prompts.

    Raises:
        ArgumentError: the package `datasets` is not installed.
    """
    need("prompts of a dataset are read with Hugging Face's datasets", "datasets", install="datasets")
    from datasets import load_dataset

    return list(load_dataset(name, split="train")[column])
