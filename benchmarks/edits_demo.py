"""Edits of the demo model's scenes over numbers of steps, ways of saving, and shares of injection.

python -m benchmarks.edits_demo                                        (16 scenes; an hour on a busy core)
python -m benchmarks.edits_demo --again --scenes 256 --device cuda     (minutes)

Every run is saved when it is done; a second call goes on where the first one stopped. Then, where matplotlib is,
`python -m benchmarks.edits_tables` fills docs/editing.md from the JSON and draws its picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import environment, say
from clockwork_hooks.demo import load_demo
from clockwork_hooks.demo.edits import UNTIL_FEATURES, SceneEdits, Way, draw_edits, edit_scenes, usual_ways
from clockwork_hooks.demo.run import ADAPTOR

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/edits_demo.json"
INVERSION_STEPS, STEPS, TARGET, SHOWN = (10, 25, 50, 100, 200), 50, 100, 4
WAYS = (
    Way("full while features are injected", 2, 2, full=UNTIL_FEATURES),
    Way("the same, inversion at clock 4", 4, 2, full=UNTIL_FEATURES),
    Way("full while anything is injected, inversion at clock 3", 3, 2, full=0.5),
    Way("inversion plain, way back at clock 3", 1, 3),
    Way("clock 3", 3, 3),
    Way("clock 2, the trained adaptor that ships", 2, 2, adaptor=str(ADAPTOR)),
)
SHARES = tuple(
    Way(f"{features:g}, {attention:g}", until_features=features, until_attention=attention)
    for features, attention in ((0, 0.5), (0.2, 0.5), (0.3, 0.5), (0.5, 0.5), (0.8, 0.5), (0.3, 0))
)
Run = Callable[..., SceneEdits]


def runs(inversion_steps: list[int]) -> Iterator[tuple[str, Callable[[Run], SceneEdits]]]:
    """Name and measurement of each, the target's own first."""
    first = [TARGET] if TARGET in inversion_steps else []
    for n in first + [n for n in inversion_steps if n != TARGET]:
        yield f"steps/{n}", lambda run, n=n: run(inversion_steps=n, steps=STEPS)
    for way in WAYS:
        yield f"ways/{way.name}", lambda run, way=way: run(inversion_steps=TARGET, steps=STEPS, ways=[way])
    yield "shares", lambda run: run(inversion_steps=50, steps=20, ways=SHARES)


def main(arguments: list[str] | None = None) -> None:
    """Make the runs that are not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="runs to make, by the beginning of their names: steps/100 ways shares")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--inversion-steps", type=int, nargs="+", default=list(INVERSION_STEPS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=7, help="of the scenes")
    parser.add_argument("--again", action="store_true", help="begin a new file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON; pictures go beside it")
    given = parser.parse_args(arguments)
    setting = {"scenes": given.scenes, "seed": given.seed, "device": given.device}
    data: dict[str, Any] = {"setting": setting, "runs": {}}
    if given.out.exists() and not given.again:
        data = json.loads(given.out.read_text(encoding="utf-8"))
        if data["setting"] != setting:
            parser.error(f"{given.out} is of {data['setting']}, and not of {setting}: pass --again, or another --out")
    model, edits = load_demo(given.device), draw_edits(given.scenes, given.seed)

    def run(**options: Any) -> SceneEdits:
        return edit_scenes(edits, model=model, seed=given.seed, **options)

    run(inversion_steps=2, steps=2, ways=usual_ways(2)[:2])  # no run has to warm up
    for name, measure in runs(given.inversion_steps):
        if name in data["runs"] or not name.startswith(tuple(given.only or [""])):
            continue
        begun = time.perf_counter()
        found = measure(run)
        if name == f"steps/{TARGET}":
            given.out.parent.mkdir(parents=True, exist_ok=True)
            keep(found, given.out.with_suffix(".npz"))
        seconds, seen = time.perf_counter() - begun, environment(given.device, given.seed)
        data["runs"][name] = found.data() | {"seconds": round(seconds, 1), "environment": seen}
        write(data, given.out)
        say(f"{name}: {seconds:.0f} s")


def keep(found: SceneEdits, path: Path) -> None:
    """The first scenes' pictures, for `benchmarks.edits_tables` to draw."""
    first = {name: (255 * made[:SHOWN]).round().byte().cpu().numpy() for name, made in found.pictures.items()}
    np.savez_compressed(path, **first)


def write(data: dict[str, Any], path: Path) -> None:
    """All of it in the place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
