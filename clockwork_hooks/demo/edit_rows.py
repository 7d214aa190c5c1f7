"""What edits of scenes scored: by scene, in the mean, and against the plain edit, with how sure that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clockwork_hooks.demo.classifier import AttributeClassifier, score
from clockwork_hooks.demo.layout import layout_error

__all__ = ["EditRow", "Gap", "SceneScore", "scores_of"]

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
    seen, made = classifier.read(pictures), []
    for k in range(len(pictures)):
        found = score(seen[k : k + 1], wanted[k : k + 1])
        layout = layout_error(sources[k : k + 1], pictures[k : k + 1])
        made.append(SceneScore(round(found.total * found.asked), found.asked, *layout))
    return tuple(made)


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
        found = _drawn(self.scenes, np.arange(len(self.scenes))[None])
        return {name: float(values[0]) for name, values in found.items()}


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
