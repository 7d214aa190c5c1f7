"""`clockwork-hooks demo`: the same prompts with the plain UNet and with Clockwork, measured side by side."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from clockwork_hooks._numbers import count, duration, macs, percent
from clockwork_hooks._version import versions
from clockwork_hooks.analysis.calibration import calibrate
from clockwork_hooks.analysis.timing import device_name, measured
from clockwork_hooks.demo.captions import decode, parse, write_captions
from clockwork_hooks.demo.classifier import attribute_accuracy
from clockwork_hooks.demo.model import DEMO_PROMPTS, GUIDANCE, LATENT_SHAPE, DemoModel, load_demo, to_picture
from clockwork_hooks.demo.scenes import draw_split
from clockwork_hooks.demo.weights import WEIGHTS
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.errors import DemoError, NoEffectWarning, need, whole
from clockwork_hooks.metrics import psnr
from clockwork_hooks.regions.find import find_regions
from clockwork_hooks.regions.region import Region
from clockwork_hooks.reports.plots import Bitmap
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule, check_clock

if TYPE_CHECKING:
    from PIL import Image

    from clockwork_hooks.adaptors import CalibratedAdaptor
    from clockwork_hooks.engine.stats import Stats

ROUNDS, MOST_ROUNDS = 2, 4  # of timing all ways; more than two where the two best times of one of them differ
ALIKE = 1.15  # times that differ by less
PLAIN, DEEPCACHE, IDENTITY, CALIBRATED = "plain", "DeepCache's setting", "identity", "calibrated"
CAPTIONS = 16  # training captions that the adaptor is calibrated with
ADAPTOR = WEIGHTS / "adaptor"
SHOWN = 4  # prompts in the picture
SIDE, GAP, MARGIN, CAPTION, HEAD = 256, 12, 24, 30, 98
DETAIL = (16, 32)  # of a picture's pixels, rows and columns
INK, FAINT, EDGE, MARK, PAPER = (24, 24, 27), (113, 113, 122), (212, 212, 216), (220, 38, 38), (255, 255, 255)


@dataclass(slots=True)
class _Way:
    """A way of sampling, and what its rounds have shown.

    Attributes:
        adaptor, schedule: of Clockwork; no schedule is the plain UNet.
        times: seconds of each round.
        images: of the last round.
        stats: of the last round; None of the plain UNet.
    """

    adaptor: CalibratedAdaptor | None = None
    schedule: Schedule | None = None
    times: list[float] = field(default_factory=list)
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    stats: Stats | None = None

    def run(self, model: DemoModel, region: Region, sample: Callable[[], Tensor]) -> None:
        """One round more."""
        with contextlib.ExitStack() as wrapped:
            if self.schedule is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", NoEffectWarning)  # of so few steps none is saved: the table says so
                    cw = wrapped.enter_context(wrap(model.unet, self.adaptor, region=region, schedule=self.schedule))
                wrapped.enter_context(cw.trajectory())
                self.stats = cw.stats
            self.images, seconds = measured(sample, model.device)
        self.times.append(seconds)


@dataclass(frozen=True, slots=True)
class Row:
    """One way of sampling, measured over all prompts.

    Attributes:
        name: "plain", "DeepCache's setting", "identity" or "calibrated".
        macs_per_image: of the UNet: convolutions and matrix products, attention products and both guidance branches
            counted.
        seconds_per_image: wall time of sampling, the best of two or more interleaved rounds.
        speed_up: of that time, against plain.
        psnr: mean over the pictures, to the plain pictures from the same noise, in dB; None for plain itself.
        accuracy: share of the captioned attributes that a classifier finds in the pictures, 0 to 1.
        full_passes: calls of the whole UNet in one round.
        adaptor_passes: calls in which the cached feature, or the calibrated adaptor, stood in for the region.
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
        settings: prompts, steps, clock, seed, guidance, schedules, calibration, machine, versions, command.
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
        calibration = settings["calibration"]
        notes: tuple[str, ...] = (
            f"{count(len(settings['prompts']), 'prompt')}, {count(settings['steps'], 'DPM++ step')}, guidance "
            f"{settings['guidance']:g}, seed {settings['seed']}. MACs of the UNet and its adaptor, attention products "
            "and both guidance branches counted.",
            f"F is a full step; in a step A the part named below is skipped. DeepCache's setting: {settings['every']}; "
            "what the part returned one step before is used as it is. Identity: the same at other steps, "
            f"{settings['spread']}. Calibrated: at these steps, corrected by a linear adaptor."
            if settings["clock"] > 1
            else "Clock 1: every step is full.",
            f"Calibrated just now: {calibration['kind']}, from {calibration['captions']} captions that are not drawn "
            f"here, in {duration(calibration['seconds'])}. No training."
            if calibration
            else "",
            "Attributes right: the colours, shapes, sizes and places of the captions that a classifier finds. Time: "
            f"the best of {count(settings['rounds'], 'round')}; "
            + (
                "other work on this machine changes it, and not the MACs."
                if settings["steady"]
                else "other work on this machine disturbed it: run the demo again before you rely on a time."
            ),
            f"Skipped on adaptor passes: {self.region}.",
        )
        notes = tuple(filter(None, notes))
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

    Three ways to skip the widest region: DeepCache's setting, which is every step between two of the clock's; the
    identity at as many steps in better places (`Schedule.spread`); and an adaptor for these steps, which is calibrated
    here and now.

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
    call = torch.zeros(len(hidden), *LATENT_SHAPE), torch.tensor(1)
    region = find_regions(model.unet, *call, encoder_hidden_states=hidden)[0]
    plain, spread = Schedule.every(clock), Schedule.at(Schedule.spread(clock).adaptor_steps(steps))
    ways = {PLAIN: _Way(), DEEPCACHE: _Way(None, plain), IDENTITY: _Way(None, spread)}
    calibration = None
    with ProgressBar(console) as bar:
        skips = spread.bounds(steps)[0] < steps
        total = steps * (3 + 4 * ROUNDS if skips else 1 + 3 * ROUNDS)
        task = bar.add_task("calibrating", total=total)

        def tick(what: str) -> Callable[[int, int, Tensor], None]:
            def advance(number: int, t: int, latents: Tensor) -> None:
                bar.update(task, advance=1, description=f"{what}, step {number + 1} of {steps}")

            return advance

        model.sample(texts[:1], steps=steps, callback=tick("warming up"))  # first calls are slower
        if skips:
            adaptor = _calibrated(model, steps, spread, region, tick("calibrating"))
            ways[CALIBRATED] = _Way(adaptor, spread)
            report = adaptor.report
            calibration = {"kind": report.kind, "captions": CAPTIONS, "seconds": report.seconds}
        for number in range(MOST_ROUNDS):
            if number >= ROUNDS:
                if _steady(ways):
                    break
                total += steps * len(ways)
                bar.update(task, total=total)
            for name, way in ways.items():
                way.run(model, region, partial(model.sample, texts, steps=steps, seed=seed, callback=tick(name)))
    rows = tuple(_row(name, ways, model, texts, steps) for name in ways)
    settings = _settings(texts, steps, clock, seed)
    settings |= {"every": plain.preview(steps), "spread": spread.preview(steps), "calibration": calibration}
    settings |= {"rounds": len(ways[PLAIN].times), "steady": _steady(ways)}
    images = {name: way.images for name, way in ways.items()}
    result = DemoResult(rows, images, region.line, settings, folder)
    _write(result)
    return result


def _calibrated(
    model: DemoModel, steps: int, schedule: Schedule, region: Region, callback: Callable[[int, int, Tensor], None]
) -> CalibratedAdaptor:
    """An adaptor for these steps, from captions of the training set."""
    captions = decode(write_captions(draw_split(CAPTIONS, 11, test=False), 11))
    return calibrate(
        model.unet,
        lambda batch: model.sample(batch, steps=steps, seed=1_000_000, callback=callback),
        [captions],
        guidance=GUIDANCE,
        schedule=schedule,
        region=region,
        log_snr=model.scheduler(),
        steps=steps,
        console=Console(quiet=True),
    )


def _steady(ways: Mapping[str, _Way]) -> bool:
    """Whether the two best times of each way are alike: other work has not disturbed both."""
    best = [sorted(way.times)[:2] for way in ways.values()]
    return all(one[-1] <= ALIKE * one[0] for one in best)


def _row(name: str, ways: Mapping[str, _Way], model: DemoModel, texts: Sequence[str], steps: int) -> Row:
    way, plain, stats = ways[name], ways[PLAIN], ways[name].stats
    macs = next(one.stats.macs_plain for one in ways.values() if one.stats) if stats is None else stats.macs_run
    return Row(
        name=name,
        macs_per_image=macs // len(texts),
        seconds_per_image=min(way.times) / len(texts),
        speed_up=min(plain.times) / min(way.times),
        psnr=None if stats is None else float(psnr(way.images, plain.images).mean()),
        accuracy=attribute_accuracy(model.classifier, way.images, texts).total,
        full_passes=steps if stats is None else stats.full_passes,
        adaptor_passes=0 if stats is None else stats.adaptor_passes,
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
    """A line a prompt: its pictures side by side, enlarged, each with a detail below it; the first four prompts.

    The detail is where the pictures of the rows differ most from the first row's.

    Args:
        prompts: B of them.
        rows: the UNets that drew them, from left to right: each has name, macs_per_image, seconds_per_image, accuracy
            and psnr.
        images: name of the row → its pictures (B, 3, H, W) in [0, 1].
    """
    from PIL import Image, ImageDraw, ImageFont

    head, text, small = (ImageFont.load_default(size) for size in (20, 14, 12))
    zoom = SIDE * DETAIL[0] // DETAIL[1]
    height, shown = CAPTION + SIDE + GAP // 2 + zoom + MARGIN, prompts[:SHOWN]
    page = Image.new("RGB", (2 * MARGIN + len(rows) * (SIDE + GAP) - GAP, HEAD + len(shown) * height), PAPER)
    draw = ImageDraw.Draw(page)
    for column, row in enumerate(rows):
        left = MARGIN + column * (SIDE + GAP)
        draw.text((left, 12), row.name, INK, font=head)
        for k, words in enumerate(_words(row, rows[0])):
            draw.text((left, 40 + 17 * k), words, FAINT, font=small)
    for line, prompt in enumerate(shown):
        top = HEAD + line * height
        draw.text((MARGIN, top + 6), prompt, INK, font=text)
        y, x = _detail([images[row.name][line] for row in rows])
        for column, row in enumerate(rows):
            at = (MARGIN + column * (SIDE + GAP), top + CAPTION)
            below = (at[0], at[1] + SIDE + GAP // 2)
            picture = to_picture(images[row.name][line])
            factor = SIDE / picture.width
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), at)
            detail = picture.crop((x, y, x + DETAIL[1], y + DETAIL[0]))
            page.paste(detail.resize((SIDE, zoom), Image.Resampling.NEAREST), below)
            draw.rectangle((*at, at[0] + SIDE - 1, at[1] + SIDE - 1), outline=EDGE)
            edge = [at[0] + x * factor, at[1] + y * factor]
            draw.rectangle((*edge, edge[0] + DETAIL[1] * factor - 1, edge[1] + DETAIL[0] * factor - 1), outline=MARK)
            draw.rectangle((*below, below[0] + SIDE - 1, below[1] + zoom - 1), outline=MARK)
    return page


def _detail(pictures: Sequence[Tensor]) -> tuple[int, int]:
    """Top and left of the window in which the pictures differ most from the first one."""
    off = sum((picture - pictures[0]).square().sum(0) for picture in pictures)
    windows = functional.avg_pool2d(torch.as_tensor(off).float()[None, None], DETAIL, stride=1)[0, 0]
    return divmod(int(windows.argmax()), windows.shape[1])


def _words(row: Any, plain: Any) -> list[str]:
    """What a row costs and is worth, in three lines."""
    saved = "" if row is plain else f", {percent(1 - row.macs_per_image / plain.macs_per_image)} fewer"
    psnr = getattr(row, "psnr", None)
    near = "" if psnr is None else f"{psnr:.1f} dB to plain, "
    return [
        f"{macs(row.macs_per_image)}{saved}",
        f"{duration(row.seconds_per_image)} an image",
        f"{near}{row.accuracy:.1%} right",
    ]
