"""The playground draws what the library draws, answers mistakes in words, and listens to this machine alone."""

import base64
import http.client
import io
import json
import threading
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

import clockwork_hooks as ch
from clockwork_hooks.cli import main
from clockwork_hooks.demo.model import DEMO_PROMPTS, load_demo
from clockwork_hooks.demo.playground import Playground, serve
from clockwork_hooks.errors import ArgumentError, ClockworkError, DemoError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
PROMPT = DEMO_PROMPTS[0]


@pytest.fixture(scope="module")
def playground() -> Playground:
    return Playground()


@pytest.fixture(scope="module")
def port(playground: Playground) -> Iterator[int]:
    with serve(0, playground) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def pixels(picture: str) -> torch.Tensor:
    data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(data))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def ask(port: int, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_it_draws_what_wrap_draws(playground: Playground) -> None:
    drawn = playground.draw(prompt=PROMPT, steps=4, adaptor_steps=[3], seed=1)
    model = load_demo()
    plain = model.sample([PROMPT], steps=4, seed=1)
    with ch.wrap(model.unet, schedule={3}) as cw, cw.trajectory():
        picture = model.sample([PROMPT], steps=4, seed=1)
    for name, image in (("plain", plain), ("clockwork", picture)):
        assert torch.equal(pixels(drawn[name]["picture"]), (image[0] * 255).round().byte().permute(1, 2, 0))
    assert (drawn["plain"]["macs"], drawn["clockwork"]["macs"]) == (cw.stats.macs_plain, cw.stats.macs_run)
    assert drawn["psnr"] == pytest.approx(float(ch.metrics.psnr(picture, plain).mean()))
    assert drawn["passes"] == "FFAF"


def test_with_every_step_full_it_is_the_plain_picture(playground: Playground) -> None:
    drawn = playground.draw(prompt=PROMPT, steps=2, adaptor_steps=[4])
    assert (drawn["psnr"], drawn["saved"], drawn["passes"]) == (None, 0.0, "FF")
    assert drawn["plain"]["picture"] == drawn["clockwork"]["picture"]


def test_a_calibrated_adaptor_is_solved_for_once_and_is_nearer_than_none(playground: Playground) -> None:
    asked = {"prompt": PROMPT, "steps": 4, "adaptor_steps": [3]}
    calibrated = playground.draw(**asked, adaptor="calibrated")
    assert calibrated["note"].startswith("Calibrated on 16 captions in ")
    assert playground.draw(**asked, adaptor="calibrated")["note"] == calibrated["note"]
    assert calibrated["psnr"] > playground.draw(**asked)["psnr"]


def test_the_trained_adaptor_says_what_it_was_trained_for(playground: Playground) -> None:
    assert "trained for 8 steps" in playground.draw(steps=4, adaptor_steps=[2], adaptor="trained")["note"]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 51}, {"steps": True}, {"seed": -1}, {"adaptor": "magic"}, {"adaptor_steps": [1]}]
)
def test_what_it_does_not_take_is_an_error(playground: Playground, wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        playground.draw(**wrong)  # type: ignore[arg-type]
    ch.wrap(playground.model.unet).remove()  # nothing is left on it


def test_the_server_answers_mistakes_in_words(port: int) -> None:
    status, answer = ask(port, "POST", "/draw", json.dumps({"prompt": "a blurple cat"}))
    assert status == 400
    assert "blurple, cat" in json.loads(answer)["error"]
    for body in ("[]", "{", '{"colour": 1}'):
        status, answer = ask(port, "POST", "/draw", body)
        assert (status, list(json.loads(answer))) == (400, ["error"])
    assert ask(port, "POST", "/draw", " " * 20_000)[0] == 400
    assert ask(port, "GET", "/weights")[0] == 404
    assert ask(port, "GET", "/")[1].startswith("<!doctype html>")


def test_pages_of_other_hosts_are_refused(port: int) -> None:
    assert ask(port, "GET", "/", Host="example.org:80")[0] == 403
    assert ask(port, "POST", "/draw", "{}", Host="example.org:80")[0] == 403
    assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200


def test_a_port_that_is_taken_is_an_error_that_says_so(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert issubclass(DemoError, ClockworkError)
    assert main(["play", "--port", str(port), "--no-browser"]) == 2
    assert "--port 0" in capsys.readouterr().err
