"""What `benchmarks/results/calibration.json` says: in docs/calibration.md and its tables, in README, in two plots.

python -m benchmarks.calibration_results              # writes all of them
python -m benchmarks.calibration_results FILE...      # ... of these files, which become the result
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.calibration import CLOCK2, GROUPS, IDENTITY, called, half, interval, markdown, paired
from clockwork_hooks._numbers import macs, percent
from clockwork_hooks.reports.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "calibration.json"
SECOND = ROOT / "benchmarks" / "results" / "second_model.json"  # of benchmarks/second_model.py, in the same page
TRAINED = ROOT / "benchmarks" / "results" / "trained_from_closed_form.json"  # of its script, likewise
COST = ROOT / "benchmarks" / "results" / "calibration_cost.json"
COST_CPU = COST.with_name("calibration_cost_cpu.json")
PAGE, README, PLOT = ROOT / "docs" / "calibration.md", ROOT / "README.md", ROOT / "docs" / "calibration_macs.png"
TABLES = ROOT / "docs" / "calibration_tables.md"
BEGIN, END = "<!-- measured: python -m benchmarks.calibration_results -->", "<!-- end of measured -->"
BEGIN_ROWS, END_ROWS = "<!-- rows: python -m benchmarks.calibration_results -->", "<!-- end of rows -->"
BEGIN_SPACING, END_SPACING = "<!-- spacing: python -m benchmarks.spacing, for each row -->", "<!-- end of spacing -->"
BEGIN_README = "<!-- calibration table: tests/docs/test_calibration_results.py compares it with its JSON -->"
END_README = "<!-- end of calibration table -->"
BEGIN_BUDGET, END_BUDGET = "<!-- budget: tests/docs/test_calibration_results.py -->", "<!-- end of budget -->"
BUDGETS = ROOT / "docs" / "quality_per_mac.png"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a file, and choices among them."""

    data: Mapping[str, Any]

    def row(self, key: str) -> Mapping[str, Any]:
        """A row by group/label."""
        found: Mapping[str, Any] = self.data["rows"][key]
        return found

    def saved(self, key: str) -> float:
        """Share of the MACs of the group's plain row that a row does without."""
        plain = self.row(f"{key.split('/')[0]}/plain")
        return 1 - float(self.row(key)["macs_per_image"]) / float(plain["macs_per_image"])

    def gap(self, key: str, other: str, score: str = "Fréchet") -> list[float]:
        """Paired differences of a score over the seeds, of the captions that rows are judged on."""
        return paired(*(self.row(one)["scores"]["judge"][score] for one in (key, other)))

    def mean(self, key: str, part: str = "judge") -> float:
        """Fréchet distance."""
        return statistics.fmean(self.row(key)["scores"][part]["Fréchet"])

    def calibrated(
        self, group: str, saved: float = 0, condition: Callable[[Any], bool] = bool, *, any_steps: bool = False
    ) -> str | None:
        """The calibrated row that saves so much whose distance is lowest *on the captions that rows are chosen by*.

        Args:
            group: of the row.
            saved: share of MACs, at least.
            condition: that the row meets, too.
            any_steps: of the sampler; else as many as the group's plain row takes.
        """
        keys = [
            key for key, row in self.data["rows"].items()
            if key.split("/")[0] == group and row["kind"] not in (None, IDENTITY, "deepcache")
            and (any_steps or row["taken"] is None) and self.saved(key) >= saved and condition(row)
        ]  # fmt: skip
        return min(keys, key=lambda key: self.mean(key, "choose"), default=None)

    def plain(self) -> dict[int, str]:
        """How many steps → the row of plain sampling that takes so many, of the main sampler, the fewest first."""
        rows = {
            int(row["taken"] or row["sampler"]["steps"]): key for key, row in self.data["rows"].items()
            if key.startswith("main-") and row["kind"] is None
        }  # fmt: skip
        return dict(sorted(rows.items()))

    def within(self, most: float) -> str | None:
        """The calibrated row of the main sampler, in any number of steps, that is best for so many MACs a picture."""
        keys = [
            key for key, row in self.data["rows"].items()
            if key.startswith("main-") and row["kind"] not in (None, IDENTITY, "deepcache")
            and row["macs_per_image"] <= most
        ]  # fmt: skip
        return min(keys, key=lambda key: self.mean(key, "choose"), default=None)

    def steps(self, key: str) -> tuple[int, int]:
        """All steps of a row, and the full ones."""
        row = self.row(key)
        count = int(row["taken"] or row["sampler"]["steps"])
        return count, count - len(row["at"])


_NEAR = 0.02  # of the MACs: a row that saves a little less than the peer is named too

# -- targets ---------------------------------------------------------------------------------------------------------


def verdicts(rows: Rows) -> list[str]:
    """Each target: met, missed or not measured, with its numbers."""
    return [*_own(rows), *_peers(rows), *_seconds(rows)]


def _own(rows: Rows) -> list[str]:
    """Of calibrated rows against plain sampling."""
    return [
        _level(rows, "8 steps, at least 45% fewer MACs at no loss", "main-8", 0.45, 0),
        _clock2(rows),
        _level(rows, "20 steps, at least 50% fewer MACs at no loss", "main-20", 0.5, 0),
        _level(rows, "50 steps, at least 65% fewer MACs at a distance of at most 1 more", "main-50", 0.65, 1),
        _four(rows),
    ]


def _counted(lines: Sequence[str]) -> list[str]:
    """Of verdicts on peers, one a setting: how many are met, and those that are not."""
    others = [line for line in lines if ": met. " not in line]
    return [
        "- DeepCache and plain sampling with fewer steps are beaten at equal MACs: in "
        f"{len(lines) - len(others)} of {len(lines)} settings of sampler, steps and guidance "
        "([each](calibration_tables.md#peers-one-by-one)).",
        *others,
    ]


def _seconds(rows: Rows) -> list[str]:
    """Of `calibrate`, as its reports have it."""
    found = {
        count: [row["calibration"]["seconds"] for key, row in rows.data["rows"].items()
                if key.startswith("main-8/") and row["captions"] == count and "calibration" in row]
        for count in (64, 512)
    }  # fmt: skip
    if not found[64]:
        return []
    told = (
        f"{count}: {min(ones):.1f} to {max(ones):.1f} s ({len(ones)} rows)" for count, ones in found.items() if ones
    )
    text = f"Prompts and seconds, where the region is found before: {'; '.join(told)}."
    return [_verdict("Calibration with 64 prompts in at most 10 s", max(found[64]) <= 10, text)]


def _verdict(target: str, met: bool, text: str) -> str:
    return f"- {target}: {'met' if met else '**missed**'}. {text}"


def _level(rows: Rows, target: str, group: str, saved: float, most: float) -> str:
    """A distance like plain's: its interval reaches down to `most`; at 8 steps the attributes too."""
    key = rows.calibrated(group, saved) if f"{group}/plain" in rows.data["rows"] else None
    if key is None:
        return f"- {target}: not measured."
    gap, right = rows.gap(key, f"{group}/plain"), rows.gap(key, f"{group}/plain", "attributes right")
    lower = statistics.fmean(gap) - half(gap)
    met = (lower <= 0 if most == 0 else statistics.fmean(gap) <= most) and statistics.fmean(right) >= -0.1
    label = f"`{key.split('/')[1]}`"
    text = f"{label}: {percent(rows.saved(key))} fewer, Fréchet {interval(gap)}, attributes {_points(right)} points."
    return _verdict(target, met, text)


def _clock2(rows: Rows) -> str:
    target = "8 steps, plain clock 2, a Fréchet distance of at most 35"
    key = rows.calibrated("main-8", 0, lambda row: tuple(row["at"]) == CLOCK2 and row["captions"] == 512)
    if key is None:
        return f"- {target}: not measured."
    own = f"identity, {rows.row(key)['region']}, {' '.join(map(str, CLOCK2))}"
    text = f"`{key.split('/')[1]}`: {rows.mean(key):.1f} (plain {rows.mean('main-8/plain'):.1f}, `{own}` " \
           f"{rows.mean(f'main-8/{own}'):.1f}) at {percent(rows.saved(key))} fewer MACs."  # fmt: skip
    return _verdict(target, rows.mean(key) <= 35, text)


def _four(rows: Rows) -> str:
    target = "4 steps, better than plain sampling with 3"
    key = rows.calibrated("main-4")
    other = next((k for k in ("main-4/plain, 3 steps", "main-8/plain, 3 steps") if k in rows.data["rows"]), None)
    if key is None or other is None:
        return f"- {target}: not measured."
    gap = rows.gap(key, other)
    ratio = rows.row(key)["macs_per_image"] / rows.row(other)["macs_per_image"]
    means = f"{rows.mean(key):.1f} against {rows.mean(other):.1f}: {interval(gap)}"
    text = f"`{key.split('/')[1]}`: Fréchet {means}; {ratio:.2f}× the MACs."
    return _verdict(target, statistics.fmean(gap) + half(gap) < 0, text)


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer, and the calibrated row that saves at least as much.

    Attributes:
        key: of the peer.
        calibrated: the row; None where none saves so much.
        beaten: its distance is lower, and so is the interval's upper end.
        near: where the peer is not beaten, a row that saves a little less; None where that is the same one.
    """

    key: str
    calibrated: str | None
    beaten: bool = False
    near: str | None = None


def peers(rows: Rows, group: str) -> list[Peer]:
    """DeepCache, and plain sampling with fewer steps, of a group: each against a calibrated row of any steps."""
    if f"{group}/plain" not in rows.data["rows"]:
        return []
    found = []
    for key in [key for key, row in rows.data["rows"].items() if key.split("/")[0] == group and _is_peer(row)]:
        calibrated = rows.calibrated(group, rows.saved(key) - 0.005, any_steps=True)
        if calibrated is None:
            found.append(Peer(key, None))
            continue
        gap = rows.gap(calibrated, key)
        beaten = statistics.fmean(gap) + half(gap) < 0
        near = None if beaten else rows.calibrated(group, rows.saved(key) - _NEAR, any_steps=True)
        found.append(Peer(key, calibrated, beaten, near if near != calibrated else None))
    return found


def _peers(rows: Rows) -> list[str]:
    """Of each group, how many peers are beaten."""
    lines = []
    for group in GROUPS:
        found = peers(rows, group.name)
        met = [peer for peer in found if peer.calibrated is not None]
        if not found:
            continue
        target = f"{called(group)}: DeepCache and plain sampling with fewer steps are beaten at equal MACs"
        if not met:
            lines.append(f"- {target}: not measured.")
            continue
        others = [_label(rows, peer) for peer in met if not peer.beaten]
        alone = [_label(rows, peer) for peer in found if peer.calibrated is None]
        text = f"{len(met) - len(others)} of {len(met)}." + (f" Not beaten: {', '.join(others)}." if others else "")
        text += f" No calibrated row saves as much as {', '.join(alone)}." if alone else ""
        lines.append(_verdict(target, not others, text))
    return lines


def _label(rows: Rows, peer: Peer) -> str:
    return f"{peer.key.split('/')[1].replace(',', '')} ({percent(rows.saved(peer.key))})"


def one_by_one(rows: Rows) -> str:
    """A table: each peer, and the calibrated row that it is held against."""
    cells = []
    for group in GROUPS:
        for peer in peers(rows, group.name):
            own = (group.name, peer.key.split("/")[1], percent(rows.saved(peer.key)))
            if peer.calibrated is None:
                cells.append((*own, "none saves as much", "", "", ""))
                continue
            for key in filter(None, (peer.calibrated, peer.near)):
                said = "yes" if peer.beaten else "**no**" if key == peer.calibrated else "saves a little less"
                cells.append(
                    (*own, key.split("/")[1], percent(rows.saved(key)), interval(rows.gap(key, peer.key)), said)
                )
    heads = ("group", "peer", ">MACs saved", "calibrated row", ">MACs saved", ">Fréchet, less the peer's", "beaten")
    return table("", heads, cells).to_markdown().split("\n", 2)[2]


def _is_peer(row: Mapping[str, Any]) -> bool:
    return row["kind"] == "deepcache" or (row["kind"] is None and row["taken"] is not None)


def _points(gap: Sequence[float]) -> str:
    mean = statistics.fmean(gap)
    return f"{mean:+.2f} ({mean - half(gap):+.2f} to {mean + half(gap):+.2f})"


# -- the page --------------------------------------------------------------------------------------------------------


def page(data: Mapping[str, Any], cost: Mapping[str, Any] | None) -> str:
    """The measured part of docs/calibration.md."""
    rows, run = Rows(data), data["runs"][Counter(row["run"] for row in data["rows"].values()).most_common(1)[0][0]]
    versions = run["versions"]
    text = f"""\
Two sets of {run["captions"]:,} held-out captions: one to choose rows by (one seed), one to judge them on \
({run["seeds"]} seeds, the same noise for every
row). All numbers below are of the second set. Calibration took up to {run["calibration"]} training captions and one \
or two runs of the sampler.{_longer(data, run["seeds"])}

- *Fréchet*: squared Fréchet distance to rendered scenes, in the features of the shipped classifier.
- *less plain's*: mean and 95% interval of the paired difference over the seeds.
- A row is named after the kind of adaptor, the region (the widest one, or the default), and the adaptor steps.

{run["device"]}, {run["dtype"].removeprefix("torch.")}, seeds 0 to {run["seeds"] - 1}; torch {versions["torch"]},
diffusers {versions["diffusers"]}, DeepCache {versions["DeepCache"]}, python {run["python"]}; by
`python -m benchmarks.calibration run`, several times with `--resume`: each command is in
`benchmarks/results/calibration.json`. [All rows](calibration_tables.md)."""
    parts = ["## Measured on the demo model", text]
    parts += ["![Fréchet distance over MACs saved, 8 steps](calibration_macs.png)"]
    parts += ["### For the MACs of so many plain steps", _BUDGETS, budgets(data)]
    parts += ["### Targets", "\n".join([*_own(rows), *_counted(_peers(rows)), *_seconds(rows)])]
    parts += [_cost(cost, load(COST_CPU))] if cost else []
    return "\n\n".join(parts)


def _longer(data: Mapping[str, Any], seeds: int) -> str:
    """Of rows that were judged on more seeds than the others."""
    found = Counter((key.split("/")[0], len(row["scores"]["judge"]["Fréchet"])) for key, row in data["rows"].items())
    return "".join(
        f"\n{rows} rows of `{group}` that {seeds} seeds did not tell apart were judged on {count}."
        for (group, count), rows in found.items()
        if count > seeds
    )


def all_rows(data: Mapping[str, Any]) -> str:
    """The demo model's part of docs/calibration_tables.md."""
    groups = "\n".join(f"- {group.name}: {called(group)}" for group in GROUPS)
    parts = [
        "## The demo model",
        "How rows are measured: [calibration](calibration.md#measured-on-the-demo-model). Groups:",
    ]
    parts += [groups, "### Peers, one by one", _PEERS, one_by_one(Rows(data))]
    parts += ["### Rows", _ROWS, markdown(data), "### Planned, and not run", _unmeasured(data)]
    return "\n\n".join(parts)


_PEERS = """\
The table shows each peer, and the calibrated row of its group that saves at least as many MACs (less half a point) and
was best on the captions to choose by. *beaten*: the whole 95% interval of the difference lies below 0."""
_ROWS = """\
A row is named after the kind of adaptor, the region (the widest one, or the default), and the adaptor steps, or the
full ones where it says so. *less plain's*: mean and 95% interval of the paired difference to the plain row. *to choose
by*: the distance on the other set of captions."""


def _cost(cost: Mapping[str, Any], cpu: Mapping[str, Any]) -> str:
    settings = cost["environment"]
    lines = []
    for way in dict.fromkeys(one["way"] for one in cost["adaptor pass"]):
        times = {one["kind"]: one["ms"] for one in cost["adaptor pass"] if one["way"] == way}
        lines += [(way, kind, f"{ms:.2f} ms", f"{ms / times[IDENTITY]:.3f}×") for kind, ms in times.items()]
    told = table("", ("call", "kind", ">adaptor pass", ">identity's"), lines).to_markdown().split("\n", 2)[2]
    worst = max(float(one[3][:-1]) for one in lines)
    text = f"""\
### Seconds

`ch.calibrate`, kind auto, {settings["batch"]} prompts, 8 steps:

{_seconds_of(cost, 10)}
{_seconds_of(cpu, 60)}

An adaptor pass of {settings["batch"]} prompts, both branches, in turns (the device's time, each step's median, their \
mean): the target of 1.02× the identity's is {"met" if worst <= 1.02 else "**missed**"} (the worst: {worst:.2f}×).
Eager and compiled, so small a pass is the host's work. In CUDA graphs the exit counts, {settings["batch"]} prompts of
it: copied in, and out where the next step reads it, and passed over by one kernel; with the entry, two matrix products
read and write as much again. Of SD v1.5 and SDXL [see there](performance_tables.md#why-targets-are-missed)."""
    return f"{text}\n\n{told}"


def _seconds_of(cost: Mapping[str, Any], most: float) -> str:
    settings = cost["environment"]
    seconds = [one["seconds"] for one in cost["calibrate"] if one["kind"] == "auto"]
    where = f"{settings['device']}, {settings['cores']} cores" if settings["cuda"] is None else settings["device"]
    return (
        f"- {where}: {seconds[0]:.1f} s the first time, then {min(seconds[1:]):.1f} s; the target of {most:g} s is "
        f"{'met' if max(seconds) <= most else '**missed**'}. Torch {settings['versions']['torch']}, "
        f"seed {settings['seed']}, `{_module(settings['command'])}`."
    )


def spacings() -> str:
    """What the search for full steps found: `benchmarks/spacing.py`."""
    cells = []
    for path in sorted(RESULT.parent.glob("spacing-*.json")):
        found = load(path)
        errors = {tuple(one["full"]): one["relative L2"] for one in found["trials"]}
        for name, full in (("begun with", next(iter(errors))), ("best", tuple(found["best"]))):
            steps = path.stem.split("-")[1]
            cells.append((f"{steps}, {name}", " ".join(map(str, full)), f"{errors[full]:.4f}", str(len(errors))))
    return table("", ("steps", "full steps", ">relative L2", ">trials"), cells).to_markdown().split("\n", 2)[2]


def _module(command: str) -> str:
    """`python .../benchmarks/x.py ...` as people type it."""
    first, path, *rest = command.split()
    return " ".join([first, "-m", f"benchmarks.{Path(path).stem}", *rest])


def _unmeasured(data: Mapping[str, Any]) -> str:
    lines = []
    for group in GROUPS:
        labels = [label for label in ("plain", *(row.label for row in group.rows))
                  if f"{group.name}/{label}" not in data["rows"]]  # fmt: skip
        if labels:
            every_one = len(labels) > len(group.rows)
            lines.append(f"- {group.name}: {'all' if every_one else '; '.join(labels)}")
    if not COST.exists():
        lines.append("- an adaptor pass beside the identity's: `python -m benchmarks.calibration_cost --out DIR`")
    if not TRAINED.exists():
        lines.append(
            "- trained adaptors that start from the calibrated ones: `python -m benchmarks.trained_from_closed_form`"
        )
    if not SECOND.exists():
        lines.append("- a second model of another code base: `python -m benchmarks.second_model`")
    lines.append("- Stable Diffusion")
    return "\n".join(lines)


def shown(data: Mapping[str, Any]) -> str:
    """README's table: 8, 20 and 50 steps."""
    rows, lines = Rows(data), []
    for group, share, others in (
        ("main-8", 0.45, {"plain, 5 steps": "plain, 5 steps", "DeepCache": "DeepCache, branch 0, interval 2",
                          "identity, clock 2": "identity, default, 2 4 6 8"}),
        ("main-20", 0.5, {"plain, 10 steps": "plain, 10 steps", "DeepCache": "DeepCache, branch 0, interval 2"}),
        ("main-50", 0.75, {"plain, 12 steps": "plain, 12 steps", "DeepCache": "DeepCache, branch 0, interval 3"}),
    ):  # fmt: skip
        best = str(rows.calibrated(group, share)).split("/")[1]
        named = {"plain": "plain", **others, "calibrated": best}
        for name, label in named.items():
            key = f"{group}/{label}"
            row, scores = rows.row(key), rows.row(key)["scores"]["judge"]
            steps = row["sampler"]["steps"]
            full = steps - len(row["at"])
            name = f"**calibrated, {full} full steps**" if name == "calibrated" else name
            saved = "–" if label == "plain" else percent(rows.saved(key))
            psnr = f"{statistics.fmean(scores['PSNR']):.1f}" if label == best else ""
            lines.append((str(steps) if label == "plain" else "", name, macs(row["macs_per_image"]), saved,
                          _spread(scores["Fréchet"]), _spread(scores["attributes right"]), psnr))  # fmt: skip
    heads = (">steps", "", ">MACs/image", ">saved", ">Fréchet ↓", ">attributes right, % ↑", ">PSNR to plain, dB")
    return table("", heads, lines).to_markdown().split("\n", 2)[2]


def budget(data: Mapping[str, Any], plain: int = 5) -> str:
    """README's sentence on what the MACs of so many plain steps buy."""
    rows = Rows(data)
    steps = rows.plain()
    best = str(rows.within(rows.row(steps[plain])["macs_per_image"]))
    count, full = rows.steps(best)
    return (
        f"For the MACs of {plain} plain steps, {count} steps with {full} full ones\nhave a Fréchet distance of "
        f"{rows.mean(best):.1f}; {plain} plain steps have {rows.mean(steps[plain]):.1f}, 8 have "
        f"{rows.mean(steps[8]):.1f}."
    )


_BUDGETS = """\
For each number of plain steps: the best calibrated row *of any number of steps* that takes no more MACs. An adaptor
pass of the widest region is 7% of a full one, so twelve steps with four full ones cost less than five plain steps.

![Fréchet distance over MACs a picture, in any number of steps](quality_per_mac.png)"""


def budgets(data: Mapping[str, Any]) -> str:
    """A table: what plain sampling makes of its MACs, and what the best calibrated row makes of as many at most."""
    rows, lines = Rows(data), []
    for count, plain in rows.plain().items():
        best = rows.within(rows.row(plain)["macs_per_image"])
        if best is None or count > _LONGEST:
            continue
        steps, full = rows.steps(best)
        share = rows.row(best)["macs_per_image"] / rows.row(plain)["macs_per_image"]
        lines.append((str(count), macs(rows.row(plain)["macs_per_image"]), f"{rows.mean(plain):.1f}",
                      f"{steps} steps, {full} full", f"{percent(share)}", f"{rows.mean(best):.1f}",
                      interval(rows.gap(best, plain)), rows.row(best)["kind"]))  # fmt: skip
    heads = (">plain steps", ">MACs/image", ">Fréchet ↓", "calibrated", ">of these MACs", ">Fréchet ↓",
             ">less plain's", "kind")  # fmt: skip
    return table("", heads, lines).to_markdown().split("\n", 2)[2]


_APART = 2.5  # GMACs between two points with a label
_STEEP = 12  # plain steps: the distance falls fast up to there
_LONGEST = 20  # of plain steps: beyond, both have what the model can do


def plot_budgets(data: Mapping[str, Any], path: Path = BUDGETS) -> Path:
    """Fréchet distance over MACs a picture, in any number of steps."""
    from matplotlib.figure import Figure

    rows = Rows(data)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()

    def point(key: str) -> tuple[float, float]:
        return rows.row(key)["macs_per_image"] / 1e9, rows.mean(key)

    plain = {count: key for count, key in rows.plain().items() if count <= _LONGEST}
    best = list(dict.fromkeys(filter(None, (rows.within(rows.row(key)["macs_per_image"]) for key in plain.values()))))
    most = max(rows.row(key)["macs_per_image"] for key in plain.values())
    others = [key for key, row in data["rows"].items() if key.startswith("main-") and row["kind"] == "deepcache"
              and row["macs_per_image"] <= most]  # fmt: skip
    for keys, mark, label in (
        (list(plain.values()), "o-", "plain"), (others, "D", "DeepCache"), (best, "*-", "calibrated, no training"),
    ):  # fmt: skip
        axis.plot(
            *zip(*map(point, keys), strict=True), mark, label=label, markersize=9 if mark == "*-" else 6, alpha=0.85
        )
    for count, key in plain.items():
        at = (-5, -12) if count < _STEEP else (2, 5)  # below the curve, until the other one is near
        axis.annotate(f"{count}", point(key), textcoords="offset points", xytext=at, fontsize=8, ha="right")
    for key in others:
        row = rows.row(key)
        steps = row["taken"] or row["sampler"]["steps"]
        full = -(-steps // row["interval"])
        axis.annotate(
            f"{steps} ({full})", point(key), textcoords="offset points", xytext=(0, 7), fontsize=8, ha="center"
        )
    last = 0.0
    for key in best:
        steps, full = rows.steps(key)
        if point(key)[0] - last > _APART:
            last = point(key)[0]
            axis.annotate(f"{steps} ({full})", point(key), textcoords="offset points", xytext=(-4, -13), fontsize=8,
                          ha="right")  # fmt: skip
    return _saved(figure, "GMACs a picture; at the points: steps, in brackets the full ones", path)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def plot(data: Mapping[str, Any], path: Path = PLOT) -> Path:
    """Fréchet distance over MACs saved at 8 steps."""
    from matplotlib.figure import Figure

    rows = Rows(data)
    keys = [key for key in data["rows"] if key.startswith("main-8/") and rows.row(key)["captions"] == 512
            and "fitted" not in key]  # fmt: skip
    groups: dict[str, list[str]] = {"plain, fewer steps": ["main-8/plain"]}
    for key in keys:
        kind = rows.row(key)["kind"]
        name = {"deepcache": "DeepCache", None: "plain, fewer steps", "exit+entry": "calibrated, exit+entry",
                "affine": "calibrated, affine", IDENTITY: IDENTITY}.get(kind)  # fmt: skip
        if name is not None and key not in groups.setdefault(name, []):
            groups[name].append(key)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    marks = {"plain, fewer steps": "o-", "DeepCache": "D", IDENTITY: "s", "calibrated, affine": "^",
             "calibrated, exit+entry": "*"}  # fmt: skip
    for name, mark in marks.items():
        points = sorted((100 * rows.saved(key), rows.mean(key)) for key in groups.get(name, ()))
        axis.plot(*zip(*points, strict=True), mark, label=name, markersize=9 if mark == "*" else 6, alpha=0.85)
    for count in (8, 7, 6, 5, 4, 3):
        key = "main-8/plain" if count == 8 else f"main-8/plain, {count} steps"
        if key in data["rows"]:
            axis.annotate(f"{count} steps", (100 * rows.saved(key), rows.mean(key)), textcoords="offset points",
                          xytext=(6, -11), fontsize=8)  # fmt: skip
    axis.margins(x=0.1)  # the last label lies beside its point
    axis.axhline(rows.mean("main-8/plain"), color="grey", linewidth=0.8, linestyle=":")
    return _saved(figure, "MACs saved, % of plain sampling with 8 steps", path)


def _saved(figure: Figure, across: str, path: Path) -> Path:
    """Label what lies across, and Fréchet distances upward, and save the figure."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = figure.axes[0]
    axis.set_xlabel(across)
    axis.set_ylabel("Fréchet distance, lower is better")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def between(text: str, begin: str, end: str, part: str) -> str:
    """A text with a part between two marks."""
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{begin}\n{part}\n{end}{after}"


def load(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def rewrite(
    result: Path,
    newer: Path | None,
    begin: str,
    end: str,
    section: Callable[[dict[str, Any]], str],
    *,
    page: Path = PAGE,
) -> int:
    """Write one section of a page from a result; from a newer file, where there is one, which becomes the result."""
    if newer is not None:
        result.write_text(newer.read_text(encoding="utf-8"), encoding="utf-8")
    page.write_text(between(page.read_text(encoding="utf-8"), begin, end, section(load(result))), encoding="utf-8")
    print(page)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the parts of the pages, README's table and the plots."""
    for name in sys.argv[1:] if arguments is None else arguments:
        (RESULT.parent / Path(name).name).write_text(Path(name).read_text(encoding="utf-8"), encoding="utf-8")
    data, cost = load(RESULT), load(COST) if COST.exists() else None
    text = between(PAGE.read_text(encoding="utf-8"), BEGIN, END, page(data, cost))
    PAGE.write_text(between(text, BEGIN_SPACING, END_SPACING, spacings()), encoding="utf-8")
    text = between(TABLES.read_text(encoding="utf-8"), BEGIN_ROWS, END_ROWS, all_rows(data))
    TABLES.write_text(text, encoding="utf-8")
    readme = between(README.read_text(encoding="utf-8"), BEGIN_README, END_README, shown(data))
    README.write_text(between(readme, BEGIN_BUDGET, END_BUDGET, budget(data)), encoding="utf-8")
    for path in (PAGE, TABLES, README, plot(data), plot_budgets(data)):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
