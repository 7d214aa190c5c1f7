"""What an evaluation found: scores with their spread over the seeds, costs, and how they print and are kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clockwork_hooks.rendering import Report, reading
from clockwork_hooks.report import Table, macs, percent, table

__all__ = ["Evaluation", "Score", "VariantResult"]


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one variant, with what the seed does to it.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        digits = 4 if abs(self.mean) < 2 else 2
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class VariantResult:
    """What one variant costs and how its pictures are judged.

    Attributes:
        name: as given.
        scores: name of the score → its values; scores that compare with the plain pictures are absent for "plain".
        macs_per_image: convolutions and matrix products of the UNet, attention products counted.
        seconds_per_image: wall time of `generate`, the median over the batches.
        images: pictures a seed.
        full_passes, adaptor_passes: UNet calls over all seeds; None without Clockwork.
    """

    name: str
    scores: Mapping[str, Score]
    macs_per_image: int
    seconds_per_image: float
    images: int
    full_passes: int | None = None
    adaptor_passes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, and mean and spread of each score; for JSON."""
        scores = {
            name: {"mean": score.mean, "spread": score.spread, "values": list(score.values)}
            for name, score in self.scores.items()
        }
        return {name: getattr(self, name) for name in self.__slots__} | {"scores": scores}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VariantResult:
        """What `to_dict` gave."""
        scores = {name: Score(tuple(score["values"])) for name, score in data["scores"].items()}
        return cls(**{name: data[name] for name in cls.__slots__ if name != "scores"}, scores=scores)


@dataclass(frozen=True, slots=True)
class Evaluation(Report):
    """What `evaluate` found; prints as a table.

    Attributes:
        rows: "plain" first.
        better: name of each score → "higher" or "lower".
        settings: seeds, device, versions.
    """

    SCHEMA = "evaluation/1"

    rows: tuple[VariantResult, ...]
    better: Mapping[str, str]
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> VariantResult:
        """The row of a variant."""
        return next(row for row in self.rows if row.name == name)

    def table(self) -> Table:
        """The comparison as one table; an arrow says which way is better."""
        arrows = {"higher": "↑", "lower": "↓"}
        heads = [f">{name} {arrows[way]}" for name, way in self.better.items()]
        plain = self.rows[0]
        cells = [
            (
                row.name,
                *(row.scores.get(name) for name in self.better),
                macs(row.macs_per_image),
                None if row is plain else percent(1 - row.macs_per_image / plain.macs_per_image),
                f"{1000 * row.seconds_per_image:.3g} ms",
            )
            for row in self.rows
        ]
        notes = (
            f"{plain.images} pictures, seeds {', '.join(map(str, self.settings['seeds']))}: mean ± standard deviation "
            f"over the seeds, on {self.settings['device']}. MACs of the UNet, attention products counted.",
        )
        return table("Fidelity", ("variant", *heads, ">MACs/image", ">saved", ">time/image"), cells, notes=notes)

    def data(self) -> dict[str, Any]:
        """Everything; times in seconds, MACs in units."""
        return {"rows": [row.to_dict() for row in self.rows], "better": self.better, "settings": self.settings}

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """What `to_json` wrote.

        Raises:
            ArgumentError: the text is no evaluation.
        """
        with reading(cls, text) as data:
            return cls(tuple(VariantResult.from_dict(row) for row in data["rows"]), data["better"], data["settings"])
