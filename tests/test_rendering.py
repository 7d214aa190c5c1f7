"""What all reports share: every form of each, its schema, its page."""

import importlib
import json
import pkgutil
from html.parser import HTMLParser

import pytest
import torch

import clockwork_hooks as ch
from clockwork_hooks.diffusers import PipelineReport
from clockwork_hooks.reports.plots import Plot, plots
from clockwork_hooks.reports.report import FieldReport, Report, plain
from clockwork_hooks.reports.tables import table
from tests.schemas import follows_its_schema, schema
from tests.small_unet import Tiny
from tests.test_analysis import sampler, tiny


def every(kind=Report):
    """All reports of the package, in whatever file."""
    for module in pkgutil.walk_packages(ch.__path__, "clockwork_hooks."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for one in kind.__subclasses__():
        if one.__module__.startswith("clockwork_hooks.") and one is not FieldReport:  # of which others are made
            yield one
        yield from every(one)


def ran():
    unet = Tiny()
    with torch.no_grad(), ch.wrap(unet) as cw:
        for t in (9, 6, 3):
            unet(torch.ones(1, 2, 8, 8), t)
        return cw.report()


def evaluated():
    unet = Tiny()

    def generate(batch, seed):
        x = torch.full((batch, 2, 8, 8), 0.1 * seed)
        for t in (9, 6, 3):
            x = x - 0.1 * unet(x, t)
        return torch.cat([x, x[:, :1]], 1).clamp(0, 1)

    return ch.evaluate(unet, generate, [2], {"identity": {"clock": 2}}, seeds=(0, 1))


def distilled():
    unet = tiny()

    def generate(prompts):
        sampler(unet)(len(prompts), int(torch.randint(99, ())))

    def build(region):
        return ch.ResNetAdaptor.for_region(region, width=8, inputs=("entry", "exit"))

    both = {"one": build, "other": ch.Student(build, clock=3)}
    return ch.distill(unet, both, generate, prompts=range(4), batch=2, trajectories=2, progress=False)


def disturbed():
    unet = tiny()
    return ch.measure_robustness(unet, sampler(unet), [1], maps=["first"], starts=[1, 2])


def drifted():
    unet = tiny()
    return ch.measure_drift(unet, sampler(unet), [1], clocks=(2,))


def planned():
    unet = tiny()
    return ch.plan(unet, sampler(unet), [1], min_saving=0.2, clocks=(2,), probes=1)


REAL = {
    "run": ran,
    "pipeline": lambda: PipelineReport({"unet": ran()}),
    "region": lambda: ch.find_region(Tiny(), torch.ones(1, 2, 8, 8), 3),
    "flops": lambda: ch.flops_report(Tiny(), torch.ones(1, 2, 8, 8), 3),
    "evaluation": evaluated,
    "robustness": disturbed,
    "drift": drifted,
    "plan": planned,
    "distill": distilled,
}
ELSEWHERE = {  # name → the test that holds a real one against its schema
    "demo": "tests/demo/test_run.py",
    "edits": "tests/test_analysis_cli.py",
    "doctor": "tests/test_doctor.py",
    "regions": "tests/test_cli.py",
    "bench": "tests/test_bench.py",
    "calibration": "tests/test_calibration.py",
    "tuning": "tests/test_tuning.py",
}


@pytest.fixture(scope="module", params=REAL)
def report(request):
    return REAL[request.param]()


class Page(HTMLParser):
    """The cells of a page, what it would fetch, and its data."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.fetched, self.data, self._into = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._into = "data" if ("id", "data") in attrs else tag
        self.fetched += [v for n, v in attrs if n in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self._into in ("td", "th"):
            self.cells[-1] += data
        elif self._into == "data":
            self.data += data

    def handle_endtag(self, tag):
        self._into = ""


def test_every_report_has_a_schema_and_a_test():
    kinds = {one.SCHEMA: one for one in every()}
    assert {kind.split("/")[0] for kind in kinds} == {*REAL, *ELSEWHERE}
    for kind in kinds:
        assert schema(f"clockwork_hooks/{kind}")["additionalProperties"] is False


def test_the_json_follows_its_schema(report):
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    follows_its_schema(data)


def test_a_page_shows_every_cell_and_holds_the_data(report):
    page = Page(report.to_html())
    assert page.fetched == []
    assert json.loads(page.data) == report.to_dict()
    for one in report.tables():
        assert {cell for row in one.rows for cell in row} <= set(page.cells)


def test_every_form_shows_the_same_rows(report):
    cells = {cell for one in report.tables() for row in one.rows for cell in row}
    assert all(cell.replace("|", "\\|") in report.to_markdown() for cell in cells)
    assert set(Page(report._repr_html_()).cells) >= cells


def test_files(report, tmp_path):
    where = tmp_path / "new"
    for suffix in ("json", "md", "html"):
        assert report.save(where / f"r.{suffix}").stat().st_size > 50
    assert json.loads((where / "r.json").read_text(encoding="utf-8")) == report.to_dict()
    if report.figures():
        for suffix in ("svg", "png"):
            assert report.save(where / f"r.{suffix}").stat().st_size > 500
    else:
        with pytest.raises(ch.ArgumentError, match=r"(?m)forms of this report: \.json \.md \.html$"):
            report.save(where / "r.png")
    with pytest.raises(ch.ArgumentError, match="ending tells its form"):
        report.save(where / "r.txt")
    (tmp_path / "taken").write_text("")
    with pytest.raises(ch.ArgumentError, match="can be written"):
        report.save(tmp_path / "taken" / "r.json")


@pytest.mark.parametrize("name", ["evaluation", "robustness", "drift", "plan"])
def test_what_is_read_back_is_what_was_written(name):
    first = REAL[name]()
    kind = type(first)
    again = kind.from_json(first.to_json())
    assert again == first
    assert again.to_json() == first.to_json()
    for text in (
        "{",
        "[]",
        "{}",
        first.to_json().replace("/1", "/9", 1),
        json.dumps({"schema": first.to_dict()["schema"]}),
    ):
        with pytest.raises(ch.ArgumentError, match=f"is what {kind.__name__}.to_json wrote"):
            kind.from_json(text)


def test_a_region_s_levels_hold_all_that_is_skipped():
    region = REAL["region"]()
    (drawn,) = region.figures()
    assert sum(block.macs for block in drawn.blocks) == region.full_macs
    assert sum(block.macs for block in drawn.blocks if block.skipped) == region.macs


def test_a_plot_takes_the_reader_s_colours():
    text = REAL["drift"]().figures()[0].to_svg()
    assert "currentColor" in text
    assert "#010203" not in text
    assert "http://www.w3.org/2000/svg" in text
    assert text.count("http") == text.count("http://www.w3.org/")


def test_a_colour_bar_has_one_number_format():
    figure = REAL["drift"]().figures()[0].draw()
    figure.draw_without_rendering()
    bar = figure.axes[-1].yaxis
    labels = [label.get_text() for label in (*bar.get_ticklabels(), *bar.get_ticklabels(minor=True))]
    assert labels
    assert all(label.endswith("%") for label in labels if label)


def test_a_plan_names_its_pareto_front():
    plan = REAL["plan"]()
    marks = [row[0] for row in plan.table().rows]
    assert marks.count("Pareto") == len(plan.pareto()) - (plan.chosen in plan.pareto())
    assert "Pareto front" in plan.figures()[0].to_svg()


def test_without_matplotlib_a_page_has_no_plots(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plots(Plot(lambda: None, "none")) == ()


def test_plain_is_json_and_nothing_is_lost():
    assert plain({1: (2, float("inf")), "a": torch.float16, "b": [None, True]}) == {
        "1": [2, None], "a": "torch.float16", "b": [None, True]
    }  # fmt: skip


def test_a_report_that_gives_nothing_says_so():
    class Empty(Report):
        pass

    with pytest.raises(NotImplementedError):
        Empty().to_markdown()
    assert table("x", ("a",), []).to_markdown().startswith("**x**")
