"""The code blocks of docs/regions.md run, one after the other, and its table of passes is what happens."""

import re
from pathlib import Path
from typing import Any

import pytest

DOC = (Path(__file__).parents[2] / "docs" / "regions.md").read_text(encoding="utf-8")


def test_the_examples_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "docs"}
    blocks = re.findall(r"```python\n(.*?)```", DOC, re.S)
    assert len(blocks) == 6
    for block in blocks:
        exec(block, space)
    printed = capsys.readouterr().out
    assert "level 3" in printed
    assert "1 full, 2 with the adaptor" in printed
    assert "full because first step: 1" in printed


def test_the_errors_named_are_those_of_the_code() -> None:
    """The beginning of each row of the last table is a rule that some error states."""
    package = Path(__file__).parents[2] / "clockwork_hooks"
    source = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source).replace("{name}", "level")
    rows = re.findall(r"^\| ([^|]+) \| .+ \| .+ \|$", DOC.split("## What the errors mean")[1], re.M)[1:]
    assert len(rows) == 10
    for row in rows:
        assert row.split(" …")[0].split(", resolution")[0] in source, row
