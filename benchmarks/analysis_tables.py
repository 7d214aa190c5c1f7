"""The tables and plots of docs/analysis.md, from benchmarks/results/analysis_demo.json.

python -m benchmarks.analysis_tables
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import clockwork_hooks as ch
from clockwork_hooks._numbers import percent
from clockwork_hooks.reports.tables import Table, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/analysis_demo.json"
FIGURES = ROOT / "docs"


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Marker → Markdown, for each marker of the page."""
    made = {name: render(data[name]) for name, render in RENDERERS.items() if name in data}
    plans = sorted((name for name in data if name.startswith("plan-")), key=lambda name: int(name.split("-")[1]))
    parts = [_plan(data[name], data.get(name.replace("plan", "compare"))) for name in plans]
    return made | ({"plan": "\n\n".join(parts)} if parts else {})


def draw(data: dict[str, Any], folder: Path) -> None:
    """The plots; the grid of pictures is drawn where they are made."""
    for name, part in data.items():
        if name == "robustness":
            ch.Robustness.from_json(json.dumps(part)).plot(folder / "analysis-robustness.png")
        elif name == "drift":
            _only(part, ch.Drift).plot(folder / "analysis-drift.png")
        elif name.startswith("plan-"):
            ch.Plan.from_json(json.dumps(part)).plot(folder / f"analysis-{name}.png")


def _only(part: dict[str, Any], kind: type[ch.Drift]) -> ch.Drift:
    """A part's own data, without the facts about how it was measured."""
    return kind.from_json(json.dumps({name: part[name] for name in ("schema", *kind.__slots__)}))


def _measured(part: dict[str, Any]) -> str:
    seen = part["environment"]
    return (
        f"`{part['command']}`, {part['seconds']:.0f} s on {seen['threads']} thread(s) of {seen['device']}, "
        f"torch {seen['versions']['torch']}, {seen['date']}."
    )


def _robustness(part: dict[str, Any]) -> str:
    return f"{ch.Robustness.from_json(json.dumps(part)).to_markdown()}\n\n{_measured(part)}"


def _drift(part: dict[str, Any]) -> str:
    return f"{_only(part, ch.Drift).to_markdown()}\n\n{_measured(part)}"


def _plan(part: dict[str, Any], compared: dict[str, Any] | None) -> str:
    found = ch.Plan.from_json(json.dumps(part))
    picture = f"![error over saving](analysis-plan-{found.steps}.png)"
    shown = [f"### {found.steps} steps", picture, _chosen(found), _measured(part)]
    if compared is not None:
        shown += [_compared(found, compared), _measured(compared)]
    return "\n\n".join(shown)


def _chosen(plan: ch.Plan) -> str:
    """What `plan` decided; all that was measured is in the JSON, and stands in the table where it was held out."""
    chosen = plan.chosen
    steps = ", ".join(map(str, chosen.steps))
    errors = zip(("predicted", "measured", "held out"), (chosen.predicted, chosen.measured, plan.held_out), strict=True)
    told = ", ".join(f"{name} {percent(error)}" for name, error in errors)
    return f"`plan` chooses the adaptor at {steps}, which is {plan.rule}. Relative L2 error of the result: {told}."


def _compared(plan: ch.Plan, part: dict[str, Any]) -> str:
    """Every schedule on what was not planned with; beside each clock the best planned set of no more MACs."""
    known = {(o.region, str(o.schedule)): o.measured for o in plan.options}
    planned = [row for row in part["rows"] if row["kind"] == "planned"]
    rows, region = [], min((row["region"] for row in part["rows"]), key=len)  # of the identity
    for row in sorted(part["rows"], key=lambda row: (row["saved"], -row["error"])):
        rivals = [other["error"] for other in planned if other["saved"] >= row["saved"] - 1e-9]
        clock = row["kind"].startswith("clock")
        name = row["schedule"] if row["kind"] != "planned" else "planned"
        before = known.get((row["region"], row["schedule"]))
        rival = percent(min(rivals)) if clock and rivals else "–"
        adaptor = row["region"].removeprefix(region).removeprefix(", ") or "identity"
        rows.append((name, adaptor, percent(row["saved"]), percent(before), percent(row["error"]), rival))
    beaten = [row[4:] for row in rows if row[0].startswith("every")]
    count = sum(rival != "–" and float(rival[:-1]) < float(error[:-1]) for error, rival in beaten)
    heads = ("schedule", "adaptor", ">saved", ">error, planned with", ">error, held out", ">planned at no more MACs")
    notes = (
        f"Region: {region}. Held out: other prompts and another seed. The last column is the held-out error of the "
        f"best planned set that saves at least as much: it is below that of {count} of {len(beaten)} uniform clocks.",
    )
    made: Table = table(f"{plan.steps} steps, held out", heads, rows, notes=notes)
    return made.to_markdown()


RENDERERS = {"robustness": _robustness, "drift": _drift}


def filled(text: str, made: dict[str, str]) -> str:
    """The page with each table after its marker; what stood there before goes."""
    for name, markdown in made.items():
        pattern = rf"<!-- {name} -->\n(?:.*?<!-- end of {name} -->\n)?"
        whole = f"<!-- {name} -->\n\n{markdown}\n\n<!-- end of {name} -->\n"
        text = re.sub(pattern, whole.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def main() -> None:
    """Write the page and the plots."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(data, FIGURES)
    page = ROOT / "docs/analysis.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), tables(data)), encoding="utf-8")


if __name__ == "__main__":
    main()
