"""Edits of the demo model's scenes, plain, with Clockwork and without injection, and how well each came out.

The source's layout is known because the source is drawn; a classifier reads what is on the edited picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from clockwork_hooks._numbers import count, duration, macs, percent
from clockwork_hooks.analysis.timing import measured
from clockwork_hooks.demo.captions import ANY, parse
from clockwork_hooks.demo.classifier import AttributeClassifier, score
from clockwork_hooks.demo.evaluate import held_out_prompts
from clockwork_hooks.demo.model import DemoModel, load_demo, to_images, to_latents
from clockwork_hooks.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, render, scenes_of
from clockwork_hooks.editing import Injection, Inversion, edit, find_injection, invert
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph.tracing import trace
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule, check_clock

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class SceneScore:
    """One edited scene, judged.

    Attributes:
        right: of the target's attributes, how many the classifier finds.
        asked: how many there are.
        moved: mean distance of the objects' centres from the source's, in pixels of 64.
        grown: mean relative difference of the objects' radii.
        lost: objects that appeared or vanished.
    """

    right: int
    asked: int
    moved: float
    grown: float
    lost: int


def scores_of(
    classifier: AttributeClassifier, sources: Tensor, pictures: Tensor, wanted: NDArray[np.int64]
) -> tuple[SceneScore, ...]:
    """Judge edited pictures.

    Args:
        classifier: reads them.
        sources, pictures: (B, 3, 64, 64) in [0, 1], before and after.
        wanted: (B, 9) the targets' attributes, as `captions.parse` gives them.

    Returns:
        A score a scene.
    """
    seen, scores = classifier.read(pictures), []
    for k in range(len(pictures)):
        accuracy = score(seen[k : k + 1], wanted[k : k + 1])
        layout = layout_error(sources[k : k + 1], pictures[k : k + 1])
        scores.append(SceneScore(round(accuracy.total * accuracy.asked), accuracy.asked, *layout))
    return tuple(scores)


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference, and the interval that holds 95% of it when scenes are drawn again (bootstrap, in pairs)."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Each number in the given way: "+5.3% (-3.0% to +12.1%)"."""
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


@dataclass(frozen=True, slots=True)
class EditRow:
    """One way of editing, over all scenes.

    Attributes:
        name: "plain", "Clockwork", "plain, no injection", ...
        macs: of both loops and one scene; convolutions and matrix products, attention products counted.
        macs_plain: the same without Clockwork.
        seconds: wall time of both loops and all scenes, edited in one batch.
        scenes: how each came out.
    """

    name: str
    macs: int
    macs_plain: int
    seconds: float
    scenes: tuple[SceneScore, ...]

    @property
    def saving(self) -> float:
        """Share of the MACs that did not run."""
        return 1 - self.macs / self.macs_plain

    @property
    def accuracy(self) -> float:
        """Share of all targets' attributes that the classifier finds."""
        return self._means()["accuracy"]

    @property
    def moved(self) -> float:
        """`SceneScore.moved`, in the mean over scenes."""
        return self._means()["moved"]

    @property
    def grown(self) -> float:
        """`SceneScore.grown`, in the mean over scenes."""
        return self._means()["grown"]

    @property
    def lost(self) -> int:
        """Objects that appeared or vanished, in all scenes."""
        return sum(scene.lost for scene in self.scenes)

    def against(self, plain: EditRow) -> dict[str, Gap]:
        """How it differs from the plain edit of the same scenes.

        Args:
            plain: what to compare with.

        Returns:
            "accuracy" as a difference, "moved" and "grown" relative to plain.
        """
        draws = np.random.default_rng(0).integers(0, len(self.scenes), (_DRAWS, len(self.scenes)))
        mine, other = _drawn(self.scenes, draws), _drawn(plain.scenes, draws)
        here, there = self._means(), plain._means()
        with np.errstate(divide="ignore", invalid="ignore"):
            gaps = {name: (here[name] / there[name] - 1, mine[name] / other[name] - 1) for name in ("moved", "grown")}
        gaps["accuracy"] = here["accuracy"] - there["accuracy"], mine["accuracy"] - other["accuracy"]
        return {name: Gap(float(value), *_middle(drawn)) for name, (value, drawn) in gaps.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, and the means."""
        names = ("saving", "accuracy", "moved", "grown", "lost")
        return asdict(self) | {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EditRow:
        """What `to_dict` gave; means are computed again."""
        scenes = tuple(SceneScore(**scene) for scene in data["scenes"])
        return cls(data["name"], data["macs"], data["macs_plain"], data["seconds"], scenes)

    def _means(self) -> dict[str, float]:
        means = _drawn(self.scenes, np.arange(len(self.scenes))[None])
        return {name: float(values[0]) for name, values in means.items()}


def _drawn(scenes: tuple[SceneScore, ...], draws: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Means over each row of scenes."""
    right, asked, moved, grown = (
        np.array([getattr(scene, name) for scene in scenes], dtype=np.float64)[draws]
        for name in ("right", "asked", "moved", "grown")
    )
    return {"accuracy": right.sum(1) / asked.sum(1), "moved": moved.mean(1), "grown": grown.mean(1)}


def _middle(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


EDITS = (
    ("a large red circle left of a small green star on a white background", "red circle", "blue square"),
    ("a small yellow star above a large cyan ring on a dark blue background", "cyan ring", "orange square"),
    ("a large green triangle in the centre on a grey background", "green triangle", "pink star"),
    ("a small pink cross right of a large orange circle on a black background", "orange circle", "green square"),
)
GUIDANCE = 3.0
UNTIL_FEATURES = 0.3  # measured (docs/editing.md): at 16×16 the demo's features hold shape and colour too


@dataclass(frozen=True, slots=True)
class Way:
    """A way of editing, to be compared.

    Attributes:
        name: in the table.
        inversion_clock, clock: of the two loops.
        full: of the way back, the share of the first steps that are full, whatever the clock says.
        injects: False for no injection at all.
        until_features, until_attention: τ_f and τ_A; None for those of the whole comparison.
        adaptor: folder of a saved one; None for the identity.
    """

    name: str
    inversion_clock: int = 1
    clock: int = 1
    full: float = 0.0
    injects: bool = True
    until_features: float | None = None
    until_attention: float | None = None
    adaptor: str | None = None


def usual_ways(clock: int) -> tuple[Way, ...]:
    """Plain, Clockwork, and what plain editing does without injection."""
    return (Way("plain"), Way("Clockwork", clock, clock), Way("plain, no injection", injects=False))


@dataclass(frozen=True, slots=True)
class SceneEdits(Report):
    """What `edit_scenes` measured.

    Attributes:
        rows: ways of editing.
        settings: sources, targets, steps, clock, guidance, shares, seed.
        pictures: "source" and each way's name → (B, 3, 64, 64) pictures.
    """

    SCHEMA = "edits/1"

    rows: tuple[EditRow, ...]
    settings: dict[str, Any]
    pictures: dict[str, Tensor] = field(repr=False, compare=False)

    def table(self) -> Table:
        """A row a way of editing."""
        s = self.settings
        heads = ("edit", ">MACs", ">saved", ">time", ">attributes right", ">objects moved", ">resized", ">lost")
        rows = [
            (
                row.name,
                macs(row.macs),
                percent(row.saving),
                duration(row.seconds / len(row.scenes)),
                percent(row.accuracy),
                f"{row.moved:.2f} px",
                percent(row.grown),
                row.lost,
            )
            for row in self.rows
        ]
        notes = (
            f"{count(len(s['sources']), 'scene')}, {s['inversion_steps']} + {s['steps']} steps, clock {s['clock']}, "
            f"identity adaptor, guidance {s['guidance']:g}, τ_f = {s['until_features']:g}, "
            f"τ_A = {s['until_attention']:g}; MACs and time of both loops and one scene, attention "
            "products counted; pictures of 64 pixels.",
        )
        return table("Edits of the demo model's scenes", heads, rows, notes=notes)

    def data(self) -> dict[str, Any]:
        """Rows and settings."""
        return {"rows": [row.to_dict() for row in self.rows], "settings": self.settings}

    def plot(self, path: str | Path) -> None:
        """A row a scene, of the first eight: the source and each edit (PNG, SVG or PDF; needs matplotlib)."""
        self._scenes().save(path)

    def figures(self) -> Sequence[Plot]:
        """A row a scene, of the first eight: the source and each edit."""
        return plots(self._scenes())

    def _scenes(self) -> Plot:
        return Plot(self._draw, "Scenes, a row each: the source and its edits")

    def _draw(self) -> Figure:
        from matplotlib.figure import Figure

        names, count = list(self.pictures), min(8, len(self.pictures["source"]))
        figure = Figure(figsize=(1.6 * len(names) + 0.2, 1.85 * count + 0.2), dpi=110)
        figure.set_layout_engine("constrained", h_pad=0.08)
        for r, axes in enumerate(figure.subplots(count, len(names), squeeze=False)):
            for one, name in zip(axes, names, strict=True):
                one.imshow(self.pictures[name][r].permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=1)
                one.set(xticks=[], yticks=[], title=name if r == 0 else "")
                one.title.set_fontsize(9)
            words = f"{self.settings['sources'][r]}\n→ {self.settings['targets'][r]}"
            caption = axes[0].text(0, -0.04, words, fontsize=6, va="top", transform=axes[0].transAxes)
            caption.set_in_layout(False)  # it may reach under the next ones
            axes[-1].set_xlabel(" \n ", fontsize=6)  # and has its lines' height
        return figure


def draw_edits(count: int, seed: int = 7) -> list[tuple[str, str, str]]:
    """Edits drawn at random, of scenes that training never saw: one object takes another shape and another colour.

    Args:
        count: how many.
        seed: the same one draws the same edits.

    Returns:
        (caption, words to replace, words in their place), as `edit_scenes` takes them.
    """
    rng, edits = np.random.default_rng(seed), list[tuple[str, str, str]]()
    captions = held_out_prompts(2 * count + 8, seed)
    for caption, attributes in zip(captions, parse(captions), strict=True):
        shape, colour = attributes[3:5] if attributes[1] == 0 or rng.random() < 0.5 else attributes[6:8]
        old = f"{list(COLOURS)[colour]} {SHAPES[shape]}"
        white = list(BACKGROUNDS)[attributes[0]] == "white"  # on which nothing white is seen
        colours = [name for k, name in enumerate(COLOURS) if k != colour and not (white and name == "white")]
        shapes = [name for k, name in enumerate(SHAPES) if k != shape]
        if caption.count(old) == 1:
            edits.append((caption, old, f"{rng.choice(colours)} {rng.choice(shapes)}"))
    return edits[:count]


def edit_scenes(
    edits: Sequence[tuple[str, str, str]] = EDITS,
    *,
    inversion_steps: int = 40,
    steps: int = 20,
    clock: int = 2,
    ways: Sequence[Way] | None = None,
    guidance: float = GUIDANCE,
    until_features: float = UNTIL_FEATURES,
    until_attention: float = 0.5,
    seed: int = 3,
    model: DemoModel | None = None,
    console: Console | None = None,
) -> SceneEdits:
    """Draw scenes, edit all of them at once in several ways, and judge the results.

    Args:
        edits: (caption of the source, words to replace, words in their place); captions tell all of their scene.
        inversion_steps, steps, guidance: as in `clockwork_hooks.editing.edit`.
        clock: of both loops in the row "Clockwork".
        ways: what is compared, the plain edit first; None for `usual_ways(clock)`.
        until_features, until_attention: τ_f and τ_A.
        seed: of the scenes' geometry.
        model: the demo model; None to load it.
        console: where the progress bars go; None for standard error.

    Returns:
        The measurements and pictures.

    Raises:
        ArgumentError: the words to replace are not in the caption, or the caption leaves something open.
        UnknownWordError: a caption has words that the model has never seen.
    """
    check_clock(clock)
    sources, targets, wanted = _captions(edits)
    demo = model or load_demo()
    picture = render(scenes_of(wanted[: len(sources)], seed), device=demo.device)
    source_text, target_text = demo.encode_prompts([*sources, *targets], guided=False).chunk(2)
    latents, solver = to_latents(picture), demo.scheduler("ddim")
    traced = trace(demo.unet, latents[:1].to(demo.unet.dtype), 500, encoder_hidden_states=source_text[:1])
    rows, pictures, inversions = [], {"source": picture}, dict[Any, tuple[Inversion, float]]()
    for way in ways or usual_ways(clock):
        common: dict[str, Any] = {"adaptor": way.adaptor, "console": console}
        forth = (way.inversion_clock, way.adaptor if way.inversion_clock > 1 else None)
        if forth not in inversions:
            arguments = {"steps": inversion_steps, "clock": way.inversion_clock, **common}
            inversions[forth] = measured(
                partial(invert, demo.unet, solver, latents, source_text, **arguments), demo.device
            )
        inversion, seconds_forth = inversions[forth]
        shares = {"until_features": until_features, "until_attention": until_attention}
        shares |= {name: share for name in shares if (share := getattr(way, name)) is not None}
        run_back = partial(
            edit,
            demo.unet,
            solver,
            inversion,
            target=target_text,
            negative=source_text,
            steps=steps,
            guidance=guidance,
            schedule=Schedule.every(way.clock, warmup=round(way.full * steps)),
            injection=find_injection(traced, **shares) if way.injects else Injection(),
            **common,
        )
        edited, seconds_back = measured(run_back, demo.device)
        pictures[way.name] = to_images(edited.latents)
        scores = scores_of(demo.classifier, picture, pictures[way.name], wanted[len(sources) :])
        macs_each, plain_each = edited.macs // len(edits), edited.macs_plain // len(edits)
        rows.append(EditRow(way.name, macs_each, plain_each, seconds_forth + seconds_back, scores))
    settings = {
        "sources": sources,
        "targets": targets,
        "inversion_steps": inversion_steps,
        "steps": steps,
        "clock": clock,
        "guidance": guidance,
        "until_features": until_features,
        "until_attention": until_attention,
        "seed": seed,
    }
    return SceneEdits(tuple(rows), settings, pictures)


def _captions(edits: Sequence[tuple[str, str, str]]) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Captions of the sources and of the targets, and the attributes (2B, 9) that both name."""
    sources, targets = [old for old, _, _ in edits], [old.replace(what, new) for old, what, new in edits]
    wanted = parse([*sources, *targets])
    like_this = f'("{EDITS[0][0]}", "{EDITS[0][1]}", "{EDITS[0][2]}")'
    same = [(old, what) for (old, what, _), new in zip(edits, targets, strict=True) if old == new]
    if same or not edits:
        raise ArgumentError(
            "an edit replaces words of its caption by others",
            seen={f"changes nothing, {what!r} in": old for old, what in same} or {"edits": "none"},
            do=f"pass words that the caption has, as in {like_this}",
        )
    half = [old for old, attributes in zip(sources, wanted, strict=False) if (attributes == ANY).any()]
    if half:
        raise ArgumentError(
            "the caption of an edited scene must name everything: sizes, colours, shapes, places, background",
            seen={f"leaves something open ({k + 1})": old for k, old in enumerate(half)},
            do=f"write it like the first of {like_this}",
        )
    return sources, targets, wanted


_FAR = 0.25  # of a colour channel in [0, 1]: more than tints and a sampler's shading
_SMALLEST = 12  # pixels


def objects(picture: Tensor) -> NDArray[np.float64]:
    """The objects of a picture: regions that hang together and differ from the background.

    Args:
        picture: (3, H, W) in [0, 1]; its border is background.

    Returns:
        (N, 3) rows of centre x, centre y and radius √(area/π) in pixels, largest first.
    """
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
    background = border.median(1).values
    mask = ((picture - background[:, None, None]).abs().amax(0) > _FAR).cpu().numpy()
    discs: list[tuple[Any, ...]] = []
    labels = _labels(mask)
    for label in range(1, int(labels.max()) + 1):
        y, x = np.nonzero(labels == label)
        if len(x) >= _SMALLEST:
            discs.append((x.mean(), y.mean(), (len(x) / np.pi) ** 0.5))
    return np.array(sorted(discs, key=lambda row: -row[2]), dtype=np.float64).reshape(-1, 3)


def _labels(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers the connected parts, from 1: each pixel takes its neighbours' largest number until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        around = np.max(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0
        )
        spread = np.where(mask, around, 0)
        if (spread == labels).all():
            break
        labels = spread
    return np.searchsorted(np.unique(np.append(labels, 0)), labels).astype(np.int64)


def layout_error(before: Tensor, after: Tensor) -> tuple[float, float, int]:
    """How far objects have moved, and how much they have grown or shrunk.

    Each object of the first picture is compared with the nearest one of the second. One that has none within its own
    radius is gone from its place, wherever the nearest may be: it counts as moved by its radius.

    Args:
        before, after: (B, 3, H, W) pictures in [0, 1].

    Returns:
        Mean distance of the centres in pixels, mean relative difference of the radii (1 for those gone), and the
        number of objects that appeared or vanished; 0 for the means if the first pictures show none.

    Example:
        >>> import torch
        >>> first, second = torch.zeros(2, 1, 3, 64, 64)
        >>> first[..., 10:20, 10:20] = 1
        >>> second[..., 10:20, 13:23] = 1
        >>> layout_error(first, second)
        (3.0, 0.0, 0)
    """
    moved, grown, lost = [], [], 0
    for one, other in zip(before, after, strict=True):
        old, new = objects(one), objects(other)
        lost += abs(len(old) - len(new))
        for x, y, radius in old:
            far = np.hypot(new[:, 0] - x, new[:, 1] - y)
            there = len(far) > 0 and far.min() <= radius
            moved.append(far.min() if there else radius)
            grown.append(abs(new[far.argmin(), 2] / radius - 1) if there else 1.0)
    return float(np.mean(moved or [0])), float(np.mean(grown or [0])), lost
