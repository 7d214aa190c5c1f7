"""What stands in for a region: its signature, the identity, and what users may pass as one, the same everywhere."""

from __future__ import annotations

import inspect
import os
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from clockwork_hooks import adaptors
from clockwork_hooks.errors import AdaptorError

__all__ = ["Adaptor", "AdaptorInputs", "AdaptorLike", "IdentityAdaptor", "is_identity", "needs_of", "resolve_adaptor"]


@runtime_checkable
class Adaptor(Protocol):
    """Predicts a region's exit from its entry and from what the region emitted one step before.

    Any module (or function) with this signature will do. The paper's φ_θ(r_in(t), r_out(t+1), t_emb, text_emb).
    One that takes more says so by an attribute `needs`: names of `AdaptorInputs` beyond the four, which are then
    passed by keyword, as in `needs = frozenset({"entry_cached"})`.

    Example:
        >>> class Blend(torch.nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.mix = torch.nn.Conv2d(2 * channels, channels, 1)
        ...
        ...     def forward(self, entry, exit_cached, *, time, text):
        ...         return self.mix(torch.cat([entry, exit_cached], 1))

    Source: arXiv 2312.08128, Sec. 4.2.
    """

    def __call__(
        self,
        entry: torch.Tensor | None,
        exit_cached: torch.Tensor,
        *,
        time: torch.Tensor | None,
        text: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the exit.

        Args:
            entry: what flows into the region now (r_in), as in `Region.entry.shape`; None where it cannot be picked
                up (`Region.inputs` lists what can).
            exit_cached: what the region emitted one step before (r_out), as in `Region.exit.shape`.
            time: the side input that comes from the time, usually its embedding, (B, D); None where there is none.
            text: the embedding of another condition, usually the text's: a pooled vector (B, D) where there is one, or
                the mean of the unmasked tokens where a mask comes with them; else the tokens, (B, L, D); or None.

        Returns:
            The exit, with `exit_cached`'s shape, dtype and device.
        """
        ...


class AdaptorInputs(NamedTuple):
    """All that an adaptor can be given in one call.

    Attributes:
        entry, exit_cached, time, text: as `Adaptor` takes them.
        entry_cached: what flowed into the region one step before, when it emitted `exit_cached`; shaped as `entry`.
            Where nothing of it was kept, the pass is full.
        position: the UNet's time input of this call, as it was passed, float32 of shape (): which step it is.
        position_cached: likewise of the call that `exit_cached` comes from: how far the two are apart. None where that
            call was recorded as it ran.
        trend: what the region emitted in the last full pass less what it emitted in the full pass before that one;
            shaped as `exit_cached`, and without gradients. None in a trajectory that had one full pass so far; where it
            is missing for another reason, the pass is full.
        trend_positions: the UNet's time input of these two full passes, the last one's first, float32 of shape (2,).

    Example:
        >>> inputs = AdaptorInputs(None, torch.zeros(1, 4, 8, 8), None, None, None, torch.tensor(981.0))
        >>> inputs.position
        tensor(981.)
    """

    entry: torch.Tensor | None
    exit_cached: torch.Tensor
    time: torch.Tensor | None
    text: torch.Tensor | None
    entry_cached: torch.Tensor | None = None
    position: torch.Tensor | None = None
    position_cached: torch.Tensor | None = None
    trend: torch.Tensor | None = None
    trend_positions: torch.Tensor | None = None


def needs_of(adaptor: Any) -> frozenset[str]:
    """What an adaptor takes beyond the four inputs of `Adaptor`: names of `AdaptorInputs`.

    Example:
        >>> needs_of(IdentityAdaptor())
        frozenset()
    """
    return frozenset(getattr(adaptor, "needs", ()))


class IdentityAdaptor(nn.Module):
    """Returns what the region emitted one step before: no parameters, no MACs.

    Example:
        >>> cached = torch.ones(1, 4, 8, 8)
        >>> IdentityAdaptor()(None, cached, time=None, text=None) is cached
        True

    Source: arXiv 2312.08128, Sec. 4.2 ("identity adaptor") and Tab. 3.
    """

    needs: frozenset[str] = frozenset()  # a module asked for an attribute that it lacks takes 3 µs to say so

    def forward(
        self,
        entry: torch.Tensor | None,
        exit_cached: torch.Tensor,
        *,
        time: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `exit_cached` itself."""
        return exit_cached


AdaptorLike = Adaptor | str | os.PathLike[str] | None


def is_identity(adaptor: Any) -> bool:
    """Is this the identity, in one of the ways to say it?"""
    return adaptor is None or (isinstance(adaptor, str) and adaptor == "identity") or type(adaptor) is IdentityAdaptor


def resolve_adaptor(adaptor: AdaptorLike) -> Adaptor:
    """The adaptor that a user's value stands for.

    Args:
        adaptor: None or "identity"; the folder of a saved adaptor, as text or a path, or its id on the Hugging Face
            Hub; or a module or function that follows `Adaptor`, which is returned as it is.

    Returns:
        The adaptor; a saved one on the CPU, in evaluation mode.

    Raises:
        AdaptorError: it is none of these, or what is saved there cannot be loaded.

    Example:
        >>> resolve_adaptor("identity")
        IdentityAdaptor()
    """
    if isinstance(adaptor, (str, os.PathLike)) and not is_identity(adaptor):
        return adaptors.LearnedAdaptor.from_pretrained(adaptor)  # imported now: huggingface_hub comes with it
    if is_identity(adaptor):
        return adaptor if isinstance(adaptor, IdentityAdaptor) else IdentityAdaptor()
    if isinstance(adaptor, type) or not callable(adaptor):
        raise AdaptorError(
            'an adaptor is None, "identity", the folder of a saved one, or a module called as '
            "adaptor(entry, exit_cached, time=..., text=...)",
            seen={"adaptor": repr(adaptor)[:80]},
            do="pass one of these; a clock goes by its name: clock=2",
        )
    _check_signature(adaptor)
    return adaptor


def _check_signature(adaptor: Any) -> None:
    """Said here, a wrong signature costs no run; it is not asked of what has none (C functions)."""
    try:
        signature = inspect.signature(adaptor.forward if isinstance(adaptor, nn.Module) else adaptor)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, **dict.fromkeys(("time", "text", *needs_of(adaptor))))
    except TypeError as error:
        raise AdaptorError(
            "an adaptor is called as adaptor(entry, exit_cached, time=..., text=...), and with what its `needs` name",
            seen={"adaptor": repr(adaptor)[:80], "its arguments": signature, "error": error},
            do="write a module whose forward(self, entry, exit_cached, *, time, text) returns the exit",
        ) from error
