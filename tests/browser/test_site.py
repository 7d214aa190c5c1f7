"""The built documentation in a real browser: on a wide and on a narrow screen, light and dark, and its search."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.test_pages import DARK, browse

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
LOOK = """<!doctype html><body><iframe id="f" width="1280" height="900"></iframe><pre id="told"></pre><script>
const wait = ms => new Promise(done => setTimeout(done, ms)), told = [];
async function open(page) {
  const frame = document.getElementById("f");
  await new Promise(done => { frame.onload = done; frame.src = page; });
  return frame.contentDocument;
}
async function look() {
  for (const page of PAGES) {
    const shown = await open(page), images = [...shown.querySelectorAll("article img")], wide = {}, wider = [];
    const still = shown.head.appendChild(shown.createElement("style"));
    still.textContent = "* { transition: none !important }";  // else the search box is still on its way to its place
    const bare = () => [...shown.querySelectorAll("article table")].some(t => !t.closest(".md-typeset__scrollwrap"));
    for (let k = 0; k < 50 && bare(); k++) await wait(20);  // the theme's script frames them, a while after loading
    for (const width of [1280, 390]) {
      document.getElementById("f").width = width;
      await wait(20);
      wide[width] = shown.documentElement.scrollWidth;
      const beyond = [...shown.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width);
      if (wide[width] > width) wider.push(...beyond.slice(0, 5).map(e => `${e.tagName} ${e.className}`));
    }
    told.push({page, wide, wider, title: shown.querySelector("h1")?.textContent ?? "",
      blind: images.filter(i => !i.alt).map(i => i.src), broken: images.filter(i => !i.naturalWidth).map(i => i.src),
      paper: getComputedStyle(shown.body).backgroundColor});
  }
}
async function search(word) {
  const shown = await open("index.html"), box = shown.querySelector("[data-md-component=search-query]");
  shown.getElementById("__search").checked = true;
  box.dispatchEvent(new Event("focus"));
  for (let k = 0; k < 100 && !shown.querySelector(".md-search-result__item a"); k++) {
    box.value = word;
    box.dispatchEvent(new KeyboardEvent("keyup", {key: "n", bubbles: true}));
    await fetch("/wait");  // the browser's virtual clock would not wait for the worker that searches
  }
  told.push(...[...shown.querySelectorAll(".md-search-result__item a")].map(a => a.getAttribute("href")));
}
DO.then(() => { document.getElementById("told").textContent = JSON.stringify(told); });
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The site, and the address at which it is served."""
    folder = tmp_path_factory.mktemp("site")
    if shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None:
        pytest.fail("the site is built by mkdocs: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/wait":
                time.sleep(0.2)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(site: tuple[Path, str], what: str, *words: str) -> Any:
    folder, address = site
    pages = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.html")
        if path.name not in ("404.html", "look.html")
    )
    assert len(pages) > 30
    text = LOOK.replace("PAGES", json.dumps(pages)).replace("DO", what)
    (folder / "look.html").write_text(text, encoding="utf-8")
    dom = browse("--dump-dom", "--virtual-time-budget=60000", *words, f"{address}/look.html", seconds=600)
    match = re.search(r'<pre id="told">(.+?)</pre>', dom, re.S)
    assert match, "the browser was not done"
    return json.loads(html.unescape(match[1]))


@pytest.mark.parametrize(("look", "words"), [("light", ()), ("dark", (DARK,))])
def test_every_page_is_read_on_a_wide_and_on_a_narrow_screen(
    site: tuple[Path, str], look: str, words: tuple[str, ...]
) -> None:
    """What is wider than the screen scrolls in a frame of its own; pictures are there, and say what they show."""
    for fault in run(site, "look()", *words):
        assert all(wide <= int(width) for width, wide in fault["wide"].items()), fault
        assert (fault["blind"], fault["broken"]) == ([], []), fault
        assert fault["title"], fault
        assert (sum(map(int, re.findall(r"\d+", fault["paper"])[:3])) < 200) == (look == "dark"), fault


def test_the_search_finds_pages(site: tuple[Path, str]) -> None:
    pages = run(site, 'search("region")')
    assert any("regions.html" in link for link in pages), pages
    assert len({link.split("#")[0].split("?")[0] for link in pages}) > 3


def test_the_search_works_from_the_disk_without_a_network(site: tuple[Path, str]) -> None:
    page = (site[0] / "errors" / "index.html").as_uri()
    off = ("--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND")
    links = re.findall(r'href="([^"]+)" class="md-search-result__link"', browse("--dump-dom", *off, f"{page}?q=region"))
    assert any("/regions.html" in link for link in links), links
    assert all(link.startswith("file:") for link in links), links


def test_no_page_fetches_anything_from_outside(site: tuple[Path, str]) -> None:
    pages = list(site[0].rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:[^\s\">]+)", text)
        fetched += re.findall(r"<link\b[^>]*\bhref=\"?(https?:[^\s\">]+)", text)
        assert not fetched, (page, fetched)
