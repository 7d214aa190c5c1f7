"""The tables of docs/editing.md, from benchmarks/results/edits_demo.json, and its picture.

python -m benchmarks.edits_tables
"""

from __future__ import annotations

import json
import shlex
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.analysis_demo import shrink
from benchmarks.analysis_tables import filled
from clockwork_hooks._numbers import macs, percent
from clockwork_hooks.demo.edits import EditRow, Gap, SceneEdits
from clockwork_hooks.reports.tables import Table, table

ROOT = Path(__file__).parents[1]
LEAST, POINTS, LAYOUT = 0.30, 0.01, 0.05  # the target: MACs saved, attributes lost, layout error added
RESULTS, PAGE = ROOT / "benchmarks/results/edits_demo.json", ROOT / "docs/editing.md"


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Marker → Markdown, for each marker of the page."""
    runs = {name: _rows(run) for name, run in data["runs"].items()}
    steps = {int(name.partition("/")[2]): rows for name, rows in runs.items() if name.startswith("steps/")}
    ways = [row for name, rows in runs.items() if name.startswith("ways/") for row in rows]
    found = {"edits": _means(steps, data), "edits-against-plain": _gaps(steps, ways, data)}
    if "shares" in runs:
        found["edits-shares"] = _shares(runs["shares"], data)
    return {name: f"{made.to_markdown()}\n\n{_measured(data)}" for name, made in found.items()}


def _rows(run: dict[str, Any]) -> list[EditRow]:
    return [EditRow.from_dict(row) for row in run["rows"]]


def _milliseconds(row: EditRow) -> float:
    return 1000 * row.seconds / len(row.scenes)


def _quality(row: EditRow) -> tuple[object, ...]:
    return percent(row.accuracy), f"{row.moved:.2f} px", percent(row.grown), row.lost


def _means(steps: dict[int, list[EditRow]], data: dict[str, Any]) -> Table:
    heads = (">inversion steps", "edit", ">MACs", ">saved", ">time", ">attributes right", ">moved", ">resized", ">lost")
    rows = [
        (n, row.name, macs(row.macs), percent(row.saving), f"{_milliseconds(row):.0f} ms", *_quality(row))
        for n in sorted(steps)
        for row in steps[n]
    ]
    settings = next(iter(data["runs"].values()))["settings"]
    note = (
        f"{data['setting']['scenes']} scenes, {settings['steps']} steps back, clock {settings['clock']}, identity "
        f"adaptor, guidance {settings['guidance']:g}, τ_f = {settings['until_features']:g}, "
        f"τ_A = {settings['until_attention']:g}. MACs and time of both loops and one scene, all scenes in one batch, "
        "attention products counted."
    )
    return table("Edits over the number of inversion steps", heads, rows, notes=(note,))


def _gaps(steps: dict[int, list[EditRow]], ways: list[EditRow], data: dict[str, Any]) -> Table:
    plain, _, free = steps[100]
    compared = [(f"clock 2, {n} inversion steps", rows[1], rows[0]) for n, rows in sorted(steps.items())]
    compared += [(row.name, row, plain) for row in [*ways, free]]
    rows = []
    for name, row, other in compared:
        gaps = row.against(other)
        points = Gap(*(100 * share for share in astuple(gaps["accuracy"])))
        shown = f"{points:+.1f}", f"{gaps['moved']:+.1%}", f"{gaps['grown']:+.1%}"
        rows.append((name, percent(row.saving), *shown, _verdict(row, gaps) if other is plain else None))
    note = (
        "Attributes as a difference in percentage points; position and size errors relative to the plain edit's. In "
        f"brackets the interval that holds 95% when the {data['setting']['scenes']} scenes are drawn again "
        "(bootstrap, in pairs). 100 inversion steps where nothing else is said. *Target*, at 100 inversion steps: "
        f"{LEAST:.0%} of the MACs saved, attributes at most {100 * POINTS:.0f} point below, position and size errors "
        f"at most {LAYOUT:.0%} above the plain edit's; by the means."
    )
    heads = ("edit", ">saved", ">attributes right, points", ">moved", ">resized", "target")
    return table("Against the plain edit of the same scenes", heads, rows, notes=(note,))


def _verdict(row: EditRow, gaps: dict[str, Gap]) -> str:
    met = row.saving >= LEAST and gaps["accuracy"].value >= -POINTS
    met = met and all(gaps[name].value <= LAYOUT for name in ("moved", "grown"))
    return "met" if met else "missed"


def _shares(rows: list[EditRow], data: dict[str, Any]) -> Table:
    heads = ("τ_f, τ_A", ">attributes right", ">moved", ">resized", ">lost")
    note = f"{data['setting']['scenes']} scenes, 50 + 20 steps, clock 1."
    return table("Shares of injection", heads, [(row.name, *_quality(row)) for row in rows], notes=(note,))


def _measured(data: dict[str, Any]) -> str:
    last = list(data["runs"].values())[-1]["environment"]
    setting, seconds = data["setting"], sum(run["seconds"] for run in data["runs"].values())
    options = [word for name in ("scenes", "seed", "device") for word in (f"--{name}", str(setting[name]))]
    return (
        f"`{shlex.join(['python', '-m', 'benchmarks.edits_demo', *options])}`, {seconds:.0f} s on {last['device']}, "
        f"torch {last['versions']['torch']}, {last['date']}."
    )


def draw(data: dict[str, Any], pictures: Path, path: Path) -> None:
    """The first scenes of the target's run, with few enough bytes for a page."""
    with np.load(pictures) as kept:
        shown = {name: torch.from_numpy(kept[name]) / 255 for name in kept.files}
    SceneEdits((), data["runs"]["steps/100"]["settings"], shown).plot(path)
    shrink(path, 0.8)


def main() -> None:
    """Write the page, and the picture where a run has left its pictures here."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(data)), encoding="utf-8")
    if (pictures := RESULTS.with_suffix(".npz")).exists():
        draw(data, pictures, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
