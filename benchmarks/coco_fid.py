r"""FID and CLIP score of Stable Diffusion on MS-COCO, plain and with Clockwork: the paper's Tab. 1, with data of yours.

    python -m benchmarks.coco_fid path/to/stable-diffusion-v1-5 \
        --captions annotations/captions_val2017.json --images val2017 \
        --inception pt_inception-2015-12-05-6726825d.pth --clip path/to/clip-vit-large-patch14 \
        --adaptor path/to/adaptor --dtype float16 --out coco.json

`--tune 0.4` adds a row of `ch.tune`: an adaptor and its steps that save 40%, calibrated here on captions that are not
judged, without training.

Nothing is downloaded: model, captions, pictures and the weights of both judges are folders and files on this machine
(torch-fidelity has to be installed for Inception). **We have not run this on SD v1.5**: neither the weights nor
MS-COCO were at hand, so quality on SD v1.5 is unverified by us; the tests run it on a made-up folder with a tiny random
model. The paper (Tab. 1, 5,000 pictures of 512×512, 8 DPM++ steps, ResNet adaptor): FID 24.64 → 24.11, CLIP score
0.300 → 0.295, TFLOPs 10.8 → 7.3.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.analysis.evaluation import Evaluation
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.metrics import Paired, clip_score, fid

__all__ = ["Coco", "coco_fid", "main", "tuned"]


@dataclass(frozen=True, slots=True)
class Coco:
    """Captions and where their pictures are.

    Attributes:
        captions: the first of each picture, in the order of the picture ids.
        files: the pictures.
    """

    captions: tuple[str, ...]
    files: tuple[Path, ...]

    @classmethod
    def read(cls, captions: Path, images: Path, count: int) -> Coco:
        """Read COCO's own files.

        Args:
            captions: `captions_val2017.json`: "images" with id and file_name, "annotations" with image_id and caption.
            images: the folder of the pictures.
            count: the first so many pictures by id.

        Raises:
            ArgumentError: a file is missing or of another form.
        """
        try:
            data = json.loads(captions.read_text(encoding="utf-8"))
            names = {int(image["id"]): str(image["file_name"]) for image in data["images"]}
            told: dict[int, str] = {}
            for note in data["annotations"]:
                told.setdefault(int(note["image_id"]), str(note["caption"]).strip())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                "captions come in COCO's own JSON",
                seen={"file": captions, "error": f"{type(error).__name__}: {error}"},
                do="pass captions_val2017.json, as COCO's annotations hold it",
            ) from error
        ids = sorted(names.keys() & told.keys())[:count]
        files = tuple(images / names[number] for number in ids)
        missing = [file for file in files if not file.is_file()]
        if missing or len(ids) < 2:
            raise ArgumentError(
                "every caption has its picture, and there are two at least",
                seen={"captioned pictures": len(ids), "missing": len(missing), "the first": missing[:1] or "none"},
                do="pass --images with the folder of the pictures that the captions belong to",
            )
        return cls(tuple(told[number] for number in ids), files)

    def split(self, count: int) -> tuple[Coco, tuple[str, ...]]:
        """The same without its last so many pictures, and their captions.

        Raises:
            ArgumentError: fewer than two would be left.
        """
        if len(self.captions) < count + 2:
            raise ArgumentError(
                "captions to tune with are not judged",
                seen={"captions": len(self.captions), "to tune with": count},
                do="pass a smaller --tune-captions",
            )
        return Coco(self.captions[:-count], self.files[:-count]), self.captions[-count:]

    def pictures(self, size: int, batch: int) -> Iterator[Tensor]:
        """The real pictures: the middle square, resized; batches (B, 3, size, size) in [0, 1]."""
        import numpy as np
        from PIL import Image, ImageOps

        for at in range(0, len(self.files), batch):
            made = []
            for file in self.files[at : at + batch]:
                with Image.open(file) as image:
                    square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
                made.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255)
            yield torch.stack(made)


def coco_fid(
    pipe: Any, coco: Coco, variants: Mapping[str, Mapping[str, Any]], *,
    feature: nn.Module | None = None, inception: Path | None = None, clip: Path | None = None,
    steps: int = 8, guidance: float = 7.5, size: int = 512, batch: int = 8, seeds: Sequence[int] = (0,),
) -> Evaluation:  # fmt: skip
    """Judge plain pictures and those of variants, one a caption.

    Args:
        pipe: a text-to-image pipeline; its scheduler is replaced by DPM-Solver++ (2M).
        coco: captions and real pictures.
        variants: name → options of `wrap`.
        feature: extractor of the FID from uint8 pictures; None for Inception.
        inception: file of Inception's weights.
        clip: folder of a CLIP model; None leaves the CLIP score out.
        steps, guidance, size: of the sampler; size in pixels.
        batch: captions at a time.
        seeds: of the noise; each is a pass over all captions.

    Returns:
        FID, CLIP score, likeness to plain, MACs and time, a row a variant.
    """
    _prepare(pipe)
    real = (pictures.to(pipe.device) for pictures in coco.pictures(size, batch))
    metrics: list[Any] = [fid(real, feature=feature, weights=inception)]
    metrics += [clip_score(clip)] if clip is not None else []

    def generate(prompts: Sequence[str], seed: int) -> Tensor:
        made = pipe(
            list(prompts), num_inference_steps=steps, guidance_scale=guidance, height=size, width=size,
            generator=torch.Generator().manual_seed(seed), output_type="pt",
        )  # fmt: skip
        images: Tensor = made.images
        return images.float()

    prompts = [coco.captions[at : at + batch] for at in range(0, len(coco.captions), batch)]
    return ch.evaluate(pipe.unet, generate, prompts, variants, metrics=[*metrics, Paired()], seeds=seeds)


def tuned(
    pipe: Any, captions: Sequence[str], saving: float, *, steps: int = 8, guidance: float = 7.5, size: int = 512
) -> dict[str, Any]:
    """The options of `wrap` that `ch.tune` finds for a saving; the pipeline is left as it is, with its DPM-Solver++."""
    _prepare(pipe)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
    with ch.tune(pipe, captions, saving=saving, options=options) as cw:
        print(cw.adaptor.tuning, file=sys.stderr)  # type: ignore[attr-defined]
        return {"adaptor": cw.adaptor, "schedule": cw.schedule, "region": cw.region}


def _prepare(pipe: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    try:
        more = 0 if options.tune is None else options.tune_captions
        coco = Coco.read(options.captions, options.images, options.count + more)
        pipe = _pipeline(options)
        adaptor = "identity" if options.adaptor is None else str(options.adaptor)
        variants: dict[str, dict[str, Any]] = {
            f"clock {options.clock}, {adaptor}": {"clock": options.clock, "adaptor": adaptor}
        }
        if options.tune is not None:
            coco, captions = coco.split(more)
            sampler = {"steps": options.steps, "guidance": options.guidance, "size": options.size}
            variants[f"tuned, saving {options.tune:g}"] = tuned(pipe, captions, options.tune, **sampler)
        found = coco_fid(
            pipe, coco, variants,
            inception=options.inception, clip=options.clip, steps=options.steps, guidance=options.guidance,
            size=options.size, batch=options.batch, seeds=range(options.seeds),
        )  # fmt: skip
    except ch.ClockworkError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(found.to_markdown())
    command = "python -m benchmarks.coco_fid " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    data = {"command": command, "captions": len(coco.captions), **json.loads(found.to_json())}
    options.out.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _pipeline(options: argparse.Namespace) -> Any:
    from diffusers import StableDiffusionPipeline

    if not options.model.is_dir():
        raise ArgumentError(
            "the model is a folder on this machine",
            seen={"model": options.model},
            do="download one first: hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir sd15",
        )
    pipe = StableDiffusionPipeline.from_pretrained(
        options.model, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    return pipe.to(options.device, getattr(torch, options.dtype))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--captions", type=Path, required=True, help="captions_val2017.json")
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--inception", type=Path, help="weights of the FID's Inception")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model; without one, no CLIP score")
    parser.add_argument("--adaptor", type=Path, help="folder of a trained adaptor; without one, the identity")
    parser.add_argument("--clock", type=int, default=2, help="one full pass every so many steps")
    parser.add_argument("--tune", type=float, metavar="SAVING", help="also a row of ch.tune at this saving, 0 to 1")
    parser.add_argument("--tune-captions", type=int, default=16, help="captions to tune with, which are not judged")
    parser.add_argument("--steps", type=int, default=8, help="DPM++ steps")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance scale")
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--count", type=int, default=5000, help="captions")
    parser.add_argument("--batch", type=int, default=8, help="captions at a time")
    parser.add_argument("--seeds", type=int, default=1, help="passes over the captions, each with its noise")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--out", type=Path, default=Path("coco_fid.json"), help="where the results go")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
