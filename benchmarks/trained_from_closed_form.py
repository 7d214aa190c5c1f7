"""Is training worth it where the closed form ends? Calibrated rows, and the same rows trained on from there.

    python -m benchmarks.trained_from_closed_form run --out DIR --minutes 9        # on a GPU
    python -m benchmarks.trained_from_closed_form table DIR/trained_from_closed_form.json
    python -m benchmarks.trained_from_closed_form render [FILE]                    # into docs/calibration.md

For each setting an exit+entry+before adaptor is calibrated as in `benchmarks/calibration.py`; `ResidualAdaptor.of` then
trains a difference that starts at zero, on trajectories of the teacher from training captions (`distill`, unrolled, the
guided output's loss). Both are judged by that benchmark's `Judge`, on the same captions and noise. Every row is written
as soon as it is there; none is measured again. In miniature, on a CPU: `run --captions 2 --seeds 1 --calibration 2
--train-batch 2 --trajectories 1 --match "main-8.*3 5 7"`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.calibration import BEFORE, BOTH, CLOCK2, INNER, Group, Judge, Row, every, interval, kinds
from benchmarks.calibration_results import Rows, half, load, rewrite
from benchmarks.fidelity_bench import Bench
from benchmarks.fidelity_plan import Sampler
from benchmarks.fidelity_train import Prompts
from benchmarks.harness import environment, say
from clockwork_hooks._numbers import percent
from clockwork_hooks.adaptors import ResidualAdaptor
from clockwork_hooks.demo.model import load_demo
from clockwork_hooks.reports.tables import table
from clockwork_hooks.schedule import Schedule
from clockwork_hooks.training import distill

RESULT = Path(__file__).parent / "results" / "trained_from_closed_form.json"
BEGIN, END = "<!-- trained: python -m benchmarks.trained_from_closed_form render -->", "<!-- end of trained -->"
TRAINED = "trained"
_SPACED = "clock 3, first 2 and last 1 full"
GROUPS = (
    Group(
        "main-8",
        Sampler(),
        (
            *kinds("widest", BOTH, BEFORE),
            *kinds("widest", INNER, BEFORE),
            *kinds("default", CLOCK2, BEFORE),
            *kinds("default", BOTH, BEFORE),
        ),
    ),
    Group("main-20", Sampler(steps=20), tuple(kinds("widest", every(20, 3, 2, 1), BEFORE, what=_SPACED))),
)


def trained_row(row: Row) -> Row:
    """The row that goes on from a calibrated one."""
    return Row(f"{TRAINED}, {row.label.split(', ', 1)[1]}", TRAINED, row.region, row.at)


def train(
    judge: Judge, group: Group, row: Row, start: Any, options: argparse.Namespace
) -> tuple[ResidualAdaptor, dict[str, Any]]:
    """Train the difference to a calibrated adaptor, in float32.

    Args:
        judge: whose device.
        group: whose sampler.
        row: the calibrated one.
        start: its adaptor.
        options: of the command line.

    Returns:
        The trained adaptor, and what is known about its training.
    """
    model = load_demo(judge.bench.model.device, torch.float32)
    where: Any = SimpleNamespace(region="outer" if row.region == "default" else 0)
    region = Bench(model, (("a red circle",),), (), ()).region(where)
    prompts = Prompts.draw(model, options.train_captions, images=False)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        adaptor = ResidualAdaptor.of(start, region, width=options.width)
    limits = {"minutes": options.train_minutes, "trajectories": options.trajectories}
    settings = {"batch": options.train_batch, "lr": options.rate, "ema": options.ema, "loss": options.loss,
                "mode": options.mode, "seed": options.seed}  # fmt: skip
    result = distill(
        model.unet, adaptor.to(model.device), partial(prompts.generate, group=group), region=region,
        prompts=range(options.train_captions), schedule=Schedule.at(row.at), guidance=group.sampler.guidance,
        progress=False, decay="cosine", warmup=0.05, hold=options.hold, buffer_gb=16, tf32=model.device.type == "cuda",
        **limits, **settings,
    )  # fmt: skip
    student = result.students["adaptor"]
    losses = student.losses
    cycle = len(row.at)  # losses differ from step to step: the first and the last ones are of whole trajectories
    few = cycle * max(1, min(10, len(losses) // (4 * cycle)))
    training = {
        **settings, "width": options.width, "updates": student.updates, "trajectories": result.trajectories,
        "seconds": result.seconds, "first losses": statistics.fmean(losses[:few]),
        "last losses": statistics.fmean(losses[-few:]), "over": few,
        "parameters": sum(p.numel() for p in adaptor.parameters() if p.requires_grad),
    }  # fmt: skip
    return student.adaptor.eval().requires_grad_(False), training


def pair(judge: Judge, group: Group, row: Row, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The calibrated row and the trained one, by label."""
    adaptor, found = judge.adaptor(group.sampler, row)
    trained, training = train(judge, group, row, adaptor, options)
    rows = {}
    for one, student, more in ((row, adaptor, found), (trained_row(row), trained, {"training": training})):
        scores: dict[str, Any] = {}
        for part in ("choose", "judge"):
            scores[part], cost = judge.scores(group.sampler, one, student, part)
        rows[one.label] = {"kind": one.kind, "region": one.region, "at": list(one.at), "taken": None, **more, **cost,
                           "captions": one.captions, "scores": scores}  # fmt: skip
    return rows


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, the most important rows first."""
    started, path = time.monotonic(), options.out / RESULT.name
    source = next((one for one in (path, options.resume) if one is not None and one.exists()), None)
    data: dict[str, Any] = {"runs": [], "rows": {}} if source is None else load(source)
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")  # diffusers and NumPy 2
    cuda = str(options.device).startswith("cuda")
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    wanted = [(group, row) for group in GROUPS for row in group.rows]
    wanted = [(group, row) for group, row in wanted if re.search(options.match, f"{group.name}/{row.label}")]
    left = [(g, row) for g, row in wanted if f"{g.name}/{trained_row(row).label}" not in data["rows"]]
    say(f"{len(left)} of {len(wanted)} settings to do")
    if not left:
        return 0
    dtype = torch.float16 if cuda else torch.float32
    batch, most = min(options.batch, options.captions), min(options.calibration, 8 * options.captions)
    judge = Judge.make(options.device, dtype, options.captions, batch, options.seeds, most)
    names = ("captions", "calibration", "seeds", "batch")
    settings = {name: getattr(options, name) for name in names}
    data["runs"].append({**environment(str(options.device), options.seed), **settings, "dtype": str(dtype)})
    longest = 0.0
    while left:
        if time.monotonic() - started + longest > 60 * options.minutes:
            say(f"{options.minutes:g} minutes are nearly over")
            break
        begun, (group, row) = time.monotonic(), left.pop(0)
        measured = {} if f"{group.name}/plain" in data["rows"] else {"plain": judge.measure(group, Row("plain"))}
        measured |= pair(judge, group, row, options)
        for label, one in measured.items():
            data["rows"][f"{group.name}/{label}"] = {**one, "run": len(data["runs"]) - 1}
        _write(path, data)
        longest = max(longest, time.monotonic() - begun)
        distances = (
            f"{label}: {statistics.fmean(one['scores']['judge']['Fréchet']):.1f}" for label, one in measured.items()
        )
        say(f"{group.name}, {time.monotonic() - begun:.0f} s: {'; '.join(distances)}")
    say(f"{len(left)} settings are not there yet" if left else "all is there")
    return 0


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


# -- the page --------------------------------------------------------------------------------------------------------


def pairs(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key of the calibrated row, key of the trained one), where both are there."""
    keys = [
        (f"{group.name}/{row.label}", f"{group.name}/{trained_row(row).label}")
        for group in GROUPS
        for row in group.rows
    ]
    return [(one, other) for one, other in keys if one in data["rows"] and other in data["rows"]]


def markdown(data: Mapping[str, Any]) -> str:
    """A line a setting: what each saves and how far it is from rendered scenes, and the paired difference."""
    rows, cells = Rows(data), []
    for one, other in pairs(data):
        scores = [rows.row(key)["scores"]["judge"] for key in (one, other)]
        numbers = [[statistics.fmean(score[name]) for score in scores] for name in ("PSNR", "attributes right")]
        cells.append(
            (
                f"{one.split('/')[0]}, {one.split(', ', 1)[1]}",
                f"{percent(rows.saved(one))}, {percent(rows.saved(other))}",
                f"{rows.mean(one.split('/')[0] + '/plain'):.1f}",
                f"{rows.mean(one):.1f}",
                f"{rows.mean(other):.1f}",
                interval(rows.gap(other, one)),
                "{:.1f}, {:.1f}".format(*numbers[0]),
                "{:.2f}%, {:.2f}%".format(*numbers[1]),
                str(rows.row(other)["training"]["updates"]),
            )
        )
    heads = ("row", ">MACs saved", ">Fréchet, plain", ">calibrated", ">trained", ">trained less calibrated", ">PSNR",
             ">attributes", ">gradient steps")  # fmt: skip
    return table("Calibrated, and trained from there", heads, cells).to_markdown()


def verdict(data: Mapping[str, Any]) -> str:
    """In which settings training beats the closed form."""
    rows, sides = Rows(data), {"better": list[str](), "worse": list[str](), "neither": list[str]()}
    for one, other in pairs(data):
        gap = rows.gap(other, one)
        mean, wide = statistics.fmean(gap), half(gap)
        side = "better" if mean + wide < 0 else "worse" if mean - wide > 0 else "neither"
        sides[side].append(f"{one.split('/')[0]}, {one.split(', ', 1)[1]}")
    texts = {
        "better": "Training on beats the closed form at the same steps",
        "neither": "The interval includes 0, so training is not worth it there",
        "worse": "Training on makes it worse",
    }
    return "\n".join(f"- {texts[side]}: {'; '.join(sides[side])}." for side in texts if sides[side])


def page(data: Mapping[str, Any] | None) -> str:
    """The measured part of "Training from there"."""
    if data is None:
        command = f"python -m benchmarks.{Path(__file__).stem}"
        return f"Whether it is worth its MACs has not been measured on a GPU: `{command}`."
    run, rows = data["runs"][-1], [data["rows"][other] for _, other in pairs(data)]
    training = rows[0]["training"]
    seconds = [row["training"]["seconds"] for row in rows]
    text = f"""\
The demo model, exit+entry+before, {run["calibration"]} captions; the difference is a network of width \
{training["width"]} ({training["parameters"] / 1e3:.0f}k parameters in the first row),
trained for {min(seconds):.0f} to {max(seconds):.0f} s a row ({training["mode"]}, {training["loss"]}, \
batch {training["batch"]}, peak rate {training["lr"]:g}).
Judged as [below](#measured-on-the-demo-model): {run["captions"]:,} captions, {run["seeds"]} seeds, mean and 95%
interval of the paired difference; pairs are calibrated, trained. {run["device"]}, torch \
{run["versions"]["torch"]}, training seed {run["seed"]}; each command is in
`benchmarks/results/{RESULT.name}`."""
    return f"{text}\n\n{verdict(data)}\n\n{markdown(data)}"


def show(options: argparse.Namespace) -> int:
    """Print a file as Markdown."""
    data = load(options.file)
    print(f"{verdict(data)}\n\n{markdown(data)}")
    return 0


def render(options: argparse.Namespace) -> int:
    """Write the part of docs/calibration.md, from benchmarks/results/ or a file that becomes the result."""
    return rewrite(RESULT, options.file, BEGIN, END, page)


# -- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", formatter_class=argparse.ArgumentDefaultsHelpFormatter, help=run.__doc__)
    one.set_defaults(act=run)
    one.add_argument("--out", type=Path, required=True, help="folder of the result")
    one.add_argument("--resume", type=Path, help="rows of an earlier run")
    one.add_argument("--minutes", type=float, default=9.0, help="begin no setting that may not end within these")
    one.add_argument("--captions", type=int, default=5120, help="held-out captions of each of the two sets")
    one.add_argument("--calibration", type=int, default=512, help="training captions to calibrate on, at most")
    one.add_argument("--seeds", type=int, default=3, help="evaluation seeds")
    one.add_argument("--batch", type=int, default=1024, help="pictures sampled at once")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    one.add_argument("--match", default="", help="only settings whose group/label has this, a regular expression")
    one.add_argument("--width", type=int, default=16, help="channels inside of the trained network")
    one.add_argument("--train-minutes", type=float, default=1.2, help="of training, each setting")
    one.add_argument("--trajectories", type=int, help="at most, in each training")
    one.add_argument("--train-batch", type=int, default=128, help="prompts in a trajectory")
    one.add_argument("--train-captions", type=int, default=20_000, help="different training captions")
    one.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    one.add_argument("--ema", type=float, default=0.99, help="decay of the moving average of the weights")
    one.add_argument("--loss", default="guided-output", help="as distill takes it")
    one.add_argument("--mode", default="unrolled", help="unrolled or on_policy")
    one.add_argument("--hold", type=int, default=4, help="trajectories that are recorded before they are trained on")
    one.add_argument("--seed", type=int, default=0, help="of training")
    two = commands.add_parser("table", help=show.__doc__)
    two.set_defaults(act=show)
    two.add_argument("file", type=Path)
    three = commands.add_parser("render", help=render.__doc__)
    three.set_defaults(act=render)
    three.add_argument("file", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    return int(options.act(options))


if __name__ == "__main__":
    sys.exit(main())
