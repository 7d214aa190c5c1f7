"""`benchmarks/fidelity.py` in miniature, and docs/results.md against its JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fidelity, render
from benchmarks.fidelity_plan import GROUPS, Trained
from benchmarks.fidelity_results import Results, claims
from benchmarks.fidelity_tables import FEWER, IDENTITY, MODES, MORE, OURS, PLAIN, SHIPS, TABLES
from clockwork_hooks.demo.weights import WEIGHTS

RESULT = Path(fidelity.RESULT)
KEYS = {f"{group.name}/{label}" for group in GROUPS for label in ("plain", *(row.label for row in group.rows))}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_train_measure_resume_collect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three adaptors trained and measured; a second run finds all there; one row taken out is the one done again."""
    run = ["run", "--out", str(tmp_path / "out"), "--tiny", "--groups", "modes-4"]
    assert fidelity.main(run) == 0
    assert "all is there" in capsys.readouterr().out
    row_file = tmp_path / "out" / "rows" / "modes-4.json"
    first = json.loads(row_file.read_text())
    assert list(first["rows"]) == ["plain", "unrolled", "forward-noise", "on-policy"]
    row = first["rows"]["on-policy"]
    assert list(row["errors"]["feature"]) == list(row["errors"]["output"]) == ["2", "4"]
    assert row["full_passes"] == row["adaptor_passes"] == 4  # two seeds of one batch, four steps
    assert row["macs_per_image"] < first["rows"]["plain"]["macs_per_image"]

    before = row_file.stat().st_mtime_ns
    assert fidelity.main(run) == 0
    assert "0 groups to do" in capsys.readouterr().out
    assert row_file.stat().st_mtime_ns == before

    del first["rows"]["on-policy"]
    first["rows"]["forward-noise"]["kind"] = (
        "ResNetAdaptor"  # an earlier plan's row of that label is not the planned one
    )
    row_file.write_text(json.dumps(first))
    assert fidelity.main(run) == 0
    assert "trained" not in capsys.readouterr().out  # the adaptor's folder was there
    assert json.loads(row_file.read_text())["rows"]["forward-noise"]["kind"] == "ScaledResNetAdaptor"
    again = json.loads(row_file.read_text())["rows"]["on-policy"]
    for name, score in row["scores"].items():
        assert again["scores"][name]["values"] == pytest.approx(score["values"]), name

    result = tmp_path / "fidelity.json"
    assert fidelity.main(["collect", "--out", str(tmp_path / "out"), "--result", str(result)]) == 0
    data = json.loads(result.read_text())
    modes = ("unrolled", "forward-noise", "on-policy")
    assert set(data["rows"]) == {"modes-4/plain", *(f"modes-4/{mode}" for mode in modes)}
    trained = {student for one in data["training"].values() for student in one["students"]}
    assert trained == {f"modes_4_{mode.replace('-', '_')}" for mode in modes}
    assert "not measured" in render.render(data)

    assert fidelity.main(["collect", "--out", str(tmp_path / "nothing"), "--result", str(result)]) == 0
    assert json.loads(result.read_text()) == data  # what other folders brought stays


def test_no_group_begins_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fidelity.main(["run", "--out", str(tmp_path), "--tiny", "--minutes", "0.1"])
    assert f"left: {GROUPS[0].name}" in capsys.readouterr().out
    assert not (tmp_path / "rows").exists()


def test_plan_and_tables_fit() -> None:
    """Every row of a table is planned, every planned row is in a table, and names of adaptors are unique."""
    shown = {key for _, _, keys in TABLES for key in keys}
    shown |= {key for ways in MODES.values() for keys in ways.values() for key in keys}
    assert shown <= KEYS
    assert {FEWER, MORE, IDENTITY, OURS, PLAIN} | set(fidelity.TIMED) <= KEYS
    plain = {f"{group.name}/plain" for group in GROUPS}
    assert KEYS - shown - plain == set()
    names = [row.adaptor.name for group in GROUPS for row in group.rows if isinstance(row.adaptor, Trained)]
    assert len(names) == len(set(names))


def made_up(**frechet: tuple[float, ...]) -> dict[str, Any]:
    """Results in which only the headline rows were measured."""
    values = {
        PLAIN: (20.0, 21.0, 22.0),
        IDENTITY: (40.0, 41.0, 42.0),
        FEWER: (30.0, 31.0, 32.0),
        MORE: (24.0, 25.0, 26.0),
    }
    values |= {OURS: frechet.get("ours", (19.0, 20.0, 21.0))}
    steps = {FEWER: 5, MORE: 6}
    cost = {PLAIN: 100, IDENTITY: 60, OURS: 66, FEWER: 62, MORE: 75}
    settings = {"images": 4, "seeds": [0, 1, 2], "device": "none", "dtype": "float32", "versions": {"torch": "2"}}
    rows = {
        key: {
            "scores": {"Fréchet": {"values": list(v)}, "attributes right": {"values": [99.0 - k for k in range(3)]}},
            "macs_per_image": cost[key],
            "steps": steps.get(key),
            "sampler": {"steps": 8},
            "settings": settings,
        }
        for key, v in values.items()
    }
    times = {key: {"batch 8": {"median": cost[key] / 1e6}, "batch 1": {"median": 1e-3}} for key in rows}
    return {"commands": ["made up"], "rows": rows, "time": {"rows": times}, "training": {}}


def verdicts(data: dict[str, Any]) -> dict[str, bool | None]:
    return {claim.target: claim.met for claim in claims(Results(data))}


def test_targets_are_judged_by_the_numbers() -> None:
    good = verdicts(made_up())
    assert [met for met in good.values() if met is not None] == [True] * 6
    worse = made_up(ours=(27.0, 28.0, 29.0))
    changed = {target for target, met in verdicts(worse).items() if met is not good[target]}
    assert changed == {t for t in good if "Fréchet at most" in t or ("8 DPM++ steps" in t and "with 6 steps" in t)}
    dear = made_up()
    dear["rows"][OURS]["macs_per_image"] = 69
    assert verdicts(dear)["8 DPM++ steps, clock 2, default cut: at least 32% fewer MACs, attention counted"] is False
    blind = made_up()
    blind["rows"][OURS]["scores"]["attributes right"]["values"] = [98.0, 97.0, 96.0]
    assert verdicts(blind)["8 DPM++ steps, clock 2, default cut: attributes within 0.5 points of plain"] is False


def test_the_best_row_is_judged_too() -> None:
    """Of the trained rows with the plain row's sampler that save enough, the one with the lowest distance."""
    data = made_up()
    sampler = {"scheduler": "dpm++", "steps": 8, "guidance": 1.5}
    for key, cost, value in (("best-8/width 32, 3 5 7", 67, 12.0), ("best-8/width 64, 3 5 7", 69, 10.0)):
        row = {**copy.deepcopy(data["rows"][OURS]), "loss": "guided-output", "sampler": sampler}
        row["scores"]["Fréchet"]["values"] = [value] * 3
        data["rows"][key] = {**row, "macs_per_image": cost}
    data["rows"]["best-8/plain"] = data["rows"][PLAIN]
    judged = verdicts(data)
    assert judged["8 DPM++ steps, best of all, `best-8/width 32, 3 5 7`: Fréchet at most the plain model's"] is True
    assert not any("best-8/width 64" in target for target in judged)


def test_intervals_by_hand() -> None:
    """Differences −1 in every seed: no spread; differences 0, −1, −2: 95% interval −1 ± 4.303/√3."""
    assert "−1 ± 0, 95% interval −1 to −1.\n" in render.render(made_up())
    noisy = render.render(made_up(ours=(20.0, 20.0, 20.0)))
    assert "−1 ± 1, 95% interval −3.48 to +1.48 (the interval includes 0)" in noisy


def test_the_page_shows_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = render.render(made_up())
    assert "20.00 ± 1.00" in page
    assert "34.0%" in page
    assert "**missed**" not in page
    assert "**missed**" in render.render(made_up(ours=(27.0, 28.0, 29.0)))
    monkeypatch.setitem(render.PLOTS, "macs", tmp_path / "macs.png")
    monkeypatch.setitem(render.PLOTS, "ms", tmp_path / "ms.png")
    assert all(path.stat().st_size > 10_000 for path in render.plot(made_up()))


def test_ways_of_training_are_judged_over_training_seeds() -> None:
    """Means over the evaluation seeds first: differences −3, −3, −6 over three training seeds; −4 ± 4.303 · √3 / √3."""
    data = made_up()
    for way, values in {
        "unrolled": (7.0, 8.0, 6.0),
        "forward-noise": (10.0, 11.0, 12.0),
        "on-policy": (20.0,) * 3,
    }.items():
        for key, value in zip(MODES[4][way], values, strict=True):
            row = copy.deepcopy(data["rows"][OURS])
            row["errors"] = {"feature": {"2": value / 10, "4": 0.1}, "output": {"2": 0.2, "4": 0.4}}
            row["scores"]["Fréchet"]["values"] = [value - 1, value, value + 1]
            row["scores"]["PSNR"] = {"values": [30.0]}
            data["rows"][key] = row
    judged = {claim.target: claim for claim in claims(Results(data))}[
        "4 steps: unrolled or on-policy training beats forward-noise training"
    ]
    assert judged.met is True
    assert judged.found.startswith("unrolled: Fréchet −4 ± 1.73, 95% interval −8.3 to +0.303 (the interval includes 0)")
    page = render.render(data)
    assert "7.00 ± 1.00" in page
    assert "2: 70.0, 4: 10.0" in page
    assert "4 steps, on-policy less forward-noise: Fréchet +9 ± 1, " in page


def test_a_better_loss_is_named_by_the_numbers() -> None:
    data = made_up()
    for loss, value in (("feature", 30.0), ("guided-feature", 10.0)):
        data["rows"][f"losses-8/{loss}"] = copy.deepcopy(data["rows"][OURS])
        data["rows"][f"losses-8/{loss}"]["scores"]["Fréchet"]["values"] = [value] * 3
    assert "Of the three losses, guided-feature has the lowest Fréchet distance" in render.render(data)


def test_what_is_missing_or_of_another_kind_is_told() -> None:
    """A group is done once every row was measured with the planned adaptor; the others stand in the command."""
    measured = {f"{g.name}/{row.label}": {**row.told} for g in GROUPS for row in g.rows if g.name != "clocks-50"}
    results = Results({"rows": measured, "training": {}})
    assert [group.name for group in results.unmeasured] == ["clocks-50"]
    measured["inputs-8/exit"]["kind"] = "ScaledResNetAdaptor"
    assert [group.name for group in results.unmeasured] == ["inputs-8", "clocks-50"]
    assert results.name("inputs-8/exit") == "inputs-8/exit (ScaledResNetAdaptor)"
    assert results.name("inputs-8/entry") == "inputs-8/entry"
    assert "--groups inputs-8,clocks-50\n" in render._unmeasured(results)


@pytest.mark.skipif(not RESULT.exists(), reason="not measured yet")
def test_the_adaptor_that_ships_is_a_measured_one() -> None:
    config = json.loads((WEIGHTS / "adaptor" / "config.json").read_text(encoding="utf-8"))
    key = config["facts"]["measured_as"].removesuffix(" in docs/results.md")
    assert key == SHIPS
    results = Results(json.loads(RESULT.read_text(encoding="utf-8")))
    assert results.row(key)["kind"] == config["kind"]
    assert results.row(key)["loss"] == config["facts"]["loss"]
    assert results.updates(key) == config["facts"]["gradient_steps"]


@pytest.mark.skipif(not RESULT.exists(), reason="not measured yet")
def test_the_docs_are_rendered_from_the_json() -> None:
    assert render.PAGE.read_text(encoding="utf-8") == render.render(json.loads(RESULT.read_text(encoding="utf-8")))
