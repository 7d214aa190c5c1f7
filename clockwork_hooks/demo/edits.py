"""Edits of the demo model's scenes: the same edit plain, with Clockwork, and without injection, judged.

The source's layout is known because the source is drawn; what is on the edited picture a classifier reads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clockwork_hooks.demo.captions import ANY, parse
from clockwork_hooks.demo.classifier import attribute_accuracy
from clockwork_hooks.demo.layout import layout_error
from clockwork_hooks.demo.model import DemoModel, load_demo, to_images, to_latents
from clockwork_hooks.demo.scenes import render, scenes_of
from clockwork_hooks.editing import edit, invert
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.graph import trace
from clockwork_hooks.injection import Injection, find_injection
from clockwork_hooks.plots import Plot, plots
from clockwork_hooks.rendering import Report
from clockwork_hooks.report import Table, macs, percent, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["EDITS", "GUIDANCE", "UNTIL_FEATURES", "EditRow", "SceneEdits", "edit_scenes"]

EDITS = (
    ("a large red circle left of a small green star on a white background", "red circle", "blue square"),
    ("a small yellow star above a large cyan ring on a dark blue background", "cyan ring", "orange square"),
    ("a large green triangle in the centre on a grey background", "green triangle", "pink star"),
    ("a small pink cross right of a large orange circle on a black background", "orange circle", "green square"),
)
GUIDANCE = 3.0
UNTIL_FEATURES = 0.3  # measured: at 16×16 the demo's features hold shape and colour too, and from 0.4 on they stay


@dataclass(frozen=True, slots=True)
class EditRow:
    """One way of editing, over all scenes.

    Attributes:
        name: "plain", "Clockwork", "plain, no injection".
        macs: of both loops and all scenes; convolutions and matrix products, attention products counted.
        saving: share of the MACs that did not run.
        seconds: wall time of both loops.
        accuracy: share of the target's attributes that the classifier finds.
        moved: mean distance of the objects' centres from the source's, in pixels of 64.
        grown: mean relative difference of the objects' radii.
        lost: objects that appeared or vanished.
    """

    name: str
    macs: int
    saving: float
    seconds: float
    accuracy: float
    moved: float
    grown: float
    lost: int


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
                f"{row.seconds:.1f} s",
                percent(row.accuracy),
                f"{row.moved:.2f} px",
                percent(row.grown),
                row.lost,
            )
            for row in self.rows
        ]
        notes = (
            f"{len(s['sources'])} scenes, {s['inversion_steps']} + {s['steps']} steps, clock {s['clock']}, identity "
            f"adaptor, guidance {s['guidance']:g}, τ_f = {s['until_features']:g}, τ_A = {s['until_attention']:g}; "
            "MACs of both loops and all scenes, attention products counted; pictures of 64 pixels.",
        )
        return table("Edits of the demo model's scenes", heads, rows, notes=notes)

    def data(self) -> dict[str, Any]:
        """Rows and settings."""
        return {"rows": [asdict(row) for row in self.rows], "settings": self.settings}

    def plot(self, path: str | Path) -> None:
        """A row a scene: the source and each edit (PNG, SVG or PDF; needs matplotlib)."""
        self._scenes().save(path)

    def figures(self) -> Sequence[Plot]:
        """A row a scene: the source and each edit."""
        return plots(self._scenes())

    def _scenes(self) -> Plot:
        return Plot(self._draw, "Scenes, a row each: the source and its edits")

    def _draw(self) -> Figure:
        from matplotlib.figure import Figure

        names, count = list(self.pictures), len(self.settings["sources"])
        figure = Figure(figsize=(1.6 * len(names) + 0.2, 1.85 * count + 0.2), dpi=110, layout="constrained")
        for r, axes in enumerate(figure.subplots(count, len(names), squeeze=False)):
            for one, name in zip(axes, names, strict=True):
                one.imshow(self.pictures[name][r].permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=1)
                one.set(xticks=[], yticks=[], title=name if r == 0 else "")
                one.title.set_fontsize(9)
            told = f"{self.settings['sources'][r]}\n→ {self.settings['targets'][r]}"
            axes[0].set_xlabel(told, fontsize=6, loc="left")
        return figure


def edit_scenes(
    edits: Sequence[tuple[str, str, str]] = EDITS,
    *,
    inversion_steps: int = 40,
    steps: int = 20,
    clock: int = 2,
    guidance: float = GUIDANCE,
    until_features: float = UNTIL_FEATURES,
    until_attention: float = 0.5,
    seed: int = 3,
    model: DemoModel | None = None,
    console: Console | None = None,
) -> SceneEdits:
    """Draw scenes, edit each in three ways, and judge the results.

    Args:
        edits: (caption of the source, words to replace, words in their place); captions tell all of their scene.
        inversion_steps, steps, clock, guidance: as in `clockwork_hooks.editing.edit`.
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
    sources, targets = [old for old, _, _ in edits], [old.replace(what, new) for old, what, new in edits]
    wanted = parse([*sources, *targets])[: len(sources)]
    same = [old for old, new in zip(sources, targets, strict=True) if old == new]
    if not edits or same or (wanted == ANY).any():
        raise ArgumentError(
            "an edit replaces words of a caption that tells all: sizes, colours, shapes, places, background",
            seen={"captions": sources, "nothing replaced in": same or "none"},
            do=f'pass ("{EDITS[0][0]}", "{EDITS[0][1]}", "{EDITS[0][2]}")',
        )
    demo = model or load_demo()
    picture = render(scenes_of(wanted, seed), device=demo.device)
    latents, solver = to_latents(picture), demo.scheduler("ddim")
    told, new = demo.encode_prompts([*sources, *targets], guided=False).chunk(2)
    found = find_injection(
        trace(demo.unet, latents[:1], 500, encoder_hidden_states=told[:1]),
        until_features=until_features,
        until_attention=until_attention,
    )
    rows, pictures = [], {"source": picture}
    ways = (("plain", 1, found), ("Clockwork", clock, found), ("plain, no injection", 1, Injection()))
    for name, ticks, injection in ways:
        begun = time.perf_counter()
        way = invert(demo.unet, solver, latents, told, steps=inversion_steps, clock=ticks, console=console)
        options: dict[str, Any] = {"guidance": guidance, "clock": ticks, "injection": injection, "console": console}
        made = edit(demo.unet, solver, way, target=new, negative=told, steps=steps, **options)
        pictures[name] = to_images(made.latents)
        seconds = time.perf_counter() - begun
        right = attribute_accuracy(demo.classifier, pictures[name], targets).total
        rows.append(EditRow(name, made.macs, made.saving, seconds, right, *layout_error(picture, pictures[name])))
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
