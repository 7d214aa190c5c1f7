"""A region in a file: where UNet and call are those of the file, nothing is analysed, and every pass is right."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.engine import passes
from clockwork_hooks.engine.engine import Engine
from clockwork_hooks.regions.fingerprint import structure
from clockwork_hooks.regions.region import seal
from tests.oracle import Judge
from tests.schemas import follows_its_schema
from tests.small_unet import Tiny

TIMES = torch.linspace(900, 100, 9)
Change = Callable[[nn.Module], Any]


class Nested(Tiny):
    """The region's calls return tuples, lists and mappings; the exit lies in one of them, and code writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = Wrapped(self.body)
        self.scales, self.ready = [1.0, 0.5], False

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x) + self.emb(torch.as_tensor(t).reshape(-1, 1) / 100).sin()[:, :, None, None]
        z, *_ = self.wrapped(self.act(self.down(h)))["maps"]
        z = self.up(z)
        z[:, :4] *= self.scales[1]
        return self.head(torch.cat([h, z], 1))


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"maps": (self.body(x), [x.mean(), None]), "name": "maps"}


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is analysed: the names of the UNets whose calls were recorded."""
    seen: list[str] = []
    for name in ("_record", "_learn"):
        own = getattr(Engine, name)

        @functools.wraps(own)
        def noted(engine: Engine, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            seen.append(type(engine.unet).__name__)
            return own(engine, *args, **kwargs)

        monkeypatch.setattr(Engine, name, noted)
    return seen


def judged(judge: Judge, *, batch: int = 1, passes: str = "FAFAFAFA", steps: int = 8) -> None:
    random = torch.Generator().manual_seed(0)
    judge.begin()
    for step, t in enumerate(TIMES.clone()[:steps]):
        judge.call(torch.randn(batch, 2, 8, 8, generator=random), t, torch.ones(batch, 3), step=step)
    assert judge.letters == passes
    judge.letters = ""


@torch.no_grad()
def saved(make: Callable[[], nn.Module], folder: Path, **options: Any) -> Path:
    with ch.wrap(make(), **options) as cw:
        cw(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))
        assert cw.region is not None
        return cw.region.save(folder / "region.json")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    ("make", "options"),
    [(Tiny, {}), (Nested, {}), (Tiny, {"modules": ["body"]}), (Tiny, {"entry": "down", "exit": "up"})],
    ids=["tiny", "nested", "modules", "ends"],
)
def test_nothing_is_analysed(
    make: Any, options: Any, mode: Any, tmp_path: Path, records: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What skipped calls return is NaN here: the UNet's output comes from none of it."""
    path = saved(make, tmp_path, **options)
    records.clear()
    nan = {dtype: torch.full((), float("nan"), dtype=dtype) for dtype in (torch.float32, torch.float64)}
    monkeypatch.setattr(passes, "_zero", lambda dtype, device: nan[dtype])
    exit = "body" if "modules" in options else "up"
    judge = Judge(make(), path=exit)
    with mode(), ch.wrap(judge.unet, region=path) as cw:
        judged(judge)
        judged(judge)
        assert not records
        assert cw.stats.reasons == {"first step": 2, "scheduled": 6}
        judged(judge, batch=2)
        assert records  # another signature
        assert cw.region is not None
        fields = (
            "skipped",
            "entry",
            "exit",
            "entries",
            "sides",
            "inputs",
            "line",
            "fingerprint",
            "by_level",
            "residuals",
        )
        first = ch.wrap(make(), **options)
        first(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))
        assert [getattr(cw.region, name) for name in fields] == [getattr(first.region, name) for name in fields]
        assert cw.region.cut_plan == first.region.cut_plan  # type: ignore[union-attr]
        assert [call.output for call in cw.region.skipped] == [call.output for call in first.region.skipped]  # type: ignore[union-attr]


def test_in_another_process(tmp_path: Path) -> None:
    """Sets have another order there, and objects other addresses."""
    code = (
        "import sys, torch, clockwork_hooks as ch\n"
        "from tests.test_saved_regions import Nested, TIMES\n"
        "with torch.no_grad(), ch.wrap(Nested()) as cw:\n"
        "    cw(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))\n"
        "    cw.region.save(sys.argv[1])\n"
    )
    seals, root = [], str(Path(__file__).parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    for number in ("7", "11"):
        path = tmp_path / f"{number}.json"
        environment = {**os.environ, "PYTHONHASHSEED": number, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
        seals.append(json.loads(path.read_text())["passes"]["seal"])
    assert seals[0] == seals[1]


def _forward(self: Tiny, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
    return Tiny.forward(self, x * 2, t, c)


class Sub(nn.SiLU):
    pass


def _processor(unet: Any, scale: float) -> None:
    unet.stem.processor = type("Processor", (), {"__init__": lambda self: setattr(self, "scale", scale)})()


CHANGES: dict[str, Change] = {
    "width": lambda unet: setattr(unet, "emb", nn.Linear(1, 8, bias=False)),
    "padding, dilation": lambda unet: setattr(unet, "body", nn.Conv2d(16, 16, 3, padding=2, dilation=2)),
    "dtype": lambda unet: unet.register_buffer("scale", torch.ones(1, dtype=torch.float64)),
    "class": lambda unet: setattr(unet, "act", Sub()),
    "module more": lambda unet: setattr(unet, "more", nn.Identity()),
    "number": lambda unet: setattr(unet, "number", 2),
    "number in an object": lambda unet: _processor(unet, 1.0),
    "forward of the instance": lambda unet: setattr(unet, "forward", _forward.__get__(unet)),
    "hook": lambda unet: unet.stem.register_forward_hook(lambda module, inputs, output: None),
    "hook before": lambda unet: unet.stem.register_forward_pre_hook(lambda module, inputs: None),
    "training": lambda unet: unet.act.train(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_structure_is_analysed(change: Change, tmp_path: Path, records: list[str]) -> None:
    path = saved(Tiny, tmp_path)
    records.clear()
    unet = Tiny()
    change(unet)
    assert structure(unet) != structure(Tiny())
    with ch.wrap(unet, region=path) as cw:
        cw(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))
        assert records


def test_values_of_another_type_or_sign_are_others() -> None:
    values = [
        1,
        1.0,
        True,
        "1",
        "1.0",
        None,
        "None",
        0.0,
        -0.0,
        float("nan"),
        1j,
        b"1",
        (1,),
        [1],
        {1},
        {1: 1},
        range(1),
    ]
    digests = []
    for value in values:
        unet = Tiny()
        unet.scale = value
        digests.append(structure(unet))
        assert structure(unet) == digests[-1]
    assert len(set(digests)) == len(values)


def test_objects_that_differ_in_a_number_and_code_that_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Tiny(), Tiny()
    _processor(one, 1.0)
    _processor(other, 2.0)
    assert structure(one) != structure(other)
    before = structure(Tiny())
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: x)
        assert structure(Tiny()) != before
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert structure(Tiny()) != before
    with ch.wrap(Tiny()) as cw:  # what is ours is not part of it
        cw(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))
        assert structure(cw.unet) == before
    assert structure(Tiny()) == before


# -- files that do not say what is so ---------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[Any], None], *, unet: nn.Module | None = None) -> Path:
    """The file with something changed in it; with a UNet, sealed for that one."""
    data = json.loads(path.read_text())
    change(data)
    if unet is not None:
        data["passes"]["seal"] = seal(structure(unet), data)
    path.write_text(json.dumps(data))
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(passes=None),
        lambda data: data.pop("passes"),
        lambda data: data["passes"]["skipped"].pop(),
        lambda data: data["passes"]["counts"].update(down=[1, 2]),
        lambda data: data["passes"].update(uncounted=["aten::mm"]),
        lambda data: data.update(macs=1),
    ],
)
def test_a_file_whose_seal_is_broken_is_a_region_to_look_for(
    change: Callable[[Any], None], tmp_path: Path, records: list[str]
) -> None:
    path = rewritten(saved(Tiny, tmp_path), change)
    records.clear()
    judge = Judge(Tiny())
    with ch.wrap(judge.unet, region=path):
        judged(judge)
    assert records


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "region.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ch.ArgumentError, match="error: UnicodeDecodeError"):
        ch.wrap(Tiny(), region=path)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "region.json"
    path.write_text("{")
    with pytest.raises(ch.ArgumentError, match=r"file: .*region\.json\n  error: JSONDecodeError"):
        ch.wrap(Tiny(), region=path)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["passes"]["counts"].update(down=[2, 1]),
        lambda data: data["passes"]["counts"].update(head=[2, 2]),
        lambda data: data["passes"]["skipped"][0]["output"]["tensor"].__setitem__(0, [1, 16, 4, 5]),
        lambda data: data["passes"]["skipped"][1]["output"]["tensor"].__setitem__(1, "torch.float16"),
        lambda data: data["passes"]["skipped"][1].update(output={"tuple": [data["passes"]["skipped"][1]["output"]]}),
        lambda data: data["passes"]["skipped"][1].update(output=None),
        lambda data: data["passes"]["skipped"][-1].update(ordinal=1),
        lambda data: data["passes"]["ports"]["time"].update(path="down", leaf=7),
        pytest.param(lambda data: data["passes"]["counts"].update(down=[2, 1]), id="compiled"),
    ],
)
def test_what_the_calls_do_is_what_counts(
    change: Callable[[Any], None], tmp_path: Path, records: list[str], request: pytest.FixtureRequest
) -> None:
    """The seal is right, and the plan is not, as of code that no digest sees: one full pass, then all as ever."""
    path = rewritten(saved(Tiny, tmp_path), change, unet=Tiny())
    records.clear()
    judge = Judge(Tiny())
    with ch.wrap(judge.unet, region=path) as cw:
        if request.node.callspec.id == "compiled":
            cw.compile(backend="eager")
        judged(judge, passes="FFFAFAFA")
        assert len(records) == 2  # recorded, and learned
        assert cw.stats.reasons["first step"] == 1
        judged(judge)


@torch.no_grad()
def test_compiled_and_prepared_and_kept(tmp_path: Path, records: list[str]) -> None:
    path = saved(Tiny, tmp_path)
    records.clear()
    judge = Judge(Tiny())
    with ch.wrap(judge.unet, region=path) as cw:
        cw.prepare(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))
        assert cw.region is not None
        cw.compile(backend="eager")
        judged(judge)
    assert not records
    judge = Judge(Tiny())
    with ch.wrap(judge.unet, region=path, keep=["body"]) as cw:
        judged(judge)
        assert cw.region is not None
        less = cw.region.save(tmp_path / "less.json")
    assert records
    for file in (path, less):
        follows_its_schema(json.loads(file.read_text()))
    assert json.loads(less.read_text())["passes"] is None


@torch.no_grad()
def test_who_looks_at_skipped_modules_is_named(tmp_path: Path) -> None:
    unet = Tiny()
    unet.body.register_forward_hook(lambda module, inputs, output: None)
    with ch.wrap(unet) as cw:
        with pytest.warns(ch.SkippedModuleWarning):
            cw(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))
        assert cw.region is not None
        path = cw.region.save(tmp_path / "region.json")
    with ch.wrap(unet, region=path) as cw, pytest.warns(ch.SkippedModuleWarning):
        cw(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))


class Switched(Tiny):
    """A switch that is no part of the UNet lets what is inside of the region go round its exit."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x)
        low = self.body(self.act(self.down(h)))
        output: Tensor = self.head(torch.cat([h, self.up(low)], 1))
        return output + low.mean() if SWITCHES["around"] else output


SWITCHES = {"around": False}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_code_that_no_seal_covers_is_seen_by_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[str]
) -> None:
    """The first adaptor pass is run again in full, and the next call is analysed."""
    path = saved(Switched, tmp_path)
    records.clear()
    monkeypatch.setitem(SWITCHES, "around", True)
    plain, x, c = Switched(), torch.ones(1, 2, 8, 8), torch.ones(1, 3)
    with ch.wrap(Switched(), region=path) as cw, cw.trajectory():
        for t in TIMES.clone()[:4]:
            assert torch.equal(cw(x, t, c), plain(x, t, c))
        assert records
        assert cw.stats.reasons["code outside the skipped modules uses what they compute"] == 1


@torch.no_grad()
def test_a_seal_holds_after_something_was_compiled() -> None:
    """torch._dynamo patches nn.Module."""
    before, compiled = structure(Tiny()), torch.compile(Tiny(), backend="eager")
    compiled(torch.zeros(1, 2, 8, 8), TIMES[0].clone(), torch.ones(1, 3))
    assert "___needs_generation_tag_patch" in vars(nn.Module)
    assert structure(Tiny()) == before
