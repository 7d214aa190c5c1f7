"""The text encoder of the demo model: word tokens through a small transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from clockwork_hooks.demo.captions import MAX_TOKENS, VOCABULARY

__all__ = ["TEXT_WIDTH", "TextEncoder"]

TEXT_WIDTH = 128


class TextEncoder(nn.Module):
    """Token ids to hidden states for cross-attention.

    Padding is attended to like any word (as in Stable Diffusion), so no mask travels with the hidden states.

    Args:
        width: of the hidden states.
        layers: transformer layers.
        heads: attention heads of a layer.
    """

    def __init__(self, width: int = TEXT_WIDTH, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(len(VOCABULARY), width)
        self.position = nn.Embedding(MAX_TOKENS, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode captions.

        Args:
            tokens: (B, 18) int64 token ids, as `captions.encode` gives them.

        Returns:
            (B, 18, width) hidden states.
        """
        hidden: Tensor = self.token(tokens) + self.position.weight
        for layer in self.layers:
            hidden = layer(hidden)
        normed: Tensor = self.norm(hidden)
        return normed


class _Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.norm_attention(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = hidden + self.mlp(self.norm_mlp(hidden))
        return result
