"""The tables of docs/analysis.md and docs/editing.md, from benchmarks/results/analysis_demo.json.

python -m benchmarks.analysis_tables
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import clockwork_hooks as ch
from clockwork_hooks.demo.edits import EditRow, SceneEdits
from clockwork_hooks.report import Table, percent, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/analysis_demo.json"
FACTS = ("seconds", "command", "environment", "prompts", "fresh")


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Marker → Markdown, for each marker of the pages."""
    made = {name: render(data[name]) for name, render in RENDERERS.items() if name in data}
    plans = [_plan(data[name]) for name in sorted(data) if name.startswith("plan-")]
    return made | ({"plan": "\n\n".join(plans)} if plans else {})


def _own(part: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in part.items() if name not in FACTS})


def _measured(part: dict[str, Any]) -> str:
    seen = part["environment"]
    return (
        f"`{part['command']}`, {part['seconds']:.0f} s on {seen['threads']} thread(s) of {seen['device']}, "
        f"torch {seen['versions']['torch']}, {seen['date']}."
    )


def _robustness(part: dict[str, Any]) -> str:
    found = ch.Robustness.from_json(_own(part))
    return f"{found.to_markdown()}\n\n{_measured(part)}"


def _drift(part: dict[str, Any]) -> str:
    found = ch.Drift.from_json(_own(part))
    return f"{found.to_markdown()}\n\n{_measured(part)}"


def _plan(part: dict[str, Any]) -> str:
    found = ch.Plan.from_json(_own(part))
    rows = [(name, percent(error)) for name, error in part["fresh"].items()]
    fresh: Table = table(f"{found.steps} steps, other prompts and noise", ("schedule", ">error of the result"), rows)
    picture = f"![error over saving](analysis-plan-{found.steps}.png)"
    return "\n\n".join((found.to_markdown(), fresh.to_markdown(), picture, _measured(part)))


def _edits(part: dict[str, Any]) -> str:
    runs = [SceneEdits(tuple(EditRow(**row) for row in run["rows"]), run["settings"], {}) for run in part["runs"]]
    return "\n\n".join((*(run.to_markdown() for run in runs), _measured(part)))


RENDERERS = {"robustness": _robustness, "drift": _drift, "edits": _edits}


def filled(text: str, made: dict[str, str]) -> str:
    """The page with each table after its marker; what stood there before goes."""
    for name, markdown in made.items():
        pattern = rf"<!-- {name} -->\n(?:.*?<!-- end of {name} -->\n)?"
        whole = f"<!-- {name} -->\n\n{markdown}\n\n<!-- end of {name} -->\n"
        text = re.sub(pattern, whole.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def main() -> None:
    """Write the pages."""
    made = tables(json.loads(RESULTS.read_text(encoding="utf-8")))
    for page in (ROOT / "docs/analysis.md", ROOT / "docs/editing.md"):
        page.write_text(filled(page.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
