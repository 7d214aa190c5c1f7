"""The paper's tables on the demo model: train the adaptors, measure every row, keep everything in files.

    python -m benchmarks.fidelity run --out DIR --minutes 9     # again and again until it says that all is there
    python -m benchmarks.fidelity time --out DIR                # wall times, interleaved, on a machine of its own
    python -m benchmarks.fidelity collect --out DIR             # DIR → benchmarks/results/fidelity.json
    python -m benchmarks.render                                 # benchmarks/results/*.json → docs/results.md, plots

`run` goes through the groups of `fidelity_plan.GROUPS`, the most important first; what is in DIR already is not done
again. `--tiny` does the same in miniature, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity_plan import GROUPS, Group, Row, Trained, group_named
from clockwork_hooks.analysis.timing import device_name
from clockwork_hooks.demo.weights import write_json

RESULT = Path(__file__).parent / "results" / "fidelity.json"
TIMED = (
    *(f"losses-8/plain{steps}" for steps in ("", ", 6 steps", ", 5 steps", ", 4 steps", ", 3 steps")),
    *(f"losses-8/{name}" for name in ("identity", "guided-output", "ResNet, guided-output", "DeepCache, branch 0")),
    *(f"kinds-8/{name}" for name in ("UNet-light", "UNet")),
    *(f"best-8/{name}, 3 5 7" for name in ("identity", "width 64", "UNet-light")),
    *(f"{group}/{name}" for group in ("cut-paper", "cut-0", "steps-6", "steps-4") for name in ("identity", "trained")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    options.command = "python -m benchmarks.fidelity " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    if options.tiny:
        options.images, options.batch, options.seeds, options.train_batch = 4, 4, 2, 2
        options.captions, options.updates, options.device, options.rounds = 8, 2, "cpu", 1
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("time", measure_time), ("collect", collect)):
        sub = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter, help=function.__doc__)
        sub.set_defaults(run=function)
        sub.add_argument("--out", type=Path, required=True, help="folder of adaptors and rows")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
        sub.add_argument("--images", type=int, default=5120, help="pictures a row and seed")
        sub.add_argument("--batch", type=int, default=1024, help="pictures sampled at once")
        sub.add_argument("--seeds", type=int, default=3, help="evaluation seeds")
        sub.add_argument("--groups", default="", help="only these, by commas: " + ",".join(g.name for g in GROUPS))
        sub.add_argument("--minutes", type=float, default=9.0, help="begin no group that may not end within these")
        sub.add_argument("--workers", type=int, default=1, help="groups at once, each a process on the same device")
        sub.add_argument("--updates", type=int, default=800, help="gradient steps of a group of share 1")
        sub.add_argument("--train-batch", type=int, default=128, help="prompts in a training trajectory")
        sub.add_argument("--train-minutes", type=float, default=1.5, help="most training time of a group of share 1")
        sub.add_argument("--captions", type=int, default=20_000, help="different training captions")
        sub.add_argument("--rounds", type=int, default=7, help="of `time`: interleaved repetitions")
        sub.add_argument("--result", type=Path, default=RESULT, help="of `collect`: the file that is written")
        sub.add_argument("--tiny", action="store_true", help="in miniature on the CPU")
    return parser


# -- run ---------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Train and measure what is missing, the most important first."""
    started, slower = time.monotonic(), 1.0  # than the plan's guess, the worst so far
    left = [group for group in _chosen(options) if _missing(group, options)]
    _say(f"{len(left)} groups to do: {', '.join(group.name for group in left) or 'none'}")
    running: dict[Future[float], Group] = {}
    with _executor(options.workers) as pool:
        while left or running:
            while left and len(running) < options.workers:
                spent = time.monotonic() - started
                if spent + slower * left[0].seconds > 60 * options.minutes:
                    _say(f"{options.minutes:g} minutes are nearly over; left: {', '.join(g.name for g in left)}")
                    left.clear()
                    break
                group = left.pop(0)
                running[pool.submit(_group, group.name, options)] = group
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                group = running.pop(future)
                try:
                    slower = max(slower, future.result() / group.seconds)
                except Exception as error:  # the other groups go on; this one is told, and is tried again next time
                    _say(f"{group.name} failed\n{''.join(traceback.format_exception(error))}")
    undone = [group.name for group in _chosen(options) if _missing(group, options)]
    _say(f"not there yet: {', '.join(undone)}" if undone else "all is there")
    return 0


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executor(workers: int) -> Executor:
    if workers == 1:
        return _Here()
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _group(name: str, options: argparse.Namespace) -> float:
    """Train and measure what is missing of a group; returns the seconds that it took."""
    from benchmarks.fidelity_bench import Bench
    from benchmarks.fidelity_train import load, student_errors

    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")  # diffusers and NumPy 2
    started, group = time.monotonic(), group_named(name)
    on_cuda = str(options.device).startswith("cuda")
    if on_cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = torch.float16 if on_cuda else torch.float32
    _train_missing(group, options)
    bench = Bench.make(options.device, images=options.images, batch=options.batch, seeds=options.seeds, dtype=dtype)
    rows = _missing(group, options)
    adaptors = {
        row.adaptor.name: load(options.out / "adaptors", row.adaptor, bench.model.device, dtype)
        for row in rows
        if isinstance(row.adaptor, Trained)
    }
    begun = time.monotonic()
    found = bench.evaluate(group, rows, adaptors)
    _say(f"{name}: {len(found.rows)} rows measured in {time.monotonic() - begun:.1f} s")
    held = _rows(group, options)
    for row in (Row("plain"), *rows):
        told = {"sampler": _sampler(group), "region": bench.region(group).line, **row.told}
        if row.adaptor is not None:
            adaptor = adaptors[row.adaptor.name] if isinstance(row.adaptor, Trained) else None
            told["errors"] = student_errors(
                group, row, bench, adaptor or _identity(), bench.batches[0][: min(256, options.batch)]
            )
        held[row.label] = {**told, **found[row.label].to_dict(), "settings": dict(found.settings)}
    write_json(_file(group, options), {"group": name, "command": options.command, "rows": held})
    print(found.table().to_markdown(), flush=True)
    return time.monotonic() - started


def _train_missing(group: Group, options: argparse.Namespace) -> None:
    from benchmarks.fidelity_train import by_mode, train
    from clockwork_hooks.demo.model import load_demo

    for mode, pairs in by_mode(group).items():
        wanted = [(trained, row) for trained, row in pairs if not _saved(trained, options)]
        if not wanted:
            continue
        begun, model = time.monotonic(), load_demo(options.device)
        told = train(
            group, wanted, model, options.out / "adaptors", updates=round(options.updates * group.share),
            batch=options.train_batch, minutes=options.train_minutes * group.share, captions=options.captions,
        )  # fmt: skip
        write_json(options.out / "training" / f"{group.name}-{mode}.json", told)
        _say(f"{group.name}: trained {', '.join(trained.name for trained, _ in wanted)} ({mode}), "
             f"{told['trajectories']} trajectories, {time.monotonic() - begun:.1f} s")  # fmt: skip
        for name, student in told["students"].items():
            _say(f"  {name}: loss {student['first_loss']:.4g} → {student['last_loss']:.4g}, {student['updates']} steps")


# -- time --------------------------------------------------------------------------------------------------------


def measure_time(options: argparse.Namespace) -> int:
    """Wall time of the rows in `TIMED`, in interleaved rounds, for a large batch and for one picture.

    Adaptors are fresh ones: time does not depend on weights.
    """
    from benchmarks.fidelity_bench import Bench
    from benchmarks.fidelity_train import make

    on_cuda = str(options.device).startswith("cuda")
    dtype = torch.float16 if on_cuda else torch.float32
    bench = Bench.make(options.device, images=options.batch, batch=options.batch, seeds=1, dtype=dtype)
    found: dict[str, Any] = {}
    for batch in (options.batch, 1):
        runs = {}
        for key in TIMED:
            group, row = _row(key)
            if row.deepcache is not None and not _has_deepcache():
                continue
            region = bench.region(group, batch)
            fresh = {}
            if isinstance(row.adaptor, Trained):
                fresh[row.adaptor.name] = make(row.adaptor, region).to(device=bench.model.device, dtype=dtype)
            runs[key] = bench.variant(row, group.sampler, region, fresh)
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(options.rounds + 1):  # the first round warms up
            for key, variant in runs.items():
                seconds[key].append(bench.timed(variant, bench.batches[0][:batch]) / batch)
        for key, values in seconds.items():
            kept = values[1:]
            told = {"median": statistics.median(kept), "low": min(kept), "high": max(kept), "rounds": len(kept)}
            found.setdefault(key, {})[f"batch {batch}"] = told
            _say(f"{key}, batch {batch}: {1000 * told['median']:.3f} ms an image")
    settings = {"device": device_name(options.device), "torch": torch.__version__}
    write_json(options.out / "time.json", {"command": options.command, **settings, "dtype": str(dtype), "rows": found})
    return 0


# -- collect -----------------------------------------------------------------------------------------------------


def collect(options: argparse.Namespace) -> int:
    """The planned rows, the trainings that they rest on and the times of a folder, added to one JSON file."""
    earlier = _read(options.result) if options.result.exists() else {"rows": {}, "training": {}, "commands": []}
    groups = {group.name: _read(_file(group, options)) for group in GROUPS if _file(group, options).exists()}
    times = _read(options.out / "time.json") if (options.out / "time.json").exists() else earlier.get("time", {})
    found = {f"{name}/{label}": row for name, data in groups.items() for label, row in data["rows"].items()}
    planned = {f"{group.name}/{label}" for group in GROUPS for label in ("plain", *(row.label for row in group.rows))}
    rows = {key: row for key, row in {**earlier["rows"], **found}.items() if key in planned}
    used = {str(row["adaptor"]).replace("-", "_") for row in rows.values()}
    trained = earlier["training"] | {p.stem: _read(p) for p in sorted((options.out / "training").glob("*.json"))}
    for run in trained.values():
        run["students"] = {name: told for name, told in run["students"].items() if name in used}
    data = {
        "what": "the demo model: the tables of arXiv 2312.08128 on captioned scenes",
        "commands": sorted({*earlier["commands"], *(d["command"] for d in (*groups.values(), *filter(None, [times])))}),
        "convention": "MACs of convolutions and matrix products, attention products and both guidance branches counted",
        "rows": rows,
        "time": times,
        "training": {name: run for name, run in trained.items() if run["students"]},
    }
    write_json(options.result, data)
    _say(f"{len(rows)} rows in {options.result}")
    return 0


# -- files -------------------------------------------------------------------------------------------------------


def _chosen(options: argparse.Namespace) -> list[Group]:
    names = [name for name in options.groups.split(",") if name]
    return [group_named(name) for name in names] or list(GROUPS)


def _file(group: Group, options: argparse.Namespace) -> Path:
    return Path(options.out) / "rows" / f"{group.name}.json"


def _rows(group: Group, options: argparse.Namespace) -> dict[str, Any]:
    path = _file(group, options)
    return dict(_read(path)["rows"]) if path.exists() else {}


def _missing(group: Group, options: argparse.Namespace) -> list[Row]:
    there = _rows(group, options)
    return [
        row
        for row in group.rows
        if not row.is_measured_by(there.get(row.label)) and (row.deepcache is None or _has_deepcache())
    ]


def _saved(trained: Trained, options: argparse.Namespace) -> bool:
    path = Path(options.out) / "adaptors" / trained.name / "config.json"
    return path.exists() and _read(path)["kind"] == trained.kind


def _row(key: str) -> tuple[Group, Row]:
    name, label = key.split("/", 1)
    group = group_named(name)
    return group, next(row for row in (Row("plain"), *group.rows) if row.label == label)


def _sampler(group: Group) -> dict[str, Any]:
    sampler = group.sampler
    return {"scheduler": sampler.scheduler, "steps": sampler.steps, "guidance": sampler.guidance}


def _identity() -> Any:
    from clockwork_hooks.adaptors import IdentityAdaptor

    return IdentityAdaptor()


def _has_deepcache() -> bool:
    from importlib.util import find_spec

    return find_spec("DeepCache") is not None


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
