"""What sampling with Clockwork must give, by a plain hook on a plain UNet that is told every pass by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn


def every(clock: int, evaluations: Sequence[int], *, branches: int = 1) -> list[tuple[str, int]]:
    """The passes of a trajectory: (F or A, slot of its feature) for each call of the UNet.

    Args:
        clock: one full denoising step in so many.
        evaluations: of each denoising step: how many times the solver evaluates the UNet in it.
        branches: calls of the UNet in an evaluation.

    A feature serves the same evaluation and branch of the next step; the first step that has such an evaluation is
    full for it.
    """
    passes, before = [], set()
    for step, count in enumerate(evaluations):
        slots = [evaluation * branches + branch for evaluation in range(count) for branch in range(branches)]
        passes += [("F" if step % clock == 0 or slot not in before else "A", slot) for slot in slots]
        before = set(slots)
    return passes


def letters(passes: Iterable[tuple[str, int]]) -> str:
    return "".join(kind for kind, _ in passes)


def replay(
    unet: nn.Module,
    path: str,
    passes: Sequence[tuple[str, int]],
    run: Callable[[], Any],
    *,
    frozen: Sequence[str] = (),
) -> Any:
    """Run a loop with what the module at `path` returns replaced, in A passes, by what it returned before.

    The modules at `frozen` are not run in A passes: what they return does not matter, but they may notice.
    """
    features: dict[int, Tensor] = {}
    left = iter(passes)
    now: list[tuple[str, int]] = []

    def begin(*_: Any) -> None:
        now[:] = [next(left)]

    def exit(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kind, slot = now[0]
        if kind == "F":
            features[slot] = output.clone()
        return features[slot].clone()

    def freeze(module: nn.Module) -> Callable[[], None]:
        forward, last = module.forward, [None]

        def frozen(*args: Any, **kwargs: Any) -> Any:
            if now[0][0] == "F":
                last[0] = forward(*args, **kwargs)
            return last[0]

        module.forward = frozen
        return lambda: delattr(module, "forward")

    thaw = [freeze(unet.get_submodule(name)) for name in frozen]
    handles = [unet.register_forward_pre_hook(begin), unet.get_submodule(path).register_forward_hook(exit)]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
        for undo in thaw:
            undo()
    assert next(left, None) is None, "the loop made fewer calls than it was said to"
    return result
