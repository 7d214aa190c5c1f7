"""One running pass: which module calls it skips, what it picks up at the boundary, what stands for the exit.

One vector from the tokens of a text: the mean over those that are no padding.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch

from clockwork_hooks._tree import leaves, map_leaves, version
from clockwork_hooks.regions.cut import CutPlan, Kind, Move, Slot, Wanted

__all__ = ["Active", "Emit", "Owner", "Pass", "TracedPass", "masked_mean", "placeholder"]


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the unmasked tokens of each row; zero where all are masked. Does not wait for the device.

    Args:
        tokens: (B, L, D).
        mask: (B, L), or (b, L) where each row serves B/b rows of tokens. True or above zero where a token counts; or
            what is added to attention scores, 0 where a token counts and far below where it does not. Of numbers that
            are all zero, every token counts.

    Returns:
        (B, D).

    Example:
        >>> masked_mean(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[3.]])
    """
    if mask.dtype != torch.bool:
        mask = torch.where(mask.max() > 0, mask > 0, mask > -1)
    if mask.shape[0] != tokens.shape[0]:
        mask = mask.repeat_interleave(tokens.shape[0] // mask.shape[0], 0)
    keep = mask.to(tokens)[:, :, None]
    return (tokens * keep).sum(1) / keep.sum(1).clamp(min=1)


Emit = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class Pass:
    """One running call of the UNet.

    Args:
        plan: what is skipped and captured.
        kind: "full" or "adaptor".
        emit: makes the exit of an adaptor pass from the captured boundary tensors.
        copies: code that the trace does not know writes to the exit: what is kept has memory of its own.
        looks: boundary tensors are picked up.
        blanks: what skipped calls return, where it is the same in every pass; passes of one plan share it.

    Attributes:
        plan, kind, copies, looks: as given.
        rests: nothing but the exit's module asks what to do, as in a full pass that looks at nothing.
        captured: boundary tensors by name, once they have been seen; where a mask comes with the text's tokens, their
            mean in place of both.
        exit: what the region emitted: its true exit, or the adaptor's output; as it was, whatever the UNet's own
            code writes to it afterwards.
        written: its counter of in-place writes then.
    """

    def __init__(
        self,
        plan: CutPlan,
        kind: Kind,
        emit: Emit | None = None,
        *,
        copies: bool = False,
        looks: bool = True,
        blanks: dict[tuple[str, int], Any] | None = None,
    ) -> None:
        self.plan = plan
        self.kind: Kind = kind
        self.copies, self.looks = copies, looks
        self.captured: dict[str, torch.Tensor] = {}
        self.exit: torch.Tensor | None = None
        self._undecided = False
        self._emit = emit
        self._blanks = {} if blanks is None else blanks
        self.written = -1
        self.rests = False
        self._moves = plan.made.get((kind, looks)) or plan.moves(kind, looks=looks)
        self._counts: dict[str, int] = {}
        self._hooked: dict[tuple[str, str], int] = {}

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The pass begins: pick up what is taken from the UNet's own arguments."""
        move = self._moves.calls.get(("", 0))
        if move is not None and move.takes:
            self._pick(move.takes, (args, kwargs))

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A patched module is called: skip or run it."""
        k = self._counts.get(path, 0)
        self._counts[path] = k + 1
        move = self._moves.calls.get((path, k))
        if move is None:
            return forward(*args, **kwargs)
        if move.takes:
            self._pick(move.takes, (args, kwargs))
        if move.skipped is not None:
            if self._undecided:
                self._decide()
            if self.kind == "adaptor":
                made = self._blanks.get((path, k))
                return self._blank(path, k, move) if made is None else made
        output = forward(*args, **kwargs)
        if move.gives:
            self._pick(move.gives, output)
        if move.exit >= 0:
            exit = output if isinstance(output, torch.Tensor) else _leaf(output, move.exit)
            if isinstance(exit, torch.Tensor):
                self._keep(exit.clone() if move.written or self.copies else exit)
        return output

    def _decide(self) -> None:
        """The first call of the region has come, and this pass is yet to say what kind it is."""

    def observe(self, path: str, side: Literal["input", "output"], value: Any) -> None:
        """A native hook saw a module's input or output."""
        k = self._hooked.get((path, side), 0)
        self._hooked[path, side] = k + 1
        move = self._moves.calls.get((path, k))
        if move is not None:
            self._pick(move.takes if side == "input" else move.gives, value)

    def complete(self) -> bool:
        """Did every patched module get exactly the calls of the trace, and the exit its tensor?"""
        if self.exit is None:
            return False
        if self.rests:  # the others' calls would not change what the exit is
            for path, count in self._moves.exits.items():  # noqa: SIM110 - one, nearly always
                if self._counts.get(path) != count:
                    return False
            return True
        if self._counts == self._moves.counts:
            return True
        return {path: count for path, count in self._counts.items() if path in self.plan.counts} == self._moves.counts

    def untouched(self) -> bool:
        """Is the exit still as it was emitted? What the trace does not know may write to it: a user's hook, FreeU."""
        return self.exit is not None and version(self.exit) == self.written

    def _pick(self, wanted: Wanted, value: Any) -> None:
        found = [leaf for _, leaf in leaves(value)]
        for name, leaf in wanted:
            self.captured[name] = found[leaf]
        if "mask" in self.captured and "text" in self.captured:
            self.captured["text"] = masked_mean(self.captured["text"], self.captured.pop("mask"))

    def _blank(self, path: str, k: int, move: Move) -> Any:
        """What a skipped call returns."""
        assert move.skipped is not None  # the caller has looked
        made = map_leaves(self._fill, move.skipped.output)
        if move.exit < 0 and _constant(move.skipped.output):
            self._blanks[path, k] = made
        return made

    def _fill(self, leaf: Any) -> Any:
        if not isinstance(leaf, Slot):
            return leaf
        if leaf.exit and self._emit is not None:
            made = self._emit(self.captured)
            self._keep(made)
            return made.clone() if leaf.written or self.copies else made
        return placeholder(leaf)

    def _keep(self, exit: torch.Tensor) -> None:
        self.exit, self.written = exit, version(exit)


class TracedPass(Pass):
    """A pass that torch.compile traces: what it decides is decided once, and it keeps a copy of the exit.

    A copy, because a graph that writes to the exit later on would return it written to.
    """

    def _blank(self, path: str, k: int, move: Move) -> Any:
        assert move.skipped is not None  # the caller has looked
        return map_leaves(self._fill, move.skipped.output)

    def _fill(self, leaf: Any) -> Any:
        if isinstance(leaf, Slot) and not (leaf.exit and self._emit is not None):
            own = leaf.shape if leaf.written else ()  # not every backend turns writes into copies
            return torch.zeros(own, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)  # compiled away
        return super()._fill(leaf)

    def _keep(self, exit: torch.Tensor) -> None:
        self.exit = exit.clone() if self.kind == "full" else exit


def _leaf(value: Any, index: int) -> Any:
    found = [leaf for _, leaf in leaves(value)]
    return found[index] if index < len(found) else None


# -- what stands in the place of a skipped output -----------------------------------------------------------------


def placeholder(slot: Slot) -> torch.Tensor:
    """A tensor of the slot's shape that nobody may look into; it has no memory of its own where that is safe."""
    if slot.written:
        return torch.zeros(slot.shape, dtype=slot.dtype, device=slot.device)
    return _zero(slot.dtype, slot.device).expand(slot.shape)


@functools.lru_cache(maxsize=64)
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


def _constant(output: Any) -> bool:
    """May one such output serve all passes? Nobody can change a tuple, nor write to an expanded zero."""
    if isinstance(output, Slot):
        return not output.written
    return output is None or (type(output) is tuple and all(map(_constant, output)))


# -- which pass runs in this thread? ------------------------------------------------------------------------------


class Active(threading.local):
    """The pass that a wrapper is running, in each thread its own."""

    run: Pass | None = None


class Owner(Protocol):
    """What patched modules ask: an engine.

    Attributes:
        active: the pass that it runs in this thread.
        tracing: the pass that torch.compile is tracing for it; outside of tracing there is none.
        resting: the one pass that it runs in all threads rests, see `Pass.rests`.
    """

    active: Active
    tracing: Pass | None
    resting: bool
