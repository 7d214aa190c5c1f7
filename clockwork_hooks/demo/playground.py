"""The playground: a local page that draws one prompt twice, with the plain UNet and on the slow clock that is clicked.

A page and a server of Python's standard library; nothing is fetched, and nothing but this machine may ask.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import warnings
from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clockwork_hooks._numbers import duration
from clockwork_hooks.analysis.timing import measured
from clockwork_hooks.demo.captions import parse
from clockwork_hooks.demo.model import DEMO_PROMPTS, GUIDANCE, LATENT_SHAPE, DemoModel, load_demo, to_picture
from clockwork_hooks.demo.weights import WEIGHTS
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.errors import (
    ArgumentError,
    ClockworkError,
    DemoError,
    NoEffectWarning,
    OtherStepsWarning,
    is_whole,
    need,
)
from clockwork_hooks.metrics import psnr
from clockwork_hooks.regions.find import find_region
from clockwork_hooks.regions.region import Region
from clockwork_hooks.schedule import Schedule

PAGE = Path(__file__).with_name("playground.html")
ADAPTORS = ("identity", "calibrated", "trained")
MOST_STEPS, MOST_BYTES = 50, 10_000
CALIBRATED_ON = 16  # captions


class Playground:
    """Draws prompts with the demo model, plain and with Clockwork; one at a time.

    Args:
        model: the demo model; None loads the one that ships.

    Example:
        >>> playground = Playground()  # doctest: +SKIP
        >>> drawn = playground.draw(
        ...     prompt="a large red circle in the centre on a white background", adaptor_steps=[2, 4], steps=4
        ... )  # doctest: +SKIP
        >>> round(drawn["saved"], 2)  # doctest: +SKIP
        0.4
    """

    def __init__(self, model: DemoModel | None = None) -> None:
        self.model = load_demo() if model is None else model
        self._one_at_a_time = threading.Lock()
        self._calibrated: dict[tuple[int, tuple[int, ...]], Any] = {}
        self._plain: dict[tuple[str, int, int], tuple[Tensor, float]] = {}

    @cached_property
    def region(self) -> Region:
        """What adaptor passes skip."""
        hidden = self.model.encode_prompts(DEMO_PROMPTS[:1])
        sample = torch.zeros(len(hidden), *LATENT_SHAPE, device=self.model.device)
        return find_region(self.model.unet, sample, torch.tensor(1), encoder_hidden_states=hidden)

    def draw(
        self,
        *,
        prompt: str = DEMO_PROMPTS[0],
        steps: int = 8,
        adaptor_steps: Any = (),
        adaptor: str = "identity",
        seed: int = 0,
    ) -> dict[str, Any]:
        """One prompt from the same noise, plain and with the adaptor at some steps.

        Args:
            prompt: a caption of a scene, as the demo model knows them.
            steps: DPM++ denoising steps, 1 to 50.
            adaptor_steps: those that use the adaptor, numbered from 1; the first is always full.
            adaptor: "identity", "calibrated" (solved for now, for these steps) or "trained" (the one that ships).
            seed: of the noise.

        Returns:
            Plain data: `plain` and `clockwork` (`picture`, a PNG as a data URL; `macs`, `seconds`), `saved` (share of
            the MACs), `psnr` in dB (None where the pictures are equal), `passes` ("FAFA…"), `note`.

        Raises:
            ArgumentError: an option is outside its rule.
            UnknownWordError: a word that the model has never seen.
        """
        if not is_whole(steps, 1, MOST_STEPS) or not is_whole(seed, 0, 2**31):
            raise ArgumentError(
                "the playground takes few steps, and a seed",
                seen={"steps": repr(steps), "seed": repr(seed)},
                do=f"pass 1 to {MOST_STEPS} steps and a seed from 0 on",
            )
        parse([prompt])
        if adaptor not in ADAPTORS:
            raise ArgumentError("an adaptor of the playground", seen={"adaptor": adaptor}, do=f"one of {ADAPTORS}")
        schedule = Schedule.at(step for step in adaptor_steps if not isinstance(step, int) or step <= steps)
        with self._one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("ignore", OtherStepsWarning)  # the note says it
            warnings.simplefilter("ignore", NoEffectWarning)  # the picture shows it
            plain, seconds = self._draw_plain(prompt, steps, seed)
            stand_in, note = self._adaptor(adaptor, steps, schedule)
            with wrap(self.model.unet, stand_in, region=self.region, schedule=schedule) as cw, cw.trajectory():
                picture, taken = self._sampled(prompt, steps, seed)
        return {
            "plain": {"picture": _png(plain[0]), "macs": cw.stats.macs_plain, "seconds": seconds},
            "clockwork": {"picture": _png(picture[0]), "macs": cw.stats.macs_run, "seconds": taken},
            "saved": cw.stats.saving,
            "psnr": None if torch.equal(picture, plain) else float(psnr(picture, plain).mean()),
            "passes": "".join("A" if schedule.uses_adaptor(step) else "F" for step in range(1, steps + 1)),
            "note": note,
        }

    def _draw_plain(self, prompt: str, steps: int, seed: int) -> tuple[Tensor, float]:
        key = (prompt, steps, seed)
        if key not in self._plain:
            if not self._plain:
                self.model.sample([prompt], steps=1)  # a first call is slower
            while len(self._plain) >= 64:
                del self._plain[next(iter(self._plain))]
            self._plain[key] = self._sampled(prompt, steps, seed)
        return self._plain[key]

    def _sampled(self, prompt: str, steps: int, seed: int) -> tuple[Tensor, float]:
        return measured(lambda: self.model.sample([prompt], steps=steps, seed=seed), self.model.device)

    def _adaptor(self, name: str, steps: int, schedule: Schedule) -> tuple[Any, str]:
        adapted = tuple(step for step in range(1, steps + 1) if schedule.uses_adaptor(step))
        if name == "identity" or not adapted:
            return None, ""
        if name == "trained":
            from clockwork_hooks.adaptors import LearnedAdaptor

            trained = LearnedAdaptor.from_pretrained(WEIGHTS / "adaptor").float().to(self.model.device)
            facts = trained.facts
            meant = (facts.get("steps"), facts.get("schedule"))
            fits = meant == (steps, str(Schedule.every(2))) and adapted == tuple(range(2, steps + 1, 2))
            return trained, "" if fits else f"It was trained for {meant[0]} steps with the schedule {meant[1]}."
        if (steps, adapted) not in self._calibrated:
            from clockwork_hooks.analysis.calibration import calibrate

            self._calibrated[steps, adapted] = calibrate(
                self.model.unet,
                lambda prompts: self.model.sample(prompts, steps=steps, seed=1),
                [DEMO_PROMPTS[:CALIBRATED_ON]],
                guidance=GUIDANCE,
                schedule=schedule,
                region=self.region,
                log_snr=self.model.scheduler(),
                steps=steps,
            )
        calibrated = self._calibrated[steps, adapted]
        report = calibrated.report
        return calibrated, f"Calibrated on {CALIBRATED_ON} captions in {duration(report.seconds)}: {report.kind}."


def _png(image: Tensor) -> str:
    data = io.BytesIO()
    to_picture(image).save(data, "png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def serve(port: int = 7860, playground: Playground | None = None) -> ThreadingHTTPServer:
    """A server on this machine; `serve_forever()` runs it.

    Args:
        port: 0 for any that is free.
        playground: what draws; None for one of the model that ships.

    Raises:
        DemoError: the port is taken, or a package is missing.
    """
    need(
        "the playground samples with diffusers and draws with Pillow",
        "diffusers",
        "PIL",
        install="clockwork-hooks[demo]",
        error=DemoError,
    )
    draws = Playground() if playground is None else playground
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(draws))
    except OSError as error:
        raise DemoError(
            "the playground listens on a port of this machine",
            seen={"port": port, "error": error},
            do="pass --port 0 for one that is free",
        ) from error
    server.daemon_threads = True
    return server


def _handler(playground: Playground) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """GET / is the page, POST /draw a drawing."""

        def do_GET(self) -> None:
            if not self._local():
                return
            if self.path != "/":
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"the page is /")
                return
            facts = json.dumps({"prompts": DEMO_PROMPTS, "adaptors": ADAPTORS, "most": MOST_STEPS})
            page = PAGE.read_text(encoding="utf-8").replace('"FACTS"', facts.replace("<", "\\u003c"))
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())

        def do_POST(self) -> None:
            if not self._local():
                return
            length = self.headers.get("Content-Length", "")
            if self.path != "/draw" or not length.isdecimal() or int(length) > MOST_BYTES:
                self._answer(HTTPStatus.BAD_REQUEST, "text/plain", b"POST /draw takes a short JSON object")
                return
            try:
                asked = json.loads(self.rfile.read(int(length)))
                if not isinstance(asked, Mapping):
                    raise ArgumentError("a drawing is asked for by a JSON object", seen={"got": type(asked).__name__})
                answer, status = playground.draw(**asked), HTTPStatus.OK
            except (ClockworkError, json.JSONDecodeError, TypeError) as error:
                answer, status = {"error": str(error)}, HTTPStatus.BAD_REQUEST
            self._answer(status, "application/json", json.dumps(answer).encode())

        def _local(self) -> bool:
            """A page from elsewhere that names this machine by another host is refused."""
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host in ("127.0.0.1", "localhost"):
                return True
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"only for this machine: http://127.0.0.1")
            return False

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
