"""Retrain or measure the demo model: `python -m clockwork_hooks.demo.train --help`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from clockwork_hooks.analysis.timing import device_name
from clockwork_hooks.demo.weights import WEIGHTS, read_json, save_half, write_json

__all__ = ["main"]

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
    from clockwork_hooks.demo.train_classifier import judge_classifier, train_classifier

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
    from clockwork_hooks.demo.train_generator import Options, train_generator

    settings = Options(
        device=options.device, minutes=options.minutes, batch=options.batch, pool=options.pool, rate=options.rate,
        compile=options.compile, seed=options.seed, log_every=options.log_every,
    )  # fmt: skip
    trainer = train_generator(
        settings,
        checkpoint=options.checkpoint,
        weights=options.weights,
        log=_logger(options.weights),
        resume=options.resume,
    )
    outcome = {"iterations": trainer.iteration, "seconds": round(trainer.seconds), "loss": float(trainer.loss)}
    _note(options, "generator", outcome)


def _evaluate(options: argparse.Namespace) -> None:
    from clockwork_hooks.demo.evaluate import evaluate, sweep_guidance
    from clockwork_hooks.demo.model import GUIDANCE, load_demo
    from clockwork_hooks.demo.train_classifier import judge_classifier

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


def _logger(folder: Path) -> Callable[[dict[str, Any]], None]:
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
