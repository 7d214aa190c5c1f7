"""The signature and the inputs of every adaptor; and the identity, which passes the cached exit on."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

__all__ = ["Adaptor", "AdaptorInputs", "IdentityAdaptor", "needs_of"]


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
