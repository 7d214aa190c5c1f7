"""Clockwork on a diffusers pipeline beside what else changes its UNet, on a GPU: are the pictures right?

    python -m benchmarks.gpu_companions --out DIR            # on a GPU, 3 minutes; every row is written at once
    python -m benchmarks.gpu_companions --out DIR --device cpu    # in miniature: offloading is to the CPU itself
    python -m benchmarks.gpu_companions --render             # the table of docs/pipelines.md

A tiny Stable Diffusion pipeline (`tests/pipelines/parts.py`), three pictures of six steps. What they are compared with
comes from a second pipeline that Clockwork never touched: a plain hook gives it, in the same passes, the feature of the
step before. So the difference is 0 if each adaptor pass was served what it should have been.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clockwork_hooks as ch
from benchmarks.harness import Results, environment, reason
from clockwork_hooks.diffusers import wrap_pipeline
from clockwork_hooks.reports.tables import table
from tests.pipelines import parts
from tests.pipelines.oracle import replay

STEPS, PICTURES, EXIT = 6, 3, "up_blocks.0"
OPTIONS = {"prompt": "a red cat", "height": 16, "width": 16, "guidance_scale": 3.0, "output_type": "latent"}
MODES = (None, "cudagraphs", "compiled-cudagraphs")
ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "results" / "gpu_companions.json"
PAGE = ROOT / "docs" / "pipelines.md"
BEGIN, END = "<!-- companions: python -m benchmarks.gpu_companions --render -->", "<!-- end of companions -->"


def nothing(pipe: Any, device: str) -> None:
    """On the device, and that is all."""
    pipe.to(device)


def groups(**options: Any) -> Callable[[Any, str], None]:
    """Group offloading of the UNet, the other parts on the device."""

    def enable(pipe: Any, device: str) -> None:
        pipe.to(device)
        stream = options.get("use_stream", False) and device != "cpu"
        places = {"onload_device": torch.device(device), "offload_device": torch.device("cpu")}
        pipe.unet.enable_group_offload(**{**options, **places, "use_stream": stream})

    return enable


def then(change: Callable[[Any], object]) -> Callable[[Any, str], None]:
    """On the device, then the change."""

    def enable(pipe: Any, device: str) -> None:
        pipe.to(device)
        change(pipe)

    return enable


def casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def adapters(pipe: Any) -> None:
    from tests.pipelines.test_companions import lora

    pipe.load_lora_weights(lora(), adapter_name="style")


COMPANIONS: dict[str, Callable[[Any, str], None]] = {
    "nothing": nothing,
    "`enable_model_cpu_offload`": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "`enable_sequential_cpu_offload`": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
    "`enable_group_offload`, blocks": groups(offload_type="block_level", num_blocks_per_group=1),
    "`enable_group_offload`, leaves, a stream": groups(offload_type="leaf_level", use_stream=True),
    "`enable_layerwise_casting`, float8": then(casting),
    "`channels_last`": then(lambda pipe: pipe.unet.to(memory_format=torch.channels_last)),
    "`enable_attention_slicing`": then(lambda pipe: pipe.enable_attention_slicing(1)),
    "`enable_freeu`": then(lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)),
    "`load_lora_weights`": then(adapters),
    "`unet.compile()` before": then(lambda pipe: pipe.unet.compile()),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu_companions.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--match", default="", help="only companions whose name has this")
    parser.add_argument("--render", action="store_true", help="write the table of docs/pipelines.md, measure nothing")
    options = parser.parse_args(arguments)
    if options.render:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = Results(options.out / "gpu_companions.json", environment(options.device, 0))
    simulated = options.device == "cpu"  # accelerate's method does not take the CPU for a device
    for name, enable in COMPANIONS.items():
        for mode in MODES[: 1 if simulated else None]:
            if options.match in name and not (simulated and "sequential" in name):
                results.add("companions", companion=name, mode=mode, **compared(enable, mode, options.device))
    return 0


def compared(enable: Callable[[Any, str], None], mode: str | None, device: str) -> dict[str, Any]:
    """Passes, reasons, and the largest difference of a value to that without Clockwork; or the error."""
    torch.compiler.reset()
    try:
        ours, letters, stats = sampled(enable, mode, device)
    except ch.ClockworkError as error:
        return {"error": reason(error)}
    other = parts.quiet(parts.text_to_image())
    enable(other, device)
    each = [letters[at : at + STEPS] for at in range(0, len(letters), STEPS)]
    passes = [[(letter, 0) for letter in run] for run in each]
    theirs = [replay(other.unet, EXIT, one, lambda k=k: run(other, k)) for k, one in enumerate(passes)]
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "passes": each,
        "reasons": dict(stats.reasons),
        "counted": stats.full_passes + stats.adaptor_passes,
        "difference": max(float((one.cpu() - two.cpu()).abs().max()) for one, two in pairs),
        "largest": max(float(one.abs().max()) for one in theirs),
    }


def sampled(enable: Callable[[Any, str], None], mode: str | None, device: str) -> tuple[list[Tensor], str, ch.Stats]:
    """Pictures of a wrapped pipeline, and which of its passes were full."""
    pipe, letters = parts.quiet(parts.text_to_image()), ""
    enable(pipe, device)
    with warnings.catch_warnings(), wrap_pipeline(pipe, schedule=ch.Schedule.every(2)) as cw:
        warnings.simplefilter("ignore", ch.NoEffectWarning)
        if mode is not None:
            cw.compile(mode)
        stats, adapted = cw.wrappers["unet"].stats, 0

        def ended(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal letters, adapted
            letters += "A" if stats.adaptor_passes > adapted else "F"
            adapted = stats.adaptor_passes
            return values

        pictures = [run(pipe, k, callback_on_step_end=ended) for k in range(PICTURES)]
    return pictures, letters, stats


def run(pipe: Any, seed: int, **more: Any) -> Tensor:
    """One picture's latent."""
    generator = torch.Generator().manual_seed(seed)
    pictures: Tensor = pipe(num_inference_steps=STEPS, generator=generator, **OPTIONS, **more).images
    return pictures


def read() -> dict[str, Any]:
    """What was measured last."""
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def markdown(data: dict[str, Any]) -> str:
    """A row a companion, a column a mode."""
    names = list(dict.fromkeys(row["companion"] for row in data["companions"]))
    cells = {(row["companion"], row["mode"]): cell(row) for row in data["companions"]}
    heads = ("beside it", "as it is", *(f'`mode="{mode}"`' for mode in MODES[1:]))
    rows = [(name, *(cells.get((name, mode), "") for mode in MODES)) for name in names]
    return table("Passes of three pictures, and how far off they are", heads, rows).to_markdown()


def cell(row: dict[str, Any]) -> str:
    """Passes of the three pictures, and how far off they are."""
    if "error" in row:
        return "refused"
    off = row["difference"]
    return " ".join(row["passes"]) + (", equal" if off == 0 else f", off by {off / row['largest']:.0e}")


def rendered(page: str, data: dict[str, Any]) -> str:
    """The page, with the table of these results."""
    before, rest = page.split(BEGIN, 1)
    device = data["environment"]["device"]
    versions = data["environment"]["versions"]
    told = f"On one {device}, torch {versions['torch']}, diffusers {versions['diffusers']}:"
    return f"{before}{BEGIN}\n{told}\n\n{markdown(data)}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    raise SystemExit(main())
