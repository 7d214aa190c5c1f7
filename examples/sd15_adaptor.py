"""The paper's recipe for Stable Diffusion v1.5, for who has the weights and a GPU.

    accelerate launch examples/sd15_adaptor.py --model path/to/sd15 --prompts captions.txt --out sd15-resnet

Adam, learning rate 1e-4, batch 16, 8 DPM++ steps, guidance 7.5, clock 2, 120 epochs (arXiv 2312.08128, Sec. 5.1; the
paper draws from 50,000 captions and does not say how many an epoch: 512 is ours). The loss is this library's
guidance-aware one; `--loss feature` is the paper's. Stopped runs go on with `--resume`. Quality on SD v1.5 has not
been measured by us.

Prompts are a text file with one a line, or a column of a dataset: --dataset path --column text (needs `datasets`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clockwork_hooks as ch
from clockwork_hooks.needed import need
from clockwork_hooks.training import local_device
from clockwork_hooks.training.pipeline import pipeline_arguments, read_prompts


def main(arguments: Sequence[str] | None = None) -> ch.DistillResult:
    options = parse(arguments)
    given = pipeline_arguments(
        path=options.model,
        prompts=prompts_of(options),
        steps=options.steps,
        guidance=options.guidance,
        height=options.size,
        width=options.size,
        dtype=options.dtype,
        device=options.device,
    )
    batches = max(1, options.prompts_per_epoch // options.batch)
    result = ch.distill(
        adaptor="resnet",
        clock=2,
        cut=options.cut,
        loss=options.loss,
        mode=options.mode,
        trajectories=options.epochs * batches,
        batch=options.batch,
        lr=options.lr,
        hold=min(8, batches),
        buffer_gb=options.buffer_gb,
        precision=options.precision,
        tf32=True,
        folder=options.out,
        resume=options.resume,
        tracker=options.tracker,
        **given,
    )
    print(result.table().to_markdown())
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a diffusers pipeline, or a repository's id")
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line")
    parser.add_argument("--dataset", help="Hugging Face dataset, in the place of --prompts")
    parser.add_argument("--column", default="text", help="its column with the prompts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adaptor")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--steps", type=int, default=8, help="DPM++ denoising steps")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance scale")
    parser.add_argument("--size", type=int, default=None, help="edge of the pictures in pixels; the model's own")
    parser.add_argument("--epochs", type=int, default=120, help="draws of prompts")
    parser.add_argument("--prompts-per-epoch", type=int, default=512, help="prompts of a draw")
    parser.add_argument("--batch", type=int, default=16, help="prompts in a trajectory, in each process")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of Adam")
    parser.add_argument("--cut", choices=("paper", "outer"), default="paper", help="outer skips more")
    parser.add_argument(
        "--loss",
        choices=tuple(ch.training.LOSSES),
        help="feature is the paper's; without --loss guided-output, which knows of the guidance",
    )
    parser.add_argument("--mode", choices=("unrolled", "on_policy"), default="unrolled")
    parser.add_argument("--buffer-gb", type=float, default=8.0, help="recorded features on the GPU, in 10⁹ bytes")
    parser.add_argument("--dtype", default="float16", help="of the pipeline")
    parser.add_argument(
        "--precision", default="bf16", choices=("no", "bf16", "fp16"), help="of the adaptor's arithmetic"
    )
    parser.add_argument("--device", default=local_device(), help="where to train")
    parser.add_argument("--tracker", default=None, choices=("tensorboard",), help="log the losses")
    return parser.parse_args(arguments)


def prompts_of(options: argparse.Namespace) -> Any:
    """The prompts, from the file or the dataset."""
    if options.dataset is None:
        if options.prompts is None:
            raise SystemExit("pass --prompts captions.txt, or --dataset name --column text")
        return read_prompts(options.prompts)
    need("prompts of a dataset are read with Hugging Face's datasets", "datasets", install="datasets")
    from datasets import load_dataset

    return list(load_dataset(options.dataset, split="train")[options.column])


if __name__ == "__main__":
    try:
        main()
    except ch.ClockworkError as error:
        raise SystemExit(f"Error: {error}") from None
