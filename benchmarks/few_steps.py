"""Where Clockwork does not pay: few steps, DPM++ and DDIM, on the demo model. The table of docs/limits.md.

    python -m benchmarks.few_steps measure   # minutes on a CPU; benchmarks/results/few_steps.json
    python -m benchmarks.few_steps           # puts its table into the page

All rows of a sampler start from the same noise and are compared with its own picture after 50 plain steps.
"""

import argparse
import json
import platform
import re
from itertools import product
from pathlib import Path
from typing import Any

import torch

import clockwork_hooks as ch
from clockwork_hooks._numbers import percent
from clockwork_hooks.demo import attribute_accuracy, load_demo
from clockwork_hooks.demo.recipe import Recipe
from clockwork_hooks.demo.run import ADAPTOR
from clockwork_hooks.metrics import psnr
from clockwork_hooks.reports.tables import table

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "benchmarks" / "results" / "few_steps.json", ROOT / "docs" / "limits.md"
BETWEEN = re.compile(r"(?<=<!-- few steps -->\n).*?(?=<!-- /few steps -->)", re.DOTALL)
SAMPLERS, COUNTS, LONG = {"dpm++": "DPM++", "ddim": "DDIM"}, (2, 4, 8, 16), 50
COST = 0.6  # of a plain run's MACs, about: the identity at clock 2


def measure(prompts: int) -> dict[str, Any]:
    """Sample every row; the identity at clock 2, the plain model, and the plain model with fewer steps."""
    demo = load_demo()
    texts = list(Recipe.of(captions=prompts, seed=5).captions)
    rows = []
    for sampler in SAMPLERS:
        target = demo.sample(texts, steps=LONG, scheduler=sampler)
        for steps, kind in product(COUNTS, ("plain", "identity", "trained", "fewer")):
            if kind == "trained" and (sampler, steps) != ("dpm++", 8):
                continue  # the adaptor that ships was trained for one sampler and step count
            taken = round(COST * steps) if kind == "fewer" else steps
            schedule = () if kind in ("plain", "fewer") else range(2, steps + 1, 2)
            with ch.wrap(demo.unet, ADAPTOR if kind == "trained" else None, schedule=schedule) as cw:
                images = demo.sample(texts, steps=taken, scheduler=sampler)
                cost = cw.stats.macs_run
            right = attribute_accuracy(demo.classifier, images, texts).total
            rows.append(
                {"sampler": sampler, "steps": steps, "kind": kind, "taken": taken, "macs": cost // prompts,
                 "psnr": float(psnr(images, target).mean()), "right": right}
            )  # fmt: skip
    return {"rows": rows, "prompts": prompts, "torch": torch.__version__, "device": platform.machine() + " CPU"}


def markdown(found: dict[str, Any]) -> str:
    """A line for each number of steps, and one for the adaptor that ships."""
    rows = {(row["sampler"], row["steps"], row["kind"]): row for row in found["rows"]}

    def cell(row: dict[str, Any]) -> str:
        return f"{row['psnr']:.1f} dB, {row['right']:.1%}"

    lines = []
    for (sampler, steps, kind), row in rows.items():
        if kind in ("identity", "trained"):
            plain, fewer = rows[sampler, steps, "plain"], rows[sampler, steps, "fewer"]
            name = f"{SAMPLERS[sampler]}, {steps} steps{', trained' if kind == 'trained' else ''}"
            saved = (percent(1 - one["macs"] / plain["macs"]) for one in (row, fewer))
            lines.append((name, cell(plain), cell(row), next(saved), cell(fewer), next(saved), fewer["taken"]))
    heads = ("", ">plain", ">clock 2", ">saved", ">plain, fewer steps", ">saved", ">steps")
    return table("", heads, lines).to_markdown().removeprefix("****\n\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "render"), default="render")
    parser.add_argument("--prompts", type=int, default=48)
    options = parser.parse_args()
    if options.what == "measure":
        RESULT.write_text(json.dumps(measure(options.prompts), indent=1) + "\n", encoding="utf-8")
    made = markdown(json.loads(RESULT.read_text(encoding="utf-8")))
    PAGE.write_text(BETWEEN.sub(lambda _: made, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(made, end="")


if __name__ == "__main__":
    main()
