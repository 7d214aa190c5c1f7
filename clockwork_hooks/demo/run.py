"""`clockwork-hooks demo`: the same prompts with the plain UNet and with Clockwork, measured side by side."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clockwork_hooks._numbers import count, duration, macs, percent
from clockwork_hooks._version import versions
from clockwork_hooks.analysis.timing import device_name, timed
from clockwork_hooks.demo.captions import parse
from clockwork_hooks.demo.classifier import attribute_accuracy
from clockwork_hooks.demo.model import DEMO_PROMPTS, GUIDANCE, LATENT_SHAPE, DemoModel, load_demo
from clockwork_hooks.demo.weights import WEIGHTS
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.errors import DemoError, need, whole
from clockwork_hooks.metrics import psnr
from clockwork_hooks.regions.find import find_region
from clockwork_hooks.reports.plots import Bitmap
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule, check_clock

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

__all__ = ["DemoResult", "Row", "demo", "draw_grid"]

ROUNDS = 2
PLAIN, IDENTITY, TRAINED = "plain", "identity", "trained"
ADAPTOR = WEIGHTS / "adaptor"
SIDE, GAP, MARGIN, CAPTION, HEAD = 144, 6, 24, 46, 74
COLUMNS = {2: 4}  # pictures of a prompt → prompts in a line
INK, FAINT, EDGE, PAPER = (24, 24, 27), (113, 113, 122), (212, 212, 216), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Row:
    """One way of sampling, measured over all prompts.

    Attributes:
        name: "plain", "identity" or "trained": what stands in for the region.
        macs_per_image: of the UNet: convolutions and matrix products, attention products and both guidance branches
            counted.
        seconds_per_image: wall time of sampling, the better of two interleaved rounds.
        speed_up: of that time, against plain.
        psnr: mean over the pictures, to the plain pictures from the same noise, in dB; None for plain itself.
        accuracy: share of the captioned attributes that a classifier finds in the pictures, 0 to 1.
        full_passes: calls of the whole UNet in one round.
        adaptor_passes: calls in which the cached feature, or a trained adaptor, stood in for its low-resolution part.
    """

    name: str
    macs_per_image: int
    seconds_per_image: float
    speed_up: float
    psnr: float | None
    accuracy: float
    full_passes: int
    adaptor_passes: int


@dataclass(frozen=True, slots=True)
class DemoResult(Report):
    """What `demo` measured, and where it put its files.

    Attributes:
        rows: plain first.
        images: name of the row → pictures (B, 3, 64, 64) in [0, 1].
        region: one line about what Clockwork skips.
        settings: prompts, steps, clock, seed, guidance, machine, versions, command; and why there is no trained
            adaptor, where there is none.
        folder: holds grid.png, report.html, report.md and report.json.
    """

    SCHEMA = "demo/1"

    rows: tuple[Row, ...]
    images: dict[str, Tensor]
    region: str
    settings: dict[str, Any]
    folder: Path

    def table(self) -> Table:
        """The comparison as one table."""
        columns = ("UNet", ">MACs/image", ">saved", ">time/image", ">speed-up", ">PSNR to plain", ">attributes right")
        plain = self.rows[0]
        cells = [
            (
                row.name,
                macs(row.macs_per_image),
                percent(1 - row.macs_per_image / plain.macs_per_image) if row is not plain else None,
                duration(row.seconds_per_image),
                f"{row.speed_up:.2f}×",
                None if row.psnr is None else f"{row.psnr:.1f} dB",
                percent(row.accuracy),
            )
            for row in self.rows
        ]
        settings = self.settings
        notes = (
            f"{count(len(settings['prompts']), 'prompt')}, {count(settings['steps'], 'DPM++ step')}, "
            f"clock {settings['clock']}, "
            f"guidance {settings['guidance']:g}, seed {settings['seed']}. MACs of the UNet and its adaptor, attention "
            "products and both guidance branches counted.",
            "What stands in for the skipped part: identity, its output of the step before; trained, a small network "
            "that ships. Attributes right: the colours, shapes, sizes and places of the captions that a classifier "
            "finds. Time: the better of two rounds; other work on this machine changes it, and not the MACs.",
            f"Skipped on adaptor passes: {self.region}.",
            *filter(None, [settings["untrained"]]),
        )
        return table("The demo model, plain and with Clockwork", columns, cells, notes=notes)

    def data(self) -> dict[str, Any]:
        """Rows and settings; times in seconds, MACs in units."""
        return {"rows": [asdict(row) for row in self.rows], "region": self.region, "settings": self.settings}

    def figures(self) -> Sequence[Bitmap]:
        """Each prompt with its pictures, side by side."""
        prompts = self.settings["prompts"]
        return (
            Bitmap(
                lambda: draw_grid(prompts, self.rows, self.images),
                "Each prompt with its pictures, plain and with Clockwork",
            ),
        )


def demo(
    prompts: Sequence[str] = (),
    *,
    steps: int = 8,
    clock: int = 2,
    seed: int = 0,
    out: Path | str = "clockwork-demo",
    console: Console | None = None,
) -> DemoResult:
    """Sample the prompts with the plain UNet and with Clockwork, and write a picture and a report.

    Clockwork runs with the identity adaptor, and with the trained one that ships, if it was trained for these steps
    and this clock.

    Args:
        prompts: captions of scenes; none for the 16 that ship with the demo.
        steps: DPM++ (2M) denoising steps.
        clock: one full pass every `clock` steps.
        seed: of the initial noise, the same for all.
        out: folder for `grid.png`, `report.html`, `report.md` and `report.json`; made if need be.
        console: where the progress bar goes; None for standard error.

    Returns:
        The measurements.

    Raises:
        UnknownWordError: a prompt has words that the model has never seen; lists those it knows.
        ArgumentError: steps or clock is below 1.
        DemoError: the folder cannot be written.

    Source: arXiv 2312.08128, Sec. 5.2 (text-guided generation, identity adaptor).
    """
    check_clock(clock)
    whole("steps", steps, least=1, rule="sampling takes at least one step", example=8)
    need(
        "the demo samples with diffusers and draws with Pillow",
        "diffusers",
        "PIL",
        install="clockwork-hooks[demo]",
        error=DemoError,
    )
    texts = tuple(prompts) or DEMO_PROMPTS
    folder = _folder(Path(out))
    model = load_demo()
    hidden = model.encode_prompts(texts)  # an unknown word is told before anything is measured
    parse(texts)
    region = find_region(
        model.unet, torch.zeros(len(hidden), *LATENT_SHAPE), torch.tensor(1), encoder_hidden_states=hidden
    )
    adaptors, untrained = _adaptors(steps, clock)
    times: dict[str, list[float]] = {PLAIN: [], **{name: [] for name in adaptors}}
    images: dict[str, Tensor] = {}
    counts: dict[str, tuple[int, int, int]] = {}
    with ProgressBar(console) as bar:
        task = bar.add_task("sampling", total=len(times) * ROUNDS * steps)

        def sample(name: str) -> None:
            def advance(number: int, t: int, latents: Tensor) -> None:
                bar.update(task, advance=1, description=f"{name}, step {number + 1} of {steps}")

            def run() -> None:
                images[name] = model.sample(texts, steps=steps, seed=seed, callback=advance)

            times[name].append(timed(run, str(model.device)))

        model.sample(texts[:1], steps=1)  # first calls are slower
        for _ in range(ROUNDS):
            sample(PLAIN)
            for name, adaptor in adaptors.items():
                with wrap(model.unet, adaptor, region=region, schedule=Schedule.every(clock)) as cw, cw.trajectory():
                    sample(name)
                counts[PLAIN] = (cw.stats.macs_plain, steps, 0)
                counts[name] = (cw.stats.macs_run, cw.stats.full_passes, cw.stats.adaptor_passes)
    rows = tuple(_row(name, model, texts, images, times, counts) for name in times)
    settings = _settings(texts, steps, clock, seed) | {"untrained": untrained}
    result = DemoResult(rows, images, region.line, settings, folder)
    _write(result)
    return result


def _adaptors(steps: int, clock: int) -> tuple[dict[str, Any], str]:
    """What stands in for the region, by name, and why the trained adaptor is not among them."""
    adaptors: dict[str, Any] = {IDENTITY: None}
    if not (ADAPTOR / "config.json").exists():
        return adaptors, "No trained adaptor ships with this version."
    from clockwork_hooks.adaptors import LearnedAdaptor

    trained = LearnedAdaptor.from_pretrained(ADAPTOR).float()
    facts = trained.facts
    if (facts.get("steps"), facts.get("schedule")) != (steps, str(Schedule.every(clock))):
        return adaptors, f"The adaptor that ships was trained for {facts.get('steps')} steps, {facts.get('schedule')}."
    return {**adaptors, TRAINED: trained}, ""


def _row(
    name: str,
    model: DemoModel,
    texts: Sequence[str],
    images: dict[str, Tensor],
    times: dict[str, list[float]],
    counts: dict[str, tuple[int, int, int]],
) -> Row:
    run, full, adapted = counts[name]
    best = {key: min(values) for key, values in times.items()}
    return Row(
        name=name,
        macs_per_image=run // len(texts),
        seconds_per_image=best[name] / len(texts),
        speed_up=best[PLAIN] / best[name],
        psnr=None if name == PLAIN else float(psnr(images[name], images[PLAIN]).mean()),
        accuracy=attribute_accuracy(model.classifier, images[name], texts).total,
        full_passes=full,
        adaptor_passes=adapted,
    )


def _settings(texts: Sequence[str], steps: int, clock: int, seed: int) -> dict[str, Any]:
    words = ["clockwork-hooks", "demo", "--steps", str(steps), "--clock", str(clock), "--seed", str(seed)]
    if tuple(texts) != DEMO_PROMPTS:
        words += [word for text in texts for word in ("--prompt", text)]
    return {
        "command": shlex.join(words),
        "prompts": list(texts),
        "steps": steps,
        "clock": clock,
        "seed": seed,
        "guidance": GUIDANCE,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "report.json").touch()
    except OSError as error:
        raise DemoError(
            "the demo writes a picture and a report into a folder",
            seen={"folder": path, "error": error},
            do="pass --out with a folder that can be written",
        ) from error
    return path


def _write(result: DemoResult) -> None:
    for name in ("grid.png", "report.json", "report.html"):
        result.save(result.folder / name)
    text = [
        "# Clockwork demo",
        "",
        f"`{result.settings['command']}`",
        "",
        result.table().to_markdown(),
        "",
        "![plain and Clockwork, side by side](grid.png)",
        "",
    ]
    (result.folder / "report.md").write_text("\n".join(text), encoding="utf-8")


def draw_grid(prompts: Sequence[str], rows: Sequence[Any], images: Mapping[str, Tensor]) -> Image.Image:
    """One cell a prompt: its pictures side by side, the caption below.

    Args:
        prompts: B of them.
        rows: the UNets that drew them, from left to right: each has name, macs_per_image, seconds_per_image, accuracy.
        images: name of the row → its pictures (B, 3, H, W) in [0, 1].

    Returns:
        An RGB picture; as wide as three or four cells, or fewer for fewer prompts.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS.get(len(rows), 3), len(prompts))
    width = len(rows) * SIDE + (len(rows) - 1) * GAP
    height = SIDE + CAPTION
    lines = -(-len(prompts) // columns)
    head, small = ImageFont.load_default(20), ImageFont.load_default(12)
    legend = "     ".join(_words(row) for row in rows)
    total = max(columns * (width + MARGIN) + MARGIN, math.ceil(small.getlength(legend)) + 2 * MARGIN)
    page = Image.new("RGB", (total, HEAD + lines * (height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 14), f"Each prompt: {' | '.join(row.name for row in rows)}", INK, font=head)
    draw.text((MARGIN, 44), legend, FAINT, font=small)
    for k, prompt in enumerate(prompts):
        left = MARGIN + k % columns * (width + MARGIN)
        top = HEAD + k // columns * (height + MARGIN)
        for j, row in enumerate(rows):
            picture = _picture(images[row.name][k]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            at = (left + j * (SIDE + GAP), top)
            page.paste(picture, at)
            draw.rectangle((*at, at[0] + SIDE - 1, at[1] + SIDE - 1), outline=EDGE)
        caption = "\n".join(textwrap.wrap(prompt, width // 6)[:3])
        draw.multiline_text((left, top + SIDE + 5), caption, INK, font=small, spacing=2)
    return page


def _words(row: Any) -> str:
    cost = f"{macs(row.macs_per_image)}, {duration(row.seconds_per_image)} an image"
    return f"{row.name}: {cost}, {row.accuracy:.1%} of attributes right"


def _picture(image: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
