"""One vector from the tokens of a text: the mean over those that are no padding."""

from __future__ import annotations

import torch

__all__ = ["masked_mean"]


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
