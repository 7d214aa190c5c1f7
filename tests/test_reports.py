"""Reports as pages, against their schema, and against a budget."""

import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

import clockwork_hooks as ch
from clockwork_hooks._numbers import macs
from clockwork_hooks.cli import main
from clockwork_hooks.cli.budget import check_budget, read_budget
from clockwork_hooks.models import load_model
from clockwork_hooks.reports import progress
from clockwork_hooks.reports.tables import page, table

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"


@pytest.fixture(scope="module")
def report():
    unet, args, kwargs = load_model("ddpm-cifar10")
    return ch.flops_report(unet, *args, **kwargs)


class Cells(HTMLParser):
    """The texts of a page's cells, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.fetched, self._open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._open = tag in ("td", "th")
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if self._open:
            self.cells.append("")

    def handle_data(self, data):
        if self._open:
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self._open = False


def test_a_long_name_leaves_room_for_the_other_columns():
    """Of eighty columns, as most terminals have."""
    row = ("clock 3, first 2 full, calibrated for it (chosen)", "3 4 6 7", "level 1, 93.1% of MACs", "exit+entry", "1")
    out = StringIO()
    Console(file=out, width=80).print(table("Tuning", ("schedule", "steps", "region", "adaptor", ">error"), [row]))
    lines = out.getvalue().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 6  # title, heads, rule, and a row of three lines at most


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_cell_is_cut_however_narrow_the_terminal(width):
    """Cells fold at spaces; where that does not do, each row is a record, every cell beside its heading."""
    heads = ["name", *(f">clock {k}, result" for k in range(9)), "remark"]
    rows = [(f"row {r}", *(f"{100 * r + k}.5%" for k in range(9)), "words that may break") for r in range(3)]
    console = Console(file=StringIO(), width=width)
    console.print(table("Wide", heads, rows))
    lines = console.file.getvalue().splitlines()
    words = [word for line in lines for word in line.split()]
    assert all(len(line) <= width for line in lines)
    assert {cell for row in rows for cell in row[1:10]} <= set(words)
    assert words.count("result") == (9 if width >= 80 else 27)
    assert words.count("words") == 3
    assert sum("Wide" in line for line in lines) == 1


def shown(terminal, every, monkeypatch):
    """What a bar writes over two steps of a task."""
    monkeypatch.setattr(progress, "EVERY", every)
    console = Console(file=StringIO(), width=100, force_terminal=terminal)
    with progress.ProgressBar(console) as bar:
        task = bar.add_task("sampling", total=4)
        bar.advance(task)
        bar.update(task, advance=1, description="[identity]", detail="loss 0.5")
    return console.file.getvalue()


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    first, second = shown(False, 0.0, monkeypatch).splitlines()
    assert first.startswith("sampling 25%, 0:00:00")
    assert second.startswith("[identity] 50%, 0:00:00")
    assert second.endswith("loss 0.5")
    assert shown(False, 30.0, monkeypatch) == ""


def test_on_a_terminal_progress_is_a_bar_that_leaves_nothing(monkeypatch):
    text = shown(True, 0.0, monkeypatch)
    assert "[identity]" in text
    assert "50%" in text
    assert text.endswith("\x1b[2K")  # its line is cleared


def test_a_page_shows_the_numbers_and_holds_the_data(report):
    text = report.to_html()
    cells = Cells(text)
    for amount in (report.full_macs, report.adaptor_pass_macs, report.trajectory_macs):
        assert macs(amount) in cells.cells
    stored = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(stored) == report.to_dict()
    assert cells.fetched == []
    assert "<svg" in text


def test_a_page_escapes_what_models_are_called():
    text = page("<b>", [table("a<b", ("c&d",), [("<script>",)]), "x < y"], data={"name": "</script><script>"})
    assert "<b>" not in text
    assert text.count("<script") == 1
    assert "x &lt; y" in text


@pytest.mark.parametrize("attention", [True, False])
def test_the_json_follows_its_schema(report, attention):
    schema = json.loads((SCHEMAS / "flops-1.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    unet, args, kwargs = load_model("ddpm-cifar10")
    other = ch.flops_report(unet, *args, attention=attention, guidance=True, cut="outer", **kwargs)
    for one in (report, other):
        jsonschema.validate(json.loads(one.to_json()), schema)
    broken = {**report.to_dict(), "full_macs": "many"}
    with pytest.raises(jsonschema.ValidationError, match="many"):
        jsonschema.validate(broken, schema)


def test_without_a_region_the_json_follows_the_schema_too():
    import torch

    schema = json.loads((SCHEMAS / "flops-1.schema.json").read_text(encoding="utf-8"))
    count = ch.flops_report(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
    assert count.region is None
    jsonschema.validate(json.loads(count.to_json()), schema)


def test_a_budget_names_what_is_over(report):
    checks = check_budget(report, {"full_macs": report.full_macs, "trajectory_macs": report.trajectory_macs - 1})
    assert checks.exceeded == ("trajectory_macs",)
    rows = {row[0]: row for row in checks.table().rows}
    assert rows["full_macs"][-1] == "within"
    assert rows["trajectory_macs"][-1] == "over"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "a budget is a JSON file"),
        ("{}", "it is empty"),
        ('{"speed": 3}', "speed"),
        ('{"full_macs": -1}', "a positive number"),
        ('{"full_macs": true}', "a positive number"),
        ('{"full_macs": 1e999}', "a positive number"),
        ("[1]", "no object"),
    ],
)
def test_a_budget_that_is_none(tmp_path, text, said):
    (tmp_path / "budget.json").write_text(text)
    with pytest.raises(ch.ArgumentError, match=said):
        read_budget(tmp_path / "budget.json")


def test_a_budget_for_adaptor_passes_needs_a_region():
    import torch

    count = ch.flops_report(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ch.ArgumentError, match="no region because"):
        check_budget(count, {"trajectory_macs": 1})


def test_the_command_writes_a_page_and_fails_over_budget(report, tmp_path, capsys):
    budget = tmp_path / "budget.json"
    budget.write_text(json.dumps({"trajectory_macs": report.trajectory_macs}))
    words = ["flops", "ddpm-cifar10", "--format", "json", "--check", str(budget)]
    assert main([*words, "--html", str(tmp_path / "report.html")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["trajectory_macs"] == report.trajectory_macs  # standard output is the report alone
    assert "within" in err
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    budget.write_text(json.dumps({"trajectory_macs": report.trajectory_macs - 1}))
    assert main(words) == 1
    assert "over" in capsys.readouterr().err
