"""The paper's recipe for Stable Diffusion v1.5, for who has the weights and a GPU.

    accelerate launch examples/sd15_adaptor.py --model path/to/sd15 --prompts captions.txt --out sd15-resnet

Adam, learning rate 1e-4, batch 16, 8 DPM++ steps, guidance 7.5, clock 2, 120 epochs (arXiv 2312.08128, Sec. 5.1; the
paper draws from 50,000 captions and does not say how many an epoch: 512 is ours). The loss is this library's
guidance-aware one; `--loss feature` is the paper's. A stopped run goes on with `--resume`. Quality on SD v1.5 has not
been measured by us. In the place of --prompts: --dataset path --column text (needs `datasets`).
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

import clockwork_hooks as ch
from clockwork_hooks.training import local_device
from clockwork_hooks.training.pipeline import pipeline_arguments, read_dataset


def main(
    model: Annotated[str, typer.Option()],  # folder of a diffusers pipeline, or a repository's id
    out: Annotated[Path, typer.Option()],  # folder of the adaptor
    prompts: Path = Path("captions.txt"),  # a prompt a line
    dataset: str | None = None,  # of Hugging Face, in the place of prompts
    column: str = "text",  # its column with the prompts
    resume: bool = False,
    steps: int = 8,
    guidance: float = 7.5,
    size: int | None = None,  # edge of the pictures in pixels; the model's own
    epochs: int = 120,
    prompts_per_epoch: int = 512,
    batch: int = 16,  # prompts in a trajectory, in each process
    cut: Literal["paper", "outer"] = "paper",  # outer skips more
    loss: Literal["feature", "guided-feature", "guided-output"] = "guided-output",
    mode: Literal["unrolled", "on_policy"] = "unrolled",
    buffer_gb: float = 8.0,  # recorded features on the GPU, in 10⁹ bytes
    dtype: str = "float16",  # of the pipeline
    precision: Literal["no", "bf16", "fp16"] = "bf16",  # of the adaptor's arithmetic
    device: str = local_device(),
) -> ch.DistillResult:
    texts = prompts if dataset is None else read_dataset(dataset, column)
    given = pipeline_arguments(
        path=model, prompts=texts, steps=steps, guidance=guidance, height=size, width=size, dtype=dtype, device=device
    )  # fmt: skip
    batches = max(1, prompts_per_epoch // batch)
    result = ch.distill(
        adaptor="resnet", clock=2, cut=cut, loss=loss, mode=mode, trajectories=epochs * batches, batch=batch, lr=1e-4,
        hold=min(8, batches), buffer_gb=buffer_gb, precision=precision, tf32=True, folder=out, resume=resume, **given,
    )  # fmt: skip
    print(result.table().to_markdown())
    return result


if __name__ == "__main__":
    try:
        typer.run(main)
    except ch.ClockworkError as error:
        raise SystemExit(f"Error: {error}") from None
