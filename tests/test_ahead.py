"""What an adaptor computes without the entry runs beside the UNet's first layers in a capture, and is waited for."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clockwork_hooks.adaptors import ahead
from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor
from clockwork_hooks.regions.region import Layout


class _Stream:
    """Remembers which stream it waits for; launches are remembered by `Launches`."""

    log: list[tuple[Any, ...]]
    device = torch.device("cpu")

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append(("wait", self, other))


class Launches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _Stream.log.append(("launch", torch.cuda.current_stream(), str(func)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> _Stream:
    stack, log = [_Stream()], list[tuple[Any, ...]]()

    @contextlib.contextmanager
    def on(stream: _Stream) -> Iterator[None]:
        stack.append(stream)
        yield
        stack.pop()

    monkeypatch.setattr(_Stream, "log", log, raising=False)
    for name, value in (("Stream", _Stream), ("current_stream", lambda *_: stack[-1]), ("stream", on)):
        monkeypatch.setattr(torch.cuda, name, value)
    return stack[0]


def run(adaptor: Any, cached: Tensor) -> Tensor:
    entry = cached.flip(2) if adaptor.entry is not None else None
    with Launches():
        adapted: Tensor = adaptor(entry, cached, position=torch.tensor(400.0), position_cached=torch.tensor(500.0))
    return adapted


@pytest.mark.parametrize("reads", [("exit",), ("exit", "entry")])
def test_what_waits_for_no_entry_comes_from_another_stream_and_is_waited_for(
    main: _Stream, reads: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    layout, cached = Layout(4, (8, 8)), torch.randn(1, 4, 8, 8)
    adaptor = CalibratedAdaptor(
        form="linear", knots=1, points=0, exit=layout, entry=layout if "entry" in reads else None
    ).eval()
    torch.nn.init.normal_(adaptor.table.data[:, 9:])  # what comes after the bounds and the stride
    expected = run(adaptor, cached)
    assert all(stream is main for what, stream, *_ in _Stream.log if what == "launch")
    _Stream.log.clear()
    with ahead.beside(torch.device("cpu")):
        begin = len(_Stream.log)
        assert torch.equal(run(adaptor, cached), expected)
    log = _Stream.log
    [fork] = [entry for entry in log[:begin] if entry[0] == "wait"]
    branch = fork[1]
    assert fork[2] is main
    assert branch is not main
    launches = [(k, entry[1]) for k, entry in enumerate(log) if entry[0] == "launch"]
    aside = [k for k, stream in launches if stream is branch]
    after = [k for k, stream in launches if stream is main and k > aside[0]]
    joined = log.index(("wait", main, branch))
    assert aside[-1] < joined
    products = [log[k][2] for k in after if "mm" in log[k][2]]
    assert len(products) == reads.count("entry"), products
    assert not torch.equal(expected, cached)
    assert bool(after) == ("entry" in reads)
    assert all(joined < k for k in after)
    assert log[-1] == ("wait", main, branch)


def test_results_live_as_long_as_the_capture(main: _Stream) -> None:
    """What was computed ahead lies in the other stream's memory, which that one may give away."""
    with ahead.beside(torch.device("cpu")):
        result = weakref.ref(ahead.ahead(torch.ones, 3))
        assert result() is not None
    assert result() is None
    assert torch.equal(ahead.ahead(torch.ones, 3), torch.ones(3))
