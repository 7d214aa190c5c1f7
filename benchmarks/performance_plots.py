"""A question, a plot of docs/performance.md: how much faster, for how many MACs, how far from the ideal, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.performance_results import IDEAL, OURS, PLANNED, Latencies

__all__ = ["PLOTS", "plot"]

DOCS = Path(__file__).parents[1] / "docs"
PLOTS = {name: DOCS / f"performance_{name}.png" for name in ("speedup", "macs", "ideal", "cpu")}
MODES = ("eager", "cudagraphs", "compile")
COLOURS = {
    "plain": "0.55",
    "clockwork": "tab:blue",
    "ideal": "tab:green",
    "widest": "tab:purple",
    "planned": "tab:cyan",
    "DeepCache": "tab:orange",
    "tomesd": "tab:red",
}


def plot(data: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Draw all of them."""
    gpu, made = "gpu_latency", []
    for name, draw, of in (
        ("speedup", _speedup, gpu), ("macs", _macs, gpu), ("ideal", _ideal, gpu), ("cpu", _cpu, "cpu_latency")
    ):  # fmt: skip
        found = Latencies(data[of])
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.2), layout="constrained")
        draw(figure, found)
        figure.savefig(PLOTS[name], dpi=130, metadata={"Software": None})
        made.append(PLOTS[name])
    return made


def _speedup(figure: Any, found: Latencies) -> None:
    """Plain eager = 1, at 8 steps: one group of bars a mode."""
    sides = {
        "plain": ("plain",),
        "clockwork": (OURS,),
        "ideal": (IDEAL,),
        "widest": ("clockwork, clock 2, identity, widest cut",),
        "planned": (PLANNED[8]["planned, exit+entry"],),
        "DeepCache": ("DeepCache, interval 2, branch 0", "DeepCache, static by hand, interval 2, branch 0"),
    }
    labels = {"plain": "plain", "clockwork": "Clockwork, clock 2", "ideal": "the same by hand",
              "widest": "Clockwork, clock 2, skipping what DeepCache skips",
              "planned": "Clockwork, planned and calibrated",
              "DeepCache": "DeepCache, interval 2 (captured, compiled: by hand)"}  # fmt: skip
    sides = {kind: names for kind, names in sides.items() if any(found.ms(n, m) for n in names for m in MODES)}
    axis = figure.subplots()
    base = found.ms("plain", "eager")
    assert base is not None
    width = 0.8 / len(sides)
    for k, (kind, names) in enumerate(sides.items()):
        heights = [next((base / ms for name in names if (ms := found.ms(name, mode))), 0.0) for mode in MODES]
        bars = axis.bar(
            [m + width * k for m in range(len(MODES))], heights, 0.94 * width, label=labels[kind], color=COLOURS[kind]
        )
        axis.bar_label(bars, [f"{height:.2f}" if height else "–" for height in heights], fontsize=8)
    axis.set_xticks([m + 0.32 for m in range(len(MODES))], MODES)
    axis.set_xlabel("–: not measured")
    axis.set_ylabel("times as fast as plain eager")
    axis.set_title("sd15, guidance batch 2, 8 DPM++ steps")
    axis.margins(y=0.12)
    axis.legend(fontsize=8, loc="upper left")


def _macs(figure: Any, found: Latencies) -> None:
    """Time relative to plain against MACs relative to plain; the diagonal is where time follows arithmetic."""
    _against_macs(figure, found, [("sd15", mode) for mode in MODES[:2]], least=0.35)


def _cpu(figure: Any, found: Latencies) -> None:
    """The same for the models that are measured on a CPU."""
    _against_macs(figure, found, [(row["model"], "eager") for row in found.data["latency"] if row["side"] == "plain"])


def _against_macs(figure: Any, found: Latencies, cases: list[tuple[str, str]], least: float = 0.0) -> None:
    for axis, (model, mode) in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        rows = [
            r for r in found.data["latency"] if (r["model"], r["batch"], r["steps"], r["mode"]) == (model, 2, 8, mode)
        ]
        for kind, marker in (("plain", "o"), ("clockwork", "s"), ("ideal", "^"), ("DeepCache", "D"), ("tomesd", "x")):
            shown = [row for row in rows if row["kind"].startswith(kind) and row["macs_ratio"] is not None]
            if shown:
                axis.plot([r["macs_ratio"] for r in shown], [r["ms_per_image"] / 8 for r in shown], marker,
                          color=COLOURS[kind], label=kind.capitalize() if kind == "clockwork" else kind)  # fmt: skip
        plain = next(row["ms_per_step"] for row in rows if row["side"] == "plain")
        axis.plot([0, 1], [0, plain], ":", color="0.6", label="time as MACs")
        axis.set(title=f"{model}, batch 2, 8 steps, {mode}", xlabel="MACs relative to plain", ylabel="ms a step")
        axis.set_xlim(least, 1.05)
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)


def _ideal(figure: Any, found: Latencies) -> None:
    """Whole images over the ideal's time, and single adaptor passes; 1.03 is the target."""
    names = {"eager": "eager", "cudagraphs": "captured", "compile": "compiled"}
    whole = [
        (f"{r['model']}, batch {r['batch']}, {r['steps']} steps, " + r["side"].partition(", ")[2],
         r["mode"], r["to_ideal"])
        for r in found.data["latency"] if r["to_ideal"] is not None and r["adaptor"] == "identity"
    ]  # fmt: skip
    single = [
        (f"{r['model']}, {r['side'].split(', ')[-1]}", r["mode"], r["ratio"])
        for r in found.data.get("passes", [])
        if r["side"].startswith("adaptor pass, identity") and r["ratio"] is not None
    ]  # fmt: skip
    for axis, rows, title in zip(figure.subplots(1, 2), (whole, single), ("an image", "an adaptor pass"), strict=True):
        labels = [f"{what}, {names[mode]}" for what, mode, _ in rows]
        for k, (_, mode, ratio) in enumerate(rows):
            axis.plot(ratio, k, "o", color="0.6" if mode == "eager" else "tab:blue")
            axis.annotate(f"{ratio:.3f}", (ratio, k), textcoords="offset points", xytext=(6, -3), fontsize=7)
        axis.axvline(1.03, color="tab:red", linewidth=1, label="target: 1.03")
        axis.set_xlim(min([0.95, *(ratio - 0.02 for _, _, ratio in rows)]), 1.29)
        axis.set_yticks(range(len(rows)), labels, fontsize=6.5)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
        axis.set_title(title, fontsize=9)
    figure.suptitle("time relative to the ideal's", fontsize=10)
    figure.axes[1].legend(fontsize=8, loc="center right")
