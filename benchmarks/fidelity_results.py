"""The rows of `fidelity.json`, and the targets judged by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.fidelity_plan import GROUPS, Group, Row, Sampler
from benchmarks.fidelity_tables import FEWER, IDENTITY, MODES, MORE, OURS, PLAIN
from benchmarks.harness import student
from clockwork_hooks._numbers import percent
from clockwork_hooks.analysis.evaluation import Score

LEAST = 0.32  # of the MACs are to be saved

__all__ = ["Claim", "Results", "claims", "difference", "in_words"]


@dataclass(frozen=True, slots=True)
class Results:
    """The JSON, by row."""

    data: Mapping[str, Any]

    def has(self, *keys: str) -> bool:
        """Were all of these rows measured?"""
        return all(key in self.data["rows"] for key in keys)

    def row(self, key: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.data["rows"][key]
        return found

    def name(self, key: str) -> str:
        """The key; and the adaptor's kind, where it is not the one that is planned now."""
        kind = self.row(key).get("kind")
        return f"{key} ({kind})" if kind and kind != _planned(key).told["kind"] else key

    def updates(self, key: str) -> int | None:
        """Gradient steps of the row's adaptor."""
        student = str(self.row(key).get("adaptor")).replace("-", "_")
        for run in self.data["training"].values():
            if student in run["students"]:
                return int(run["students"][student]["updates"])
        return None

    @property
    def unmeasured(self) -> list[Group]:
        """The planned groups of which a row is missing, or was measured with another adaptor than planned."""
        rows = self.data["rows"]
        return [g for g in GROUPS if not all(r.is_measured_by(rows.get(f"{g.name}/{r.label}")) for r in g.rows)]

    def score(self, key: str, name: str) -> Score | None:
        found = self.row(key)["scores"].get(name)
        return Score(tuple(found["values"])) if found else None

    def over_training(self, keys: Sequence[str], name: str) -> Score | None:
        """One value a training seed: the mean over the evaluation seeds of each of these rows."""
        found = [self.score(key, name) for key in keys]
        return Score(tuple(score.mean for score in found if score)) if all(found) else None

    def milliseconds(self, key: str, batch: str) -> float | None:
        found = self.data.get("time", {}).get("rows", {}).get(key, {}).get(batch)
        return 1000 * found["median"] if found else None

    def saved(self, key: str) -> float:
        """Share of MACs against the plain sampler of the row's own group."""
        plain = self.row(f"{key.split('/')[0]}/plain")["macs_per_image"]
        return float(1 - self.row(key)["macs_per_image"] / plain)

    def difference(self, a: str, b: str, name: str) -> Score:
        """Seed by seed, the same noise on both sides: the score of `a` less that of `b`."""
        return _difference(self.score(a, name), self.score(b, name))

    def training_difference(self, a: Sequence[str], b: Sequence[str], name: str) -> Score:
        """The same, training seed by training seed."""
        return _difference(self.over_training(a, name), self.over_training(b, name))

    def trained_at(self, sampler: Sampler) -> list[str]:
        """The rows of trained adaptors with this sampler, of several training seeds the first."""
        more = {key for ways in MODES.values() for keys in ways.values() for key in keys[1:]}
        rows = {key: row for key, row in self.data["rows"].items() if key not in more}
        return [key for key, row in rows.items() if row.get("loss") and row["sampler"] == asdict(sampler)]

    def best(self, sampler: Sampler, saved: float) -> str | None:
        """Of the rows of trained adaptors that save this much, the one with the lowest Fréchet distance."""
        enough = [key for key in self.trained_at(sampler) if self.saved(key) >= saved]
        return min(enough, key=lambda key: self.score(key, "Fréchet").mean, default=None)  # type: ignore[union-attr]

    @property
    def batches(self) -> list[str]:
        rows = self.data.get("time", {}).get("rows", {})
        return sorted({batch for row in rows.values() for batch in row}, key=lambda text: -int(text.split()[1]))


def _difference(left: Score | None, right: Score | None) -> Score:
    assert left is not None  # every row has the scores that are compared
    assert right is not None
    return Score(tuple(x - y for x, y in zip(left.values, right.values, strict=True)))


def _planned(key: str) -> Row:
    name, label = key.split("/", 1)
    rows = next(group.rows for group in GROUPS if group.name == name)
    return next((row for row in rows if row.label == label), Row("plain"))


@dataclass(frozen=True, slots=True)
class Claim:
    """A target, and what was measured.

    Attributes:
        target: in words.
        met: None where its rows are missing.
        found: the numbers.
    """

    target: str
    met: bool | None
    found: str

    def __str__(self) -> str:
        verdict = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        return f"- {self.target}: {verdict}. {self.found}".rstrip()


def claims(results: Results) -> list[Claim]:
    """The targets of this experiment, judged by the JSON."""
    made: list[Claim] = []

    def claim(target: str, rows: Sequence[str], judge: Any) -> None:
        if results.has(*rows):
            met, found = judge()
            made.append(Claim(target, met, found))
        else:
            made.append(Claim(target, None, ""))

    def less(a: str, b: str, name: str = "Fréchet") -> tuple[bool, str]:
        return results.difference(a, b, name).mean <= 0, f"{name} {difference(results, a, b, name)}."

    def attributes(ours: str) -> tuple[bool, str]:
        gap = results.difference(ours, PLAIN, "attributes right")
        return gap.mean >= -0.5, f"{_signed(gap)} points{_certain(gap)}."

    def saves(ours: str) -> tuple[bool, str]:
        share = results.saved(ours)
        return share >= LEAST, f"{percent(share)} fewer."

    best = results.best(Sampler(), LEAST)
    sides = {"clock 2, default cut": OURS} | ({f"best of all, `{best}`": best} if best and best != OURS else {})
    for name, ours in sides.items():
        at = f"8 DPM++ steps, {name}"
        claim(f"{at}: at least 32% fewer MACs, attention counted", (ours, PLAIN), lambda ours=ours: saves(ours))
        claim(f"{at}: Fréchet at most the plain model's", (ours, PLAIN), lambda ours=ours: less(ours, PLAIN))
        claim(f"{at}: attributes within 0.5 points of plain", (ours, PLAIN), lambda ours=ours: attributes(ours))
        claim(f"{at}: better than the identity", (ours, IDENTITY), lambda ours=ours: less(ours, IDENTITY))
        for steps, key in ((5, FEWER), (6, MORE)):
            text = f"{at}: better than plain sampling with {steps} steps"
            cost = f" ({percent(results.saved(key))} fewer MACs)" if results.has(key) else ""
            claim(text + cost, (ours, key), lambda ours=ours, key=key: less(ours, key))
    for ours, fewer in ((6, 4), (4, 3)):  # beside it on the cost axis; there is no plain row below four steps' cost
        key, plain = f"steps-{ours}/trained", f"losses-8/plain, {fewer} steps"
        text = f"{ours} steps, clock 2: better than plain sampling with {fewer} steps"
        cost = ""
        if results.has(key, plain):
            cost = f" ({results.row(plain)['macs_per_image'] / results.row(key)['macs_per_image']:.2f}× the MACs)"
        claim(text + cost, (key, plain), lambda key=key, plain=plain: less(key, plain))
    for key in ("long-4/UNet-light", "long-4/width 64", "longer-4/width 64"):
        plain = "losses-8/plain, 3 steps"
        claim(f"4 steps, clock 2, `{key}`: better than plain sampling with 3 steps", (key, plain),
              lambda key=key, plain=plain: less(key, plain))  # fmt: skip
    ways = MODES[4]
    noised = ways["forward-noise"]

    def beats(way: str) -> tuple[bool, str]:
        gap = results.training_difference(ways[way], noised, "Fréchet")
        return gap.mean <= 0, f"{way}: Fréchet {in_words(gap)}, over the training seeds."

    claim(
        "4 steps: unrolled or on-policy training beats forward-noise training",
        [key for keys in ways.values() for key in keys],
        lambda: min((beats("unrolled"), beats("on-policy")), key=lambda found: not found[0]),
    )
    return made


def difference(results: Results, a: str, b: str, name: str) -> str:
    """The score of `a` less that of `b`, its spread and its interval, in words."""
    return in_words(results.difference(a, b, name))


def in_words(gap: Score) -> str:
    """A difference with its spread and its interval."""
    return f"{_signed(gap)}{_certain(gap)}"


def _signed(gap: Score) -> str:
    spread = "" if gap.spread is None else f" ± {gap.spread:.3g}"
    return f"{gap.mean:+.3g}{spread}".replace("-", "\N{MINUS SIGN}")


def _certain(gap: Score) -> str:
    """Is the difference more than what the seed does? 95% interval of a paired difference, Student's t."""
    if gap.spread is None:
        return ""
    half = student(len(gap.values)) * gap.spread / math.sqrt(len(gap.values))
    inside = " (the interval includes 0)" if abs(gap.mean) <= half else ""
    return f", 95% interval {gap.mean - half:+.3g} to {gap.mean + half:+.3g}{inside}".replace("-", "\N{MINUS SIGN}")
