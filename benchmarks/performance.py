"""Tables, verdicts and plots of docs/performance.md and docs/performance_tables.md: `python -m benchmarks.performance`.

The pages are written by hand around marked parts (`<!-- begin NAME -->`); what stands in them comes from the JSON
in benchmarks/results/. So does the README's table of speed-ups.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.performance_plots import plot
from benchmarks.performance_results import IDEAL, OURS, PLANNED, Latencies, speed_ups, verdicts
from clockwork_hooks.reports.tables import table

__all__ = ["PARTS", "filled", "main"]

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "performance_tables.md")
README, SPEED = ROOT / "README.md", "<!-- speed table: tests/docs/test_readme.py compares it with"
RESULTS = ROOT / "benchmarks" / "results"

Data = dict[str, dict[str, Any]]
SIDES = ("torch's kernels", "one kernel")
FIRST_CALLS = ("first call", "other tokens", "other batch", "other resolution")


def environment(data: Data) -> str:
    """Where it was measured."""
    seen = data["gpu_latency"]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items() if version)
    where = f"{seen['device']}, CUDA {seen['cuda']}; {versions}; {seen['date']}; measured by `{seen['command']}`."
    beside = seen.get("then")
    where += f" And by `{beside}." if beside else ""
    before = seen.get("before")
    if before:
        where += f" It goes on from a run on {before['device']}, {before['date']}, `{before['command']}`."
    earlier = data["gpu_latency"].get("earlier", [])
    rows = [(one["rows"], one["environment"]["date"], f"`{one['environment']['command']}`") for one in earlier]
    other = _table(("of another run, with the engine of that time", "when", "by"), rows)
    return f"{where}\n\n{other}" if rows else where


def targets(data: Data) -> str:
    """The targets, judged."""
    judged = verdicts(Latencies(data["gpu_latency"]))
    rows = [(one.what, one.target, one.measured, one.verdict) for one in judged if one.met is not None]
    missing = len(judged) - len(rows)
    note = f"\n\n{missing} more were [not measured in this run](performance_tables.md#what-was-not-measured)."
    return _table(("target", ">at", ">measured", "verdict"), rows) + (note if missing else "")


def unmeasured(data: Data) -> str:
    """Targets that this run says nothing about."""
    judged = verdicts(Latencies(data["gpu_latency"]))
    return _table(("target", ">at"), [(one.what, one.target) for one in judged if one.met is None]).replace(
        "Not measured in this run.", "Every target was measured."
    )


def factors(data: Data) -> str:
    """What part of the speed-up is compiling, or capturing, and what part is caching."""
    found, cells = Latencies(data["gpu_latency"]), []
    for model, steps in (("sd15", 8), ("sd15", 50), ("sdxl", 8), ("sdxl", 50)):
        for mode in ("cudagraphs", "compile"):
            eager, plain = (found.ms("plain", how, model=model, steps=steps) for how in ("eager", mode))
            for side in (OURS, *PLANNED[steps].values()):
                ours = found.ms(side, mode, model=model, steps=steps)
                if ours and plain:
                    static, both = (f"{eager / ms:.2f}×" if eager else None for ms in (plain, ours))
                    cells.append((model, steps, mode, side, static, f"{plain / ours:.2f}×", both))
    heads = ("model", ">steps", "mode", "side", ">plain eager → plain in this mode", ">plain → side, both in this mode",
             ">together")  # fmt: skip
    return _table(heads, cells)


def calibrate(data: Data) -> str:
    """Seconds and memory of `ch.calibrate`."""
    cells = [
        (r["model"], r["schedule"], r["kind"], f"{r['runs']:g}", f"{r['seconds']:.1f}", f"{r['sampling_s']:.1f}",
         f"{r['beyond_sampling_s']:.1f}", _number(r["peak_memory_gib"], 2), _number(r["sampling_gib"], 2),
         _number(r["memory_ratio"], 2))
        for r in data["gpu_latency"].get("calibrate", [])
    ]  # fmt: skip
    heads = ("model", "schedule", "kind chosen", ">runs", ">s", ">s of sampling once", ">s beyond sampling",
             ">peak GiB", ">sampling's", ">ratio")  # fmt: skip
    return _table(heads, cells)


def latency(data: Data) -> str:
    """A table for each model, batch, number of steps."""
    return _latencies(Latencies(data["gpu_latency"]).data["latency"])


def cpu_latency(data: Data) -> str:
    """The same on a CPU."""
    found = data["cpu_latency"]
    return f"{_machine(found, 'wall-clock time')}\n\n{_latencies(found['latency'])}"


def _latencies(rows: list[dict[str, Any]]) -> str:
    parts = []
    for model, batch, steps in dict.fromkeys((row["model"], row["batch"], row["steps"]) for row in rows):
        shown = [row for row in rows if (row["model"], row["batch"], row["steps"]) == (model, batch, steps)]
        cells = [
            (row["mode"], row["side"], f"{row['ms_per_image']:.1f}", f"{row['ms_per_step']:.2f}",
             f"{row['spread']:.0%}" if row["runs"] > 1 else "one run", _number(row["speedup"], 2),
             _number(row["macs_ratio"], 3), _number(row["tflops"], 0 if (row["tflops"] or 0) > 10 else 3),
             _number(row["to_ideal"], 3), _number(row["peak_memory_gib"], 2))
            for row in shown
        ]  # fmt: skip
        heads = ("mode", "side", ">ms/image", ">ms/step", ">spread", ">speed-up", ">MACs ratio", ">TFLOP/s",
                 ">to ideal", ">peak GiB")  # fmt: skip
        parts.append(f"**{model}, guidance batch {batch}, {steps} steps**\n\n{_table(heads, cells)}")
    return "\n\n".join(parts)


def passes(data: Data) -> str:
    """Single passes against what they are compared with."""
    cells = [
        (row["model"], row["mode"], row["side"], f"{row['ms']:.3f}", f"{row['spread']:.1%}", _number(row["gmacs"], 0),
         _number(row["ratio"], 3), row["against"])
        for row in data["gpu_latency"].get("passes", [])
    ]  # fmt: skip
    return _table(("model", "mode", "pass", ">ms", ">spread", ">GMACs", ">ratio", "to"), cells)


def failures(data: Data) -> str:
    """What did not run in a mode, and why."""
    cells = [
        (r.get("model"), r.get("mode"), r["side"], _short(r["reason"])) for r in data["gpu_latency"].get("failures", [])
    ]
    return _table(("model", "mode", "side", "reason"), cells)


def choices(data: Data) -> str:
    """What the user may change, and what it brings."""
    cells = [(r["choice"], r["kind"], f"{r['ms_per_step']:.2f}", f"{r['spread']:.1%}", f"{r['gain']:.3f}×")
             for r in data["gpu_latency"].get("choices", [])]  # fmt: skip
    return _table(("choice", "side", ">ms/step", ">spread", ">gain"), cells)


def throughput(data: Data) -> str:
    """Images a second."""
    cells = [(r["batch"], r["kind"], f"{r['images_per_s']:.2f}", f"{r['spread']:.1%}",
              f"{r['cache_mib_per_image']:.0f}") for r in data["gpu_latency"].get("throughput", [])]  # fmt: skip
    return _table((">guidance batch", "side", ">images/s", ">spread", ">cache, MiB/image"), cells)


def profile(data: Data) -> str:
    """Where the device's time goes."""
    cells = [(f"`{r['kernel'][:70]}`", r["calls"], f"{r['us'] / 1e3:.2f}", f"{r['share']:.1%}")
             for r in data["gpu_latency"].get("profile", [])]  # fmt: skip
    return _table(("kernel", ">calls", ">ms", ">share"), cells)


KERNELS = {  # what a kernel's name has → what it does
    "layout changes": ("nchwToNhwc", "nhwcToNchw"),
    "convolutions, matrix products": ("gemm", "nvjet", "cutlass"),
    "statistics of normalisation": ("Moments", "ComputeFusedParams"),
}


def adaptor_cost(data: Data) -> str:
    """The ResNet adaptor alone: two memory formats, and what its kernels do."""
    found, cells = data["adaptor_cost"], []
    for model, cut in dict.fromkeys((r["model"], r["cut"]) for r in found["adaptor"]):
        ms = [f"{r['ms']:.3f}" for r in found["adaptor"] if (r["model"], r["cut"]) == (model, cut)]
        us = [(r["kernel"], r["us"]) for r in found["kernels"] if (r["model"], r["cut"]) == (model, cut)]
        total = dict(us)["all"]
        shares = [sum(t for name, t in us if any(part in name for part in parts)) for parts in KERNELS.values()]
        cells.append((model, cut, *ms, *(f"{share / total:.0%}" for share in (*shares, total - sum(shares)))))
    layouts = dict.fromkeys(f">ms, {r['layout'].removesuffix('_format')}" for r in found["adaptor"])
    heads = ("model", "cut", *layouts, *(f">{name}" for name in KERNELS), ">element-wise, copies")
    where = f"{found['environment']['device']}, {found['environment']['date']}"
    return f"{_table(heads, cells)}\n\n{where}, by `python -m benchmarks.adaptor_cost --out DIR`."


def solved(data: Data) -> str:
    """Calibrated kinds alone: with torch's kernels, and with one for what is done to each element."""
    found = data["adaptor_cost"]
    rows = {(r["model"], r["cut"], "×".join(map(str, r["shape"])), r["kind"], r["side"]): r for r in found["solved"]}
    cells = [
        (*where, *(f"{rows[(*where, side)]['us']:.1f}" for side in SIDES),
         *(f"{rows[(*where, side)]['host_us']:.0f}" for side in SIDES))
        for where in dict.fromkeys(key[:-1] for key in rows)
    ]  # fmt: skip
    heads = ("model", "cut", "exit", "kind", *(f">µs, {side}" for side in SIDES),
             *(f">µs of the host, {side}" for side in SIDES))  # fmt: skip
    where = f"{found['environment']['device']}, {found['environment']['date']}"
    return f"{_table(heads, cells)}\n\n{where}, by `python -m benchmarks.adaptor_cost --out DIR`."


def fixed(data: Data) -> str:
    """What a captured trajectory costs over the same modules called by hand."""
    found = Latencies(data["gpu_latency"])
    wide = [(f"clockwork, clock {n}, identity, widest cut", f"DeepCache, static by hand, interval {n}, branch 0")
            for n in (2, 3)]  # fmt: skip
    cells = [
        (model, batch, steps, ours, hand, f"{steps * (found.ms(ours, *where) - found.ms(hand, *where)):.1f}")  # type: ignore[operator]
        for ours, hand, model, batch, steps in (
            (OURS, IDEAL, "sd15", 2, 8), (OURS, IDEAL, "sd15", 2, 50), (OURS, IDEAL, "sd15", 8, 8),
            (OURS, IDEAL, "sdxl", 2, 8), (*wide[0], "sd15", 2, 8), (*wide[1], "sd15", 2, 8), (*wide[0], "sd15", 8, 8))
        for where in [("cudagraphs", model, batch, steps)]
        if found.ms(ours, *where) and found.ms(hand, *where)
    ]  # fmt: skip
    return _table(("model", ">batch", ">steps", "side", "by hand", ">ms a trajectory more"), cells)


def checks(data: Data) -> str:
    """Equality, recompilations, waits for the device."""
    cells = []
    for r in data["gpu_latency"].get("checks", []):
        if "reasons" in r:
            text = ", ".join(f"{count} {why}" for why, count in r["reasons"].items())
        elif "plain" in r:
            text = f"plain {r['plain']}, Clockwork {r['clockwork']}"
        elif "worst" not in r:
            text = r["reason"]
        else:
            text = "equal" if r["worst"] == 999.0 else f"{r['worst']:.3g}"
        cells.append(
            (r["check"], r.get("model", "demo"), r["mode"], r.get("dtype"), text, "yes" if r["passed"] else "**no**")
        )
    return _table(("check", "model", "mode", "dtype", "seen", "passed"), cells)


def first_call(data: Data) -> str:
    """What a first call, and a first one of other sizes, take beyond a plain one; the target of a first call."""
    found = data["first_call"]
    kinds = {kind: {row["model"]: row for row in found[kind]} for kind in FIRST_CALLS}
    cells = []
    for model, first in kinds["first call"].items():
        small = first["plain_ms"] < 1000
        met = first["extra_ms"] <= 150 if small else first["ratio"] <= 1.3
        target = f"{'≤ +150 ms' if small else '≤ 1.3×'}: {'met' if met else '**missed**'}"
        extras = (f"+{rows[model]['extra_ms']:.0f} ms ({rows[model]['ratio']:.2f}×)" for rows in kinds.values())
        cells.append((model, f"{first['plain_ms']:,.0f} ms", *extras, target))
    heads = (
        "UNet (CPU, one thread, float32)",
        ">a plain call",
        *(f">{kind}" for kind in FIRST_CALLS),
        "a first call's target",
    )
    return f"{_table(heads, cells)}\n\n{_machine(found)}"


def overhead(data: Data) -> str:
    """Clock 1 against plain, an adaptor pass against the ideal, in the CPU time of one thread."""
    limits = {"clock 1": 1.01, "adaptor pass": 1.03}
    cells = [
        (r["model"], r["side"], r["base"], f"{r['ms']:.2f}", f"{r['base_ms']:.2f}", f"{r['more_us']:.0f}",
         f"{r['ratio']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", f"≤ {limits[r['side']]}",
         "met" if r["ratio"] <= limits[r["side"]] else "**missed**")
        for r in data["overhead"]["overhead"]
    ]  # fmt: skip
    heads = (
        "model",
        "side",
        "against",
        ">ms",
        ">against, ms",
        ">more, µs",
        ">ratio",
        ">quartiles",
        ">target",
        "verdict",
    )
    return f"{_machine(data['overhead'])}\n\n{_table(heads, cells)}"


def bookkeeping(data: Data) -> str:
    """Our own time within the calls of each UNet."""
    verdict = {True: "met", False: "**missed**", None: "–"}
    cells = [(r["model"], f"{r['step_ms']:.2f}", f"{r['own_us']:.0f}", f"{r['share']:.2%}", verdict[r["met"]])
             for r in data["bookkeeping"]["bookkeeping"]]  # fmt: skip
    machine = _machine(data["bookkeeping"]).replace("one thread's CPU time", "one thread")
    return f"{machine}\n\n{_table(('UNet', '>step, ms', '>ours, µs', '>share', '≤ 1%'), cells)}"


def placeholders(data: Data) -> str:
    """What may stand in the place of a skipped output."""
    cells = [(r["kind"], f"{r['us']:.2f}", f"{r['bytes']:,}", "yes" if r["mixes"] else "no")
             for r in data["overhead"]["placeholders"]]  # fmt: skip
    return _table(("kind", ">µs", ">bytes", "mixes with real tensors"), cells)


def analysis(data: Data) -> str:
    """CPU seconds and memory of the analysis, by model."""
    return f"{_machine(data['analysis'])}\n\n{_stages(data['analysis']['models'])}"


def growth(data: Data) -> str:
    """The same by the number of nodes."""
    return _stages(data["analysis"]["growth"])


def _stages(rows: list[dict[str, Any]]) -> str:
    cells = [
        (r["case"], f"{r['nodes']:,}", r["regions"], f"{r['trace_s']:.2f}", f"{r['find_regions_s']:.2f}",
         f"{r['flops_report_s']:.2f}", f"{1e6 * r['total_s'] / (r['nodes'] * math.log2(r['nodes'])):.0f}",
         f"{r['peak_mib']:.0f}")
        for r in rows
    ]  # fmt: skip
    heads = ("UNet", ">nodes", ">regions", ">trace, s", ">find_regions, s", ">flops_report, s", ">µs / (n log₂ n)",
             ">peak, MiB")  # fmt: skip
    return _table(heads, cells)


def _machine(result: dict[str, Any], time: str = "one thread's CPU time") -> str:
    seen = result["environment"]
    return (
        f"{seen['device']}, {seen['cores']} cores shared with other work (load {seen['load'][0]:.1f} at the start), "
        f"{time}; torch {seen['versions']['torch']}; {seen['date']}; measured by `{seen['command']}`."
    )


PARTS: dict[str, Callable[[Data], str]] = {
    part.__name__: part
    for part in (
        environment,
        targets,
        unmeasured,
        factors,
        calibrate,
        latency,
        passes,
        failures,
        choices,
        throughput,
        profile,
        adaptor_cost,
        solved,
        fixed,
        checks,
        cpu_latency,
        first_call,
        overhead,
        bookkeeping,
        placeholders,
        analysis,
        growth,
    )
}


def filled(page: str, data: Data) -> str:
    """The page with its marked parts made anew."""

    def make(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- begin {name} -->\n{PARTS[name](data)}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", make, page, flags=re.DOTALL)


def with_speed(readme: str, data: Data) -> str:
    """The README with its table of speed-ups made anew."""
    start = readme.index("-->\n", readme.index(SPEED)) + 4
    rows = [(one.what, one.measured) for one in speed_ups(Latencies(data["gpu_latency"]))]
    return f"{readme[:start]}{_table(('speed-up', '>measured'), rows)}\n\n{readme[readme.index('## ', start) :]}"


def read() -> Data:
    """All the results that there are."""
    names = ("gpu_latency", "cpu_latency", "first_call", "overhead", "bookkeeping", "analysis", "adaptor_cost")
    paths = {name: RESULTS / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def _table(heads: tuple[str, ...], rows: list[Any]) -> str:
    if not rows:
        return "Not measured in this run."
    return table("", heads, rows).to_markdown().split("\n", 2)[2]


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _short(text: str) -> str:
    return text.split(" Set TORCHDYNAMO", 1)[0]


def main() -> int:
    """Write the pages, the README's table and the plots."""
    data = read()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), data), encoding="utf-8")
    README.write_text(with_speed(README.read_text(encoding="utf-8"), data), encoding="utf-8")
    for path in (README, *PAGES, *plot(data)):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
