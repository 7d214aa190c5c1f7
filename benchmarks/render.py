"""docs/results.md and its plots from benchmarks/results/fidelity.json: `python -m benchmarks.render`.

No number and no verdict is typed: tables, differences and whether a target was met come from the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.fidelity_plan import MODES_SEEDS, Sampler
from benchmarks.fidelity_plots import PLOTS, plot
from benchmarks.fidelity_results import Claim, Results, claims, difference, in_words
from benchmarks.fidelity_tables import IDENTITY, MODES, PLAIN, SCORES, SHIPS, TABLES
from clockwork_hooks._numbers import macs, percent
from clockwork_hooks.reports.tables import Table, table

__all__ = ["main", "render"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
INTRO = """# Results on the demo model

The paper's experiments with trained adaptors (arXiv 2312.08128, Tab. 1 and 3-5, Fig. 4 and 7), repeated on the
text-to-image UNet that this package ships: 5.3 M parameters, 64×64 pictures of captioned scenes. They hold for *this
small model*. **We have not measured quality on Stable Diffusion**; `benchmarks/coco_fid.py` does it, if you have the
weights and MS-COCO. Adaptors without training: [calibration](calibration.md#measured-on-the-demo-model).
"""

HOW = """- *Fréchet*: squared Fréchet distance to rendered scenes, in the features of the shipped classifier.
- *Attributes right*: share of what the captions ask for that the classifier finds in the pictures. The generator never
  saw the classifier.
- *PSNR*: to the plain picture from the same noise.
- *MACs*: of convolutions and matrix products, attention products and both guidance branches counted.
- A row's name is its group with the number of steps, and what runs in it: `steps-6/identity`.

Captions are held out: neither the generator nor an adaptor was trained on their attribute combinations. All rows have
the same captions and noise. Mean ± standard deviation over the seeds.
"""

# -- the page ----------------------------------------------------------------------------------------------------


def render(data: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    results = Results(data)
    parts = [INTRO, *_opening(results), HOW, "## Targets", _targets(results)]
    parts += [_best_loss(results), _tried(results)]
    for title, text, keys in TABLES:
        own = [key for key in keys if not key.startswith("losses-8/")] or keys  # not only what other tables show too
        if any(results.has(key) for key in own):
            parts.append(f"## {title}\n\n{text}\n\n{_table(results, title, keys)}")
    parts += [_modes(results), _unmeasured(results)]
    parts += ["## How it was measured", _settings(results), _commands(data)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _opening(results: Results) -> list[str]:
    """The pictures, and three sentences."""
    if not results.has(PLAIN, IDENTITY, SHIPS, "losses-8/plain, 6 steps"):
        return []
    plain, identity, ships, fewer = (
        f"{_mean(results, key, 'Fréchet'):.1f}" for key in (PLAIN, IDENTITY, SHIPS, "losses-8/plain, 6 steps")
    )
    text = (
        f"Fréchet distances at 8 steps: plain {plain}; clock 2 with the identity {identity}; clock 2 with the trained "
        f"adaptor that ships {ships}, at {percent(results.saved(SHIPS))} fewer MACs; plain sampling with 6 steps, "
        f"which costs more, {fewer}."
    )
    times = [f"![Quality against time, by sampler steps]({PLOTS['ms'].name})"] if results.batches else []
    return [f"![Quality against MACs, by sampler steps]({PLOTS['macs'].name})", text, *times]


def _targets(results: Results) -> str:
    """Each setting that has several, and its targets below it; then those that stand alone."""
    settings: dict[str, list[Claim]] = {}
    for claim in claims(results):
        settings.setdefault(claim.target.partition(": ")[0], []).append(claim)
    lines, alone = list[str](), list[str]()
    for setting, own in settings.items():
        if len(own) == 1:
            alone.append(str(own[0]))
            continue
        lines += [f"**{setting}**", ""]
        lines += [str(dataclasses.replace(claim, target=claim.target.partition(": ")[2])) for claim in own]
        lines.append("")
    return "\n".join([*lines, "**Fewer steps**", "", *alone])


def _commands(data: Mapping[str, Any]) -> str:
    first = " ".join(data["commands"][0].split()[:4])
    return (
        f"Measured by `{first}`: each of the {len(data['commands'])} commands is in "
        "`benchmarks/results/fidelity.json`, with the loss, steps, trajectories and time of each training. Rendered by "
        "`python -m benchmarks.render`."
    )


def _settings(results: Results) -> str:
    found = {json.dumps(row["settings"]) for row in results.data["rows"].values()}
    lines = []
    for text in sorted(found):
        one = json.loads(text)
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        seeds = ", ".join(map(str, one["seeds"]))
        lines.append(
            f"{one['images']:,} pictures a row and seed, seeds {seeds}, {one['dtype']} on {one['device']}; {versions}."
        )
    return "\n".join(lines)


def _best_loss(results: Results) -> str:
    rows = {loss: f"losses-8/{loss}" for loss in ("feature", "guided-feature", "guided-output")}
    if not results.has(*rows.values()):
        return ""
    best, second, _ = sorted(rows, key=lambda loss: _mean(results, rows[loss], "Fréchet"))
    gap = difference(results, rows[best], rows[second], "Fréchet")
    return f"Of the three losses, {best} has the lowest Fréchet distance at 8 steps; against {second}: {gap}."


def _tried(results: Results) -> str:
    """What came how near to the plain model's Fréchet distance, with its sampler."""
    tried = {key: _mean(results, key, "Fréchet") for key in results.trained_at(Sampler())}
    if len(tried) < 2 or not results.has(PLAIN):
        return ""
    plain = _mean(results, PLAIN, "Fréchet")
    nearest = sorted(tried, key=tried.__getitem__)[:_NEAREST]
    told = "; ".join(
        f"{results.name(key)} {tried[key]:.1f} ({percent(results.saved(key))} fewer MACs)" for key in nearest
    )
    beaten = sum(distance <= plain for distance in tried.values())
    verdict = f"{beaten} of them at most the plain model's." if beaten else "None of them reaches the plain model's."
    return f"{len(tried)} trained settings were tried at 8 steps (plain: {plain:.1f}), {verdict} The nearest: {told}."


_NEAREST = 5  # settings that are named


def _mean(results: Results, key: str, name: str) -> float:
    found = results.score(key, name)
    assert found is not None
    return found.mean


def _table(results: Results, title: str, keys: Iterable[str]) -> str:
    batches = results.batches
    shown = [key for key in keys if results.has(key)]
    timed = [batch for batch in batches if any(results.milliseconds(key, batch) for key in shown)]
    rows = []
    for key in shown:
        row = results.row(key)
        times = [results.milliseconds(key, batch) for batch in timed]
        saved = None if key.endswith("/plain") else results.saved(key)
        rows.append(
            (results.name(key), *(results.score(key, name) for name in SCORES), macs(row["macs_per_image"]),
             percent(saved), *(None if ms is None else f"{ms:.3g}" for ms in times), results.updates(key))
        )  # fmt: skip
    heads = ["row", ">Fréchet ↓", ">attributes right, % ↑", ">PSNR, dB ↑", ">MACs/image", ">saved"]
    heads += [*(f">ms/image, {batch}" for batch in timed), ">gradient steps"]
    return _without_title(table(title, heads, rows))


def _modes(results: Results) -> str:
    found = {steps: ways for steps, ways in MODES.items() if all(results.has(*keys) for keys in ways.values())}
    if not found:
        return ""
    rows = []
    for steps, ways in found.items():
        for mode, keys in ways.items():
            errors = [results.row(key)["errors"] for key in keys]
            by_step = [
                (step, statistics.fmean(one["feature"][step] for one in errors)) for step in errors[0]["feature"]
            ]
            output = _output_error(results, keys)
            rows.append(
                (steps, mode, *(results.over_training(keys, name) for name in SCORES),
                 ", ".join(f"{step}: {100 * value:.1f}" for step, value in by_step), f"{100 * output:.2f}",
                 "; ".join(str(results.updates(key)) for key in keys))
            )  # fmt: skip
    heads = (">steps", "training", ">Fréchet ↓", ">attributes right, % ↑", ">PSNR, dB ↑",
             "feature error at each adaptor step, %", ">guided output error, %", ">gradient steps")  # fmt: skip
    text = (
        f"{len(MODES_SEEDS)} training seeds each; ± the standard deviation over the training seeds. Errors are "
        "relative, on the states that the *student's own* sampling visits: first the region's exit by step, then the "
        "guided output, mean over the steps. On-policy training is this library's addition: trajectories of the "
        "student, labelled by the teacher."
    )
    against = []
    for steps, ways in found.items():
        for mode in ("unrolled", "on-policy"):
            gap = in_words(results.training_difference(ways[mode], ways["forward-noise"], "Fréchet"))
            against.append(f"- {steps} steps, {mode} less forward-noise: Fréchet {gap}")
    least = {steps: min(ways, key=lambda mode: _output_error(results, ways[mode])) for steps, ways in found.items()}
    lowest = ", ".join(f"{mode} at {steps} steps" for steps, mode in least.items())
    against.append(f"- lowest error of the guided output on the student's own states: {lowest}")
    parts = (text, _without_title(table("", heads, rows)), "Training seed by training seed:\n\n" + "\n".join(against))
    return "## Ways of training (Fig. 7)\n\n" + "\n\n".join(parts)


def _output_error(results: Results, keys: Iterable[str]) -> float:
    """Mean over rows and steps."""
    return statistics.fmean(value for key in keys for value in results.row(key)["errors"]["output"].values())


def _unmeasured(results: Results) -> str:
    left = results.unmeasured
    lines = []
    for group in left:
        there = [row.label for row in group.rows if results.has(f"{group.name}/{row.label}")]
        other = "; the rows above are of another kind of adaptor than the one that is planned now" if there else ""
        lines.append(f"- {group.name}: {', '.join(f'`{row.label}`' for row in group.rows)}{other}")
    if left:
        names = ",".join(group.name for group in left)
        command = f"    python -m benchmarks.fidelity run --out DIR --minutes 9 --groups {names}"
        lines += ["", "Measured, ten minutes at a time, by", "", command]
    if not results.batches:
        lines += ["", "Wall times, by", "", "    python -m benchmarks.fidelity time --out DIR"]
    if not lines:
        return ""
    end = "Then `python -m benchmarks.fidelity collect --out DIR` and `python -m benchmarks.render`."
    return "\n".join(["## Not measured yet", "", *lines, "", end])


def _without_title(made: Table) -> str:
    return made.to_markdown().split("\n", 2)[2]


def main() -> int:
    """Write the page and the plots."""
    data = json.loads((Path(__file__).parent / "results" / "fidelity.json").read_text(encoding="utf-8"))
    PAGE.write_text(render(data), encoding="utf-8")
    for path in (PAGE, *plot(data)):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
