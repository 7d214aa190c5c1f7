"""Every kind of report in a real browser: what it shows is what was counted, and each of its looks is drawn.

Needs Chromium: `make test-browser` installs nothing and says what is missing; `.ci/run` installs Debian's package.
"""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import clockwork_hooks as ch
from clockwork_hooks._numbers import flops, macs
from clockwork_hooks.cli.look import RegionList
from clockwork_hooks.graph.tracing import record
from clockwork_hooks.models import load_model
from clockwork_hooks.regions.blocks import diagram_of
from clockwork_hooks.regions.find import regions_of
from tests.test_rendering import REAL

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DARK = "--blink-settings=preferredColorScheme=0"
OUT = Path(__file__).parent.parent.parent / "out" / "browser"


def counted():
    unet, args, kwargs = load_model("sd15")
    return ch.flops_report(unet, *args, guidance=True, **kwargs)


def listed():
    unet, args, kwargs = load_model("sd15")
    trace = record(unet, args, kwargs)
    regions = regions_of(trace, unet)
    return RegionList(regions, regions[2], diagram_of(trace, regions[2]))


def timed():
    unet, args, kwargs = load_model("ddpm-cifar10", tiny=True, device="cpu")
    return ch.bench(unet, *args, steps=4, rounds=3, **kwargs)


KINDS = {**REAL, "flops": counted, "regions": listed, "bench": timed}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def report(kind):
    return KINDS[kind]()


@pytest.fixture(scope="module")
def address(kind, report, tmp_path_factory):
    """In a folder of this process's own: another one measures its own times."""
    return report.save(tmp_path_factory.mktemp("page") / f"{kind}.html").as_uri()


def browse(*words, seconds=120):
    if CHROMIUM is None:
        pytest.fail("the browser tests need Chromium: apt-get install chromium")
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000")
    done = subprocess.run([CHROMIUM, *fixed, *words], capture_output=True, text=True, timeout=seconds, check=True)
    return done.stdout


class Dom(HTMLParser):
    """Rows of all tables, the data, and the words of the pictures, as the browser has them."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.words, self.data, self._into = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "text":
            self.words.append("")
        self._into = "data" if ("id", "data") in attrs else tag

    def handle_data(self, text):
        if self._into in ("td", "th"):
            self.rows[-1][-1] += text
        elif self._into == "text":
            self.words[-1] += text
        elif self._into == "data":
            self.data += text

    def handle_endtag(self, tag):
        self._into = None


def test_the_page_shows_every_row_and_holds_the_data(report, address):
    dom = Dom(browse("--dump-dom", address))
    for one in report.tables():
        for row in one.rows:
            assert list(row) in dom.rows
    assert json.loads(dom.data) == report.to_dict()
    assert bool(dom.words) == bool(report.figures())


def test_the_numbers_in_the_page_are_those_that_were_counted(tmp_path):
    report = counted()
    dom = Dom(browse("--dump-dom", report.save(tmp_path / "flops.html").as_uri()))
    rows = {row[0]: row[1:] for row in dom.rows if row}
    assert rows["full pass"][:2] == [macs(report.full_macs), flops(report.full_flops)]
    assert rows["adaptor pass"][:2] == [macs(report.adaptor_pass_macs), flops(report.adaptor_pass_flops)]
    assert rows["8 steps with guidance, 4 of them full"][:2] == [
        macs(report.trajectory_macs),
        flops(report.trajectory_flops),
    ]
    assert {"entry", "exit", "64×64", "8×8"} <= set(dom.words)


@pytest.mark.parametrize(
    ("name", "size", "more"),
    [("light", (1000, 1600), ()), ("dark", (1000, 1600), (DARK,)), ("narrow", (420, 1600), ())],
)
def test_every_look_is_drawn(kind, address, name, size, more):
    target = OUT / f"{kind}-{name}.png"
    OUT.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    browse(f"--window-size={size[0]},{size[1]}", f"--screenshot={target}", *more, address)
    with Image.open(target) as picture:
        pixels = picture.convert("RGB")
        corner = pixels.getpixel((2, 2))
        assert (sum(corner) < 150) == (name == "dark"), corner
        colours = {colour for _, colour in pixels.getcolors(1 << 22)}
        assert len(colours) > 30  # text, bars and the picture, not a blank page
    region = (107, 71, 24) if name == "dark" else (246, 207, 160)
    assert kind not in ("flops", "region", "regions") or name == "narrow" or region in colours


def test_the_page_asks_the_network_for_nothing(report):
    text = report.to_html().replace("http://www.w3.org/", "").replace("url(#", "")
    assert [word for word in ("http://", "https://", "url(", "@import") if word in text] == []
