"""The adaptor without parameters: the feature of the step before, as it is."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["IdentityAdaptor"]


class IdentityAdaptor(nn.Module):
    """Returns what the region emitted one step before: no parameters, no MACs.

    Example:
        >>> cached = torch.ones(1, 4, 8, 8)
        >>> IdentityAdaptor()(None, cached, time=None, text=None) is cached
        True

    Source: arXiv 2312.08128, Sec. 4.2 ("identity adaptor") and Tab. 3.
    """

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
