"""Quality against cost: the two plots of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.fidelity_results import Results
from benchmarks.fidelity_tables import FEWER, IDENTITY, OURS, PLAIN, SCORES

__all__ = ["PLOTS", "plot"]

DOCS = Path(__file__).parents[1] / "docs"
PLOTS = {"macs": DOCS / "results_macs.png", "ms": DOCS / "results_ms.png"}


def plot(data: Mapping[str, Any]) -> list[Path]:
    """Quality against MACs, and against milliseconds where times were measured."""
    results = Results(data)
    if not results.has(PLAIN, IDENTITY, OURS):
        return []
    made = [_pareto(results, PLOTS["macs"], "GMACs an image", lambda key: results.row(key)["macs_per_image"] / 1e9)]
    if results.batches:
        batch = results.batches[0]
        label = f"ms an image, {batch}"
        made.append(_pareto(results, PLOTS["ms"], label, lambda key: results.milliseconds(key, batch)))
    return made


def _pareto(results: Results, path: Path, label: str, cost: Any) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    series = {
        "plain": (PLAIN, "losses-8/plain, 6 steps", FEWER, "losses-8/plain, 4 steps", "losses-8/plain, 3 steps"),
        "identity, clock 2": (IDENTITY, "steps-6/identity", "steps-4/identity"),
        "trained, clock 2": (OURS, "steps-6/trained", "steps-4/trained"),
        "trained light UNet, steps 3 5 7": ("best-8/UNet-light, 3 5 7",),
        "DeepCache": ("losses-8/DeepCache, branch 0",),
    }  # fmt: skip
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, score in zip(figure.subplots(1, 2), SCORES, strict=False):
        wrong = score == "attributes right"  # what is missing to 100% is what differs
        for (name, keys), marker in zip(series.items(), "os^vD", strict=True):
            shown = [key for key in keys if results.has(key) and cost(key) is not None]
            scores = [results.score(key, score) for key in shown]
            means = [100 - s.mean if wrong else s.mean for s in scores if s]
            spreads = [s.spread or 0 for s in scores if s]
            axis.errorbar(list(map(cost, shown)), means, spreads, marker=marker, markersize=5, capsize=3, label=name)
            for key, mean in zip(shown, means, strict=True):
                steps = results.row(key)["steps"] or results.row(key)["sampler"]["steps"]
                axis.annotate(str(steps), (cost(key), mean), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axis.set_xlabel(f"{label}; at the points: steps")
        axis.set_ylabel("attributes wrong, %, lower is better" if wrong else "Fréchet distance, lower is better")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
