"""Public functions with arguments of the wrong kind: each is taken, or answered by an error of ours; nothing is left.

Python's own errors (`'float' object is not iterable`) name neither the argument nor the rule.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import clockwork_hooks as ch
from tests.small_unet import Tiny
from tests.snapshot import snapshot

JUNK: tuple[Any, ...] = (
    *(None, math.nan, math.inf, -1, 0, True, 1.5, "x", "", b"x"),
    *([], {}, [math.nan], ["a"], (True,), object(), torch.tensor(2)),
)
CALL = (torch.zeros(1, 2, 8, 8), torch.tensor(5.0))
# whose values are the sampler's, or torch's, to understand; functions are called as they are
KEYWORD, POSITIONAL = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
THEIRS = {"unet", "pipe", "console", "generate", "conditions", "held_out", "adaptor"}


def sampler(unet: Tiny) -> Callable[[Any, int], Tensor]:
    def generate(batch: Any, seed: int) -> Tensor:
        x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for t in torch.linspace(900, 100, 4):
                x = x - 0.1 * unet(x, t)
        return x

    return generate


def of_a_call(unet: Tiny, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return CALL, options


def of_a_loop(unet: Tiny, *more: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (sampler(unet), [[1, 2]], *more), options


Made = Callable[[Tiny], tuple[tuple[Any, ...], dict[str, Any]]]
FUNCTIONS: Mapping[str, Made] = {
    "wrap": lambda unet: ((), {}),
    "find_region": of_a_call,
    "diagram": of_a_call,
    "flops_report": of_a_call,
    "bench": lambda unet: of_a_call(unet, clocks=(2,), steps=2, rounds=1),
    "measure_drift": lambda unet: of_a_loop(unet, clocks=(2,)),
    "measure_robustness": of_a_loop,
    "evaluate": lambda unet: of_a_loop(unet, {"clock 2": {"clock": 2}}, seeds=(0,)),
    "calibrate": of_a_loop,
    "plan": lambda unet: of_a_loop(unet, min_saving=0.2, clocks=(2,), probes=2),
    "tune": lambda unet: (([[1, 2]],), {"generate": sampler(unet)}),
    "distill": lambda unet: (
        ("resnet", sampler(unet)),
        {"prompts": [1, 2], "batch": 2, "trajectories": 1, "progress": False},
    ),
}


def names_of(function: str) -> list[str]:
    own = inspect.signature(getattr(ch, function)).parameters.values()
    options = ["batch", "trajectories", "minutes", "lr", "hold", "buffer"] if function == "distill" else []
    return [one.name for one in own if one.kind in (KEYWORD, POSITIONAL) and one.name not in THEIRS] + options


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_argument_is_answered_by_an_error_of_python_s_own(
    function: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, refused = getattr(ch, function), 0
    names = names_of(function)
    own = list(inspect.signature(call).parameters.values())[1:]
    positional = [one.name for one in own if one.kind is POSITIONAL]
    for name in names:
        for value in JUNK:
            unet = Tiny()
            before = snapshot(unet)
            args, options = FUNCTIONS[function](unet)
            if name in positional[: len(args)]:
                args = tuple(value if k == positional.index(name) else one for k, one in enumerate(args))
            else:
                options = {**options, name: value}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    made = call(unet, *args, **options)
                except ch.ClockworkError:
                    refused += 1
                else:
                    if isinstance(made, ch.ClockworkWrapper):
                        made.remove()
            assert snapshot(unet) == before, (name, value)
    assert refused > len(names)
