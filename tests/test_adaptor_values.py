"""An adaptor is the same values, and the same error, for everything that takes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.adaptors.stand_in import resolve_adaptor
from clockwork_hooks.cli import main
from tests.test_analysis import sampler, tiny

QUIET = Console(quiet=True)
ARGS = (torch.zeros(2, 2, 16, 16), 700.0)
TIMES = (900.0, 700.0, 500.0, 300.0)


def pictures(unet: nn.Module) -> Callable[[Any, int], Tensor]:
    """A sampler of three channels between 0 and 1."""
    generate = sampler(unet, TIMES)
    return lambda count, seed: generate(count, seed)[:, :1].expand(-1, 3, -1, -1).sigmoid()


def wrapped(unet: nn.Module, adaptor: Any) -> str:
    with torch.no_grad(), ch.wrap(unet, adaptor) as cw, cw.trajectory():
        for t in TIMES:
            unet(ARGS[0], t)
        assert cw.stats.adaptor_passes == 2
        return type(cw.adaptor).__name__


def nested(unet: nn.Module, adaptor: Any) -> str:
    with torch.no_grad(), ch.wrap(unet, {1: adaptor}, clocks={1: 2}) as cw:
        for t in TIMES:
            unet(ARGS[0], t)
        return type(cw.adaptor).__name__


def counted(unet: nn.Module, adaptor: Any) -> str:
    macs = ch.flops_report(unet, *ARGS, adaptor=adaptor).adaptor_macs
    return "IdentityAdaptor" if macs == 0 else "ResNetAdaptor"


def drifted(unet: nn.Module, adaptor: Any) -> str:
    report = ch.measure_drift(unet, sampler(unet, TIMES), [2], adaptor=adaptor, clocks=(2,), seeds=(0,), console=QUIET)
    return {"identity": "IdentityAdaptor"}.get(name := next(iter(report.adaptors.values())), name)


def planned(unet: nn.Module, adaptor: Any) -> str:
    options = {"clocks": (2,), "seeds": (0,), "probes": 2, "max_error": 0.99, "console": QUIET}
    report = ch.plan(unet, sampler(unet, TIMES), [2], adaptor=adaptor, **options)
    assert report.adaptor_folder == (str(adaptor) if "ada" in str(adaptor) else None)
    return {"identity": "IdentityAdaptor"}.get(name := report.adaptor_name, name)


def benched(unet: nn.Module, adaptor: Any) -> str:
    report = ch.bench(unet, *ARGS, adaptor=adaptor, clocks=(2,), steps=2, rounds=1, console=QUIET)
    return {"identity": "IdentityAdaptor"}.get(name := report.adaptor, name)


def evaluated(unet: nn.Module, adaptor: Any) -> str:
    variants = {"one": {"clock": 2, "adaptor": adaptor}}
    evaluation = ch.evaluate(unet, pictures(unet), [2], variants, seeds=(0,), console=QUIET)
    assert evaluation["one"].adaptor_passes == 2
    return "ResNetAdaptor" if evaluation["one"].macs_per_image != evaluated_macs(unet) else "IdentityAdaptor"


def evaluated_macs(unet: nn.Module) -> float:
    return ch.evaluate(unet, pictures(unet), [2], {"one": {"clock": 2}}, seeds=(0,), console=QUIET)[
        "one"
    ].macs_per_image


ENTRY_POINTS = (wrapped, nested, counted, drifted, planned, benched, evaluated)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    unet = tiny()
    adaptor = ch.ResNetAdaptor.for_region(ch.find_region(unet, *ARGS), width=8)
    adaptor.save_pretrained(tmp_path / "ada")
    return tmp_path / "ada"


@pytest.mark.parametrize("use", ENTRY_POINTS)
def test_the_same_values_are_adaptors_everywhere(use: Callable[[nn.Module, Any], str], saved: Path) -> None:
    unet = tiny()
    for value in (None, "identity", ch.IdentityAdaptor()):
        assert use(unet, value) == "IdentityAdaptor"
    for value in (saved, str(saved)):
        assert use(unet, value) == "ResNetAdaptor"


@pytest.mark.parametrize("use", ENTRY_POINTS)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, 'an adaptor is None, "identity", the folder'),
        (ch.ResNetAdaptor, 'an adaptor is None, "identity", the folder'),
        (nn.Conv2d(4, 4, 1), r"(?s)an adaptor is called as .*its arguments: "),
        (lambda entry, exit_cached: exit_cached, "an adaptor is called as"),
        ("no-such-folder", "a saved adaptor is a folder"),
        (Path("no-such-folder"), "a saved adaptor is a folder"),
    ],
)
def test_the_same_error_everywhere(use: Callable[[nn.Module, Any], str], value: Any, said: str) -> None:
    with pytest.raises(ch.AdaptorError, match=said):
        use(tiny(), value)


def factory() -> tuple[nn.Module, Callable[[Any, int], Tensor], list[int]]:
    """What the commands load."""
    unet = tiny()
    return unet, sampler(unet, TIMES), [1]


@pytest.mark.parametrize(
    "words",
    [
        ["drift", f"{__name__}:factory", "--clock", "2", "--seed", "0"],
        ["plan", f"{__name__}:factory", "--max-error", "0.9"],
        ["bench", "ddpm-cifar10", "--tiny", "--rounds", "1"],
    ],
    ids=lambda words: words[0],
)
def test_the_same_error_on_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--adaptor", "no-such-folder"]) == 2
    assert "a saved adaptor is a folder" in " ".join(capsys.readouterr().err.split())


def test_a_saved_adaptor_says_which_region(tmp_path: Path) -> None:
    """Where none is chosen, it is the one that the adaptor was made for: in counts and benchmarks as in `wrap`."""
    unet = tiny()
    region = ch.find_region(unet, *ARGS, level=2)
    ch.ResNetAdaptor.for_region(region, width=8).save_pretrained(tmp_path)
    report = ch.flops_report(unet, *ARGS, adaptor=tmp_path)
    assert report.region is not None
    assert report.region.fingerprint == region.fingerprint  # which operator of a scaling comes last is the mode's
    assert report.adaptor_macs > 0
    assert ch.bench(unet, *ARGS, adaptor=tmp_path, clocks=(2,), steps=2, rounds=1, console=QUIET).region == region.line
    with pytest.raises(ch.AdaptorError, match="made for"):
        ch.flops_report(unet, *ARGS, adaptor=tmp_path, level=1)


def test_distill_goes_on_with_a_saved_adaptor(saved: Path) -> None:
    unet = tiny()
    generate = sampler(unet, TIMES)
    options: dict[str, Any] = {"prompts": range(2), "batch": 1, "trajectories": 2, "progress": False}
    for value in (saved, str(saved)):
        result = ch.distill(unet, value, lambda batch: generate(len(batch), 0), **options)
        assert type(result.adaptor) is ch.ResNetAdaptor
    with pytest.raises(ch.AdaptorError, match="a saved adaptor is a folder"):
        ch.distill(unet, Path("no-such-folder"), lambda batch: generate(len(batch), 0), **options)
    for value in (None, "identity", ch.IdentityAdaptor(), "no-such-folder"):
        with pytest.raises(ch.AdaptorError, match=r"(?s)known by its name.*has nothing to train") as e:
            ch.distill(unet, value, lambda batch: generate(len(batch), 0), **options)
        assert "resnet, scaled-resnet, unet" in str(e.value)


def test_a_module_is_itself() -> None:
    def stand_in(entry: Any, exit_cached: Any, **more: Any) -> Any:
        return exit_cached

    adaptor = ch.IdentityAdaptor()
    assert resolve_adaptor(adaptor) is adaptor
    assert resolve_adaptor(stand_in) is stand_in
