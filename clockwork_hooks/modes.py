"""What `cw.compile()` may be asked for, and what then runs the calls: compiled or captured passes."""

from __future__ import annotations

from typing import Any

import torch

from clockwork_hooks.capture import Captured
from clockwork_hooks.compiled import Compiled
from clockwork_hooks.engine import Engine
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.nested import NestedEngine

__all__ = ["MODES", "static_calls"]

MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "cudagraphs")
POOLED = ("reduce-overhead", "max-autotune")


def static_calls(engine: Engine, mode: str | None, backend: Any, options: dict[str, Any] | None) -> Compiled:
    """What runs the calls of this engine in the place of the root's forward.

    Args:
        engine: decides what runs.
        mode: one of `MODES`.
        backend, options: of `torch.compile`.

    Raises:
        ArgumentError: what `ClockworkWrapper.compile` says.
    """
    if isinstance(engine, NestedEngine):
        raise ArgumentError(
            "a compiled UNet has one region", seen={"regions": len(engine.clocks)}, do="wrap it with one clock"
        )
    engine.schedule.known_beforehand("the pass that a static graph stands for")
    if mode not in MODES:
        raise ArgumentError(
            "a mode is one of " + ", ".join(map(repr, MODES)), seen={"mode": repr(mode)}, do="pass one of these"
        )
    if mode == "cudagraphs":
        if backend != "inductor" or options is not None:
            raise ArgumentError(
                'mode="cudagraphs" compiles nothing: backend and options are of the other modes',
                seen={"backend": repr(backend), "options": repr(options)},
                do='pass mode="cudagraphs" alone',
            )
        return Captured(engine)
    chosen = {"mode": mode, "backend": backend, "options": options}
    _try(chosen)
    return Compiled(engine, chosen, pooled=mode in POOLED or bool((options or {}).get("triton.cudagraphs")))


def _try(chosen: dict[str, Any]) -> None:
    """Let `torch.compile` look at its options now: at a call it would end a trajectory."""
    try:
        torch.compile(lambda: None, fullgraph=True, **chosen)
    except Exception as error:
        raise ArgumentError(
            "mode, backend and options are those of torch.compile",
            seen={**{name: repr(value) for name, value in chosen.items()}, "error": str(error)[:200]},
            do="pass what torch.compile(model, ...) takes: a mode or options, and a backend that it lists",
        ) from error
