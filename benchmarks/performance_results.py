"""What `gpu_latency.json` says, looked up by name, and the targets judged by it: no verdict is typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.latency import AT_CLOCK_2

__all__ = ["IDEAL", "OURS", "PLANNED", "Latencies", "Verdict", "speed_ups", "verdicts"]

OURS, IDEAL = "clockwork, clock 2, identity, outer cut", "ideal, clock 2, identity, outer cut"

PLANNED = {  # steps → how it is called in a verdict → side; the kinds are those that docs/calibration.md shows best
    steps: {f"planned, {adaptor}": f"clockwork, planned, {adaptor}, widest cut" for adaptor in adaptors}
    for steps, adaptors in {8: ("exit+entry", "affine"), 50: ("exit+entry+before+trend", "affine+trend")}.items()
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target: what, how much, what was measured. `met` is None where it was not measured."""

    what: str
    target: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return "not measured" if self.met is None else "met" if self.met else "**missed**"


class Latencies:
    """Rows of `gpu_latency.json` by what they are of."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        rows = data.get("latency", [])
        self.data = {**data, "latency": [_counted(row, rows) for row in rows]}

    def row(self, side: str, mode: str, model: str = "sd15", batch: int = 2, steps: int = 8) -> dict[str, Any] | None:
        """A row of the latency table."""
        wanted = (model, batch, steps, mode, side)
        for row in self.data["latency"]:
            if tuple(row[key] for key in ("model", "batch", "steps", "mode", "side")) == wanted:
                return dict(row)
        return None

    def ms(self, *args: Any, **kwargs: Any) -> float | None:
        """Milliseconds a step."""
        row = self.row(*args, **kwargs)
        return None if row is None else float(row["ms_per_step"])

    def one_pass(self, side: str, mode: str, model: str = "sd15") -> dict[str, Any] | None:
        """A row of the table of single passes."""
        for row in self.data.get("passes", []):
            if (row["model"], row["mode"], row["side"]) == (model, mode, side):
                return dict(row)
        return None


def _counted(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """An ideal's MACs are those of Clockwork with the same clock and cut: this run counted them for one cut only."""
    if row["kind"] != "ideal":
        return dict(row)
    same = ("model", "batch", "steps", "mode", "clock", "cut")
    for other in rows:
        if other["adaptor"] == "identity" and all(other[key] == row[key] for key in same):
            rate = other["tflops"] and other["tflops"] * other["ms_per_step"] / row["ms_per_step"]
            return {**row, "macs_ratio": other["macs_ratio"], "tflops": rate}
    return {**row, "macs_ratio": None, "tflops": None}


def verdicts(found: Latencies) -> list[Verdict]:
    """Every target, in the order in which they were set."""
    parts = (_planned, _macs, _speedups, _calibrate, _ideal, _solved, _deepcache, _adaptor, _overhead)
    return [one for part in parts for one in part(found)]


def speed_ups(found: Latencies) -> list[Verdict]:
    """The README's: like with like, plain and Clockwork in the same mode; of each the kind that quality chooses."""
    measured = {one.what: one for one in verdicts(found) if one.met is not None}
    cases = [("sd15", 50, "captured"), ("sd15", 50, "compiled"), ("sd15", 8, "captured"), ("sd15", 8, "compiled"),
             ("sdxl", 50, "captured"), ("sdxl", 8, "captured"), ("sdxl", 8, "compiled")]  # fmt: skip
    wanted = (
        f"{model}, batch 2, {steps} steps, {how}: {next(iter(PLANNED[steps]))} against plain {how}"
        for model, steps, how in cases
    )
    return [measured[what] for what in wanted if what in measured]


def _planned(found: Latencies) -> Iterator[Verdict]:
    """Planned and calibrated: what caching brings, in one mode, and what caching and compiling bring together."""
    for model, steps in (("sd15", 50), ("sd15", 8), ("sdxl", 50), ("sdxl", 8)):
        for name, side in PLANNED[steps].items():
            eager = found.ms("plain", "eager", model=model, steps=steps)
            for mode, how in (("compile", "compiled"), ("cudagraphs", "captured")):
                ours, plain = (found.ms(one, mode, model=model, steps=steps) for one in (side, "plain"))
                what = f"{model}, batch 2, {steps} steps, {how}: {name} against plain"
                yield _at_least(f"{what} {how}", plain, ours, {50: 2.5, 8: 1.7}[steps])
                if mode == "compile" and model == "sd15":
                    yield _at_least(f"{what} eager", eager, ours, 5.0)


def _macs(found: Latencies) -> Iterator[Verdict]:
    """What share of plain's MACs is not run."""
    for model, steps, least in (("sd15", 8, 0.46), ("sd15", 50, 0.65), ("sdxl", 8, 0.46), ("sdxl", 50, 0.65)):
        for name, side in PLANNED[steps].items():
            rows = (found.row(side, mode, model=model, steps=steps) for mode in ("cudagraphs", "compile", "eager"))
            saved = next((1 - row["macs_ratio"] for row in rows if row and row["macs_ratio"]), None)
            what, target = f"{model}, {steps} steps: MACs saved, {name}", f"≥ {least:.0%}, rounded"
            met = None if saved is None else round(saved, 2) >= least
            yield Verdict(what, target, "–" if saved is None else f"{saved:.1%}", met)


def _calibrate(found: Latencies) -> Iterator[Verdict]:
    """Minutes, and memory relative to sampling the same batches."""
    rows = {(row["model"], row["schedule"]): row for row in found.data.get("calibrate", [])}
    for model, minutes in (("sd15", 2), ("sdxl", 4)):
        for schedule in ("every(2)", "spread(2)"):
            row = rows.get((model, schedule))
            what = f"{model}: calibrate, 64 prompts, 20 steps, {schedule}"
            taken = "–" if row is None else f"{row['seconds']:.0f} s"
            yield Verdict(what, f"≤ {minutes} minutes", taken, None if row is None else row["seconds"] <= 60 * minutes)
            yield _at_most(f"{what}: peak memory against sampling's", row["memory_ratio"] if row else None, 1.3)


def _solved(found: Latencies) -> Iterator[Verdict]:
    outer, both = ("outer",), ("outer", "widest")
    for model, mode, cuts in (("sd15", "compile", both), ("sdxl", "compile", outer), ("sd15", "cudagraphs", both),
                              ("sdxl", "cudagraphs", both), ("sd15", "eager", both)):  # fmt: skip
        for cut in cuts:
            for kind in ("affine", *(["exit"] if cut == "outer" else []), "exit+entry"):
                for when, where in ((AT_CLOCK_2, "at clock 2"), ("", "in a row")):
                    row = found.one_pass(f"adaptor pass, {kind}, {cut} cut{when}", mode, model)
                    what = f"{model}, {mode}: adaptor pass ({kind}, {cut} cut, {where}) against the identity's"
                    yield _at_most(what, row["ratio"] if row else None, 1.02)


def _speedups(found: Latencies) -> Iterator[Verdict]:
    for steps in (8, 50):
        eager = found.ms("plain", "eager", steps=steps)
        for mode, name in (("cudagraphs", "captured"), ("compile", "compiled")):
            ours, plain = found.ms(OURS, mode, steps=steps), found.ms("plain", mode, steps=steps)
            if ours is None and steps != 8:
                continue
            where = f"sd15, batch 2, {steps} steps, {name}: Clockwork (clock 2, identity)"
            yield _at_least(f"{where} against plain eager", eager, ours, 4.0)
            yield _at_least(f"{where} against plain {name}", plain, ours, 1.45)
        captured, compiled = found.ms("plain", "cudagraphs", steps=steps), found.ms(OURS, "compile", steps=steps)
        if compiled is not None:
            what = f"sd15, batch 2, {steps} steps, compiled: Clockwork (clock 2, identity) against plain captured"
            yield _at_least(what, captured, compiled, 1.45)
    for batch in (2, 8):
        ours, plain = (found.ms(side, "cudagraphs", model="sdxl", batch=batch) for side in (OURS, "plain"))
        yield _at_least(f"sdxl, batch {batch}, 8 steps: captured against plain captured", plain, ours, 1.7)


def _ideal(found: Latencies) -> Iterator[Verdict]:
    for model, mode in (("sd15", "cudagraphs"), ("sdxl", "cudagraphs"), ("sd15", "eager"), ("sd15", "compile")):
        for cut in ("outer", "paper"):
            row = found.one_pass(f"adaptor pass, identity, {cut} cut", mode, model)
            what = f"{model}, {mode}: adaptor pass (identity, {cut} cut) against the ideal"
            yield _at_most(what, row["ratio"] if row else None, 1.03 if mode == "eager" else 1.01)


def _deepcache(found: Latencies) -> Iterator[Verdict]:
    for mode, kind, batch, intervals in (
        ("eager", "DeepCache", 2, (2, 3)),
        ("cudagraphs", "DeepCache, static by hand", 2, (2, 3)),
        ("cudagraphs", "DeepCache, static by hand", 8, (2,)),
        ("compile", "DeepCache, static by hand", 2, (2,)),
    ):
        for n in intervals:
            ours = found.ms(f"clockwork, clock {n}, identity, widest cut", mode, batch=batch)
            theirs = found.ms(f"{kind}, interval {n}, branch 0", mode, batch=batch)
            ratio = ours / theirs if ours and theirs else None
            yield _at_most(f"sd15, batch {batch}, {mode}: clock {n} at equal MACs against {kind}", ratio, 1.0)


def _adaptor(found: Latencies) -> Iterator[Verdict]:
    for model, mode, name in (
        ("sd15", "cudagraphs", "captured"), ("sdxl", "cudagraphs", "captured"), ("sd15", "compile", "compiled")
    ):  # fmt: skip
        for cut in ("outer", "paper"):
            ours = found.one_pass(f"adaptor pass, ResNet, {cut} cut", mode, model)
            bare = found.one_pass(f"adaptor pass, identity, {cut} cut", mode, model)
            what = f"{model}, {name}: what the ResNet adds to an adaptor pass ({cut} cut)"
            if ours is None or bare is None:
                yield Verdict(what, "its share of MACs × 1.10", "–", None)
                continue
            time, macs = (ours[key] / bare[key] - 1 for key in ("ms", "gmacs"))
            limit = 1.1 * macs
            yield Verdict(what, f"≤ {limit:.1%} (MACs {macs:.1%})", f"{time:.1%}", time <= limit)


def _overhead(found: Latencies) -> Iterator[Verdict]:
    for model, mode in (("sd15", "cudagraphs"), ("sdxl", "cudagraphs"), ("sd15", "eager")):
        row = found.one_pass("clockwork, clock 1", mode, model)
        yield _at_most(f"{model}, {mode}: clock 1 against plain", row["ratio"] if row else None, 1.01)


def _at_least(what: str, base: float | None, ours: float | None, limit: float) -> Verdict:
    if base is None or ours is None:
        return Verdict(what, f"≥ {limit:g}×", "–", None)
    return Verdict(what, f"≥ {limit:g}×", f"{base / ours:.2f}×", base / ours >= limit)


def _at_most(what: str, ratio: float | None, limit: float) -> Verdict:
    measured = "–" if ratio is None else f"{ratio:.3f}"
    return Verdict(what, f"≤ {limit:g}", measured, None if ratio is None else ratio <= limit)
