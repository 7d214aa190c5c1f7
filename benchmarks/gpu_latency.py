"""Latency of Clockwork, of the ideal and of the peers on a GPU, through a real scheduler loop.

    python benchmarks/gpu_latency.py --out DIR --minutes 8                     on a GPU
    python benchmarks/gpu_latency.py --out DIR --warm --only "sd15 compiled"   compiles what that section times
    python benchmarks/gpu_latency.py --out DIR --tiny --device cpu             a rehearsal in miniature

One process does all of it (`gpu_plan.py` says what), in order of importance, and writes DIR/gpu_latency.json after
every row. Where a side fails in a mode, the reason is a row too. `--resume FILE` leaves out what an earlier run has
done.

Inductor takes longer than all measurements, and keeps what it makes in TORCHINDUCTOR_CACHE_DIR. `--warm` fills that
folder and times nothing, so it may run beside other work, and several of them at once (`--sides PATTERN` shares out the
sides of a section); a run with the same folder then finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_plan import Section, plan
from benchmarks.harness import reason, say
from benchmarks.latency import Latency


def execute(run: Latency, sections: list[Section], done: dict[str, float]) -> None:
    """One section after the other; one that fails is a row, and the next one begins."""
    for name, least, act in sections:
        if name in done:
            continue
        if run.left() < least:
            run.results.add("failures", side=name, reason=f"only {run.left():.0f} s were left")
            continue
        say(f"== {name} ({run.left():.0f} s left)")
        start = time.monotonic()
        try:
            act()
        except Exception as error:
            run.results.add("failures", side=name, reason=reason(error))
        else:
            done[name] = round(time.monotonic() - start, 1)
            failures = run.results.data.get("failures", [])
            failures[:] = [row for row in failures if row["side"] != name]  # an earlier run had no time for it
        run.free()
        run.results.data["seconds"] = done
        run.results.write()


def _stop(*_: Any) -> None:
    raise TimeoutError("the time was up")


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for gpu_latency.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="wall-clock time, all in all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a tenth of the width: a rehearsal")
    parser.add_argument("--only", default="", help="only the sections in whose names this pattern is found")
    parser.add_argument("--sides", default="", help="only the sides in whose names this pattern is found")
    parser.add_argument("--warm", action="store_true", help="compile only: sections that compile, nothing timed")
    parser.add_argument("--resume", type=Path, help="an earlier gpu_latency.json of the same device")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    compiled: dict[str, Any] = {"backend": "aot_eager"} if options.tiny else {"mode": "reduce-overhead"}
    path = Path(options.out) / ("warm.json" if options.warm else "gpu_latency.json")
    run = Latency(
        path,
        device=options.device,
        minutes=options.minutes,
        tiny=options.tiny,
        compile_options=compiled,
        timed=not options.warm,
        sides=options.sides,
    )
    done: dict[str, float] = {}
    if options.resume:
        run.take(json.loads(options.resume.read_text(encoding="utf-8")))
        done = dict(run.results.data.get("seconds", {}))
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, max(run.left(), 1))
    try:
        sections = [one for one in plan(run) if "compiled" in one[0] or not options.warm]
        execute(run, [one for one in sections if re.search(options.only, one[0])], done)
    except TimeoutError as error:
        run.results.add("failures", side="the run", reason=reason(error))
    say(f"done: {run.results.path}")
    sys.stdout.flush()
    os._exit(0)  # compiler workers need not be waited for


if __name__ == "__main__":
    main()
