"""What a random UNet is to be, drawn before any of it is built."""

import random
from dataclasses import dataclass

from tests.zoo.random_layers import DOWN, UP

SIZES = {1: (32,), 2: (16, 24), 3: (8, 8, 12)}
TIME = 12


@dataclass(frozen=True)
class Plan:
    """Everything that chance decides."""

    dims: int
    widths: tuple[int, ...]
    blocks: int
    every_block_skips: bool
    merge: str
    downs: tuple[str, ...]
    ups: tuple[str, ...]
    wrapped: bool
    nested: bool
    residual: bool
    time: bool
    preconditioned: bool
    shared_act: bool
    shared_upsample: bool
    returns: str
    batch: int

    @classmethod
    def draw(cls, rng: random.Random) -> "Plan":
        dims = rng.choice((1, 2, 2, 3))
        levels = rng.randint(2, 3 if dims == 3 else 4)
        return cls(
            dims=dims,
            widths=_widths(rng, levels, growth=3 if dims == 3 else 2),
            blocks=rng.randint(1, 2),
            every_block_skips=rng.random() < 0.5,
            merge=rng.choice(("concat", "add", "concat1x1")),
            downs=tuple(rng.choice(DOWN) for _ in range(levels - 1)),
            ups=tuple(rng.choice(UP) for _ in range(levels - 1)),
            wrapped=rng.random() < 0.5,
            nested=rng.random() < 0.4,
            residual=rng.random() < 0.7,
            time=rng.random() < 0.7,
            preconditioned=rng.random() < 0.3,
            shared_act=rng.random() < 0.4,
            shared_upsample=rng.random() < 0.5,
            returns=rng.choice(("tensor", "tensor", "tuple", "dict")),
            batch=rng.randint(1, 2),
        )

    @property
    def skips(self) -> int:
        return self.blocks if self.every_block_skips else 1


def _widths(rng: random.Random, levels: int, *, growth: int) -> tuple[int, ...]:
    """Widths that grow downwards as in real UNets, fast enough that a region holds a fifth of the work."""
    first = rng.choice((8, 12))
    return tuple(first * growth ** min(k, 3) + 4 * (rng.random() < 0.3 and k > 0) for k in range(levels))
