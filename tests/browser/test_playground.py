"""The playground's page in a real browser: it draws by itself, and again when steps are clicked."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clockwork_hooks.demo import playground
from tests.browser.test_pages import DARK, browse

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")]
CLICKS = """<script>
(async () => {
  const wait = async () => { while (!at("verdict").textContent.includes("MACs")) await fetch("/"); };
  await wait();
  document.querySelector("[data-rule=ends]").click();
  at("draw").click();
  await wait();
  at("strip").children[3].click();
  document.body.dataset.strip = [...at("strip").children].map(button => button.textContent[0]).join("");
})();
</script>"""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    page = tmp_path / "page.html"
    page.write_text(playground.PAGE.read_text(encoding="utf-8").replace("</body>", CLICKS + "</body>"))
    monkeypatch.setattr(playground, "PAGE", page)
    with playground.serve(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("look", [(), (DARK,)], ids=["light", "dark"])
def test_the_page_draws_and_its_steps_are_clicked(address: str, look: tuple[str, ...], tmp_path: Path) -> None:
    dom = browse("--dump-dom", "--virtual-time-budget=60000", *look, address, seconds=300)
    verdict = re.search(r'id="verdict"[^>]*>([^<]*)<', dom)
    assert verdict
    assert re.match(r"FFAFAFAF: \d+\.\d% fewer MACs, PSNR \d+\.\d dB", verdict[1]), verdict[1]
    assert 'data-strip="FFAAAFAF"' in dom
    assert dom.count("data:image/png;base64,") == 2
    assert "schedule={3, 4, 5, 7}" in dom
    assert re.search(r'id="error"[^>]*></p>', dom)
