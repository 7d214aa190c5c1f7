"""Models of our own without a region, each for another reason."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import RefusedCase, refused
from tests.zoo.own_base import Block, Layer, Small, Time, conv


def _case(model: nn.Module, name: str, note: str, *says: str) -> RefusedCase:
    return RefusedCase(
        name=name,
        model=model,
        args=(torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8])),
        source=f"our own {type(model).__name__}",
        note=note,
        says=says,
    )


class Pyramid(Small):
    """Each level adds an image of its own to that of the level below."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.image_deep = conv(16, 3), conv(32, 3)
        self.grow = nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        high = self.high(self.stem(x), emb)
        low = self.low(self.down(high), emb)
        deep = self.deep(self.sink(low), emb)
        merged = self.merge(self.cat(self.rise(deep), low), emb)
        image = self.image(merged) + self.grow(self.image_deep(deep))
        return self.head(self.join(self.cat(self.up(merged), high), emb)) + self.grow(image)


@refused
def pyramid() -> RefusedCase:
    return _case(
        Pyramid(),
        "pyramid",
        "Pyramid.forward: features (`up`) and an image (`grow`, its second call) both come up to full size and meet in "
        "the very last sum only.",
        "no single exit: several exits lead back up: up, grow",
    )


class Dense(nn.Module):
    """UNet++ of three levels: the highest has one more block for each level below, fed by all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Time(16)
        self.x00, self.x10, self.x20 = Block(3, 8), Block(8, 16), Block(16, 32)
        self.x01, self.x11, self.x02 = Block(24, 8), Block(48, 16), Block(32, 8)
        self.head, self.grow = conv(8, 3), nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        x00 = self.x00(x, emb)
        x10 = self.x10(F.max_pool2d(x00, 2), emb)
        x01 = self.x01(torch.cat((x00, self.grow(x10)), dim=1), emb)
        x20 = self.x20(F.max_pool2d(x10, 2), emb)
        x11 = self.x11(torch.cat((x10, self.grow(x20)), dim=1), emb)
        return self.head(self.x02(torch.cat((x00, x01, self.grow(x11)), dim=1), emb))


@refused
def dense_skips() -> RefusedCase:
    return _case(
        Dense(),
        "dense_skips",
        "Dense.forward: two tensors lead up to full size, x10 for x01 and x11 for x02, both through `grow`; they meet "
        "in x02, round which nothing goes. One level lower x10 does go round x20, which is a small part.",
        "no single exit: several exits lead back up: grow (2×)",
        "rejected 0: x10 → grow, 8×8 down to 4×4",
    )


class Flat(nn.Module):
    """A vision transformer: patches, blocks, patches back."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(3, 32, 4, 4), nn.ConvTranspose2d(32, 3, 4, 4)
        self.time = Time(32)
        self.blocks = nn.ModuleList(Layer(32) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        patches = self.patch(x)
        tokens = patches.flatten(2).transpose(1, 2) + self.time(t)[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens.transpose(1, 2).reshape(patches.shape))


@refused
def flat() -> RefusedCase:
    return _case(
        Flat(),
        "flat",
        "Flat.forward: all blocks work on the 4x4 patches; only `out` leads back to pixels, and no skip goes round it.",
        "nothing of 16×16 goes round the low resolutions: all passes out",
        "entry='blocks.4', exit='blocks.20'",
    )


class Shallow(Small):
    """Wide above, narrow below."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.join = Block(8, 128), Block(136, 8)
        self.down = nn.Conv2d(128, 16, 1, 2)


@refused
def too_small() -> RefusedCase:
    return _case(
        Shallow(),
        "too_small",
        "Shallow: the region of Small, but 128 channels at full size around 16 and 32 below.",
        "what lies below 16×16 is too small a part",
        "rejected 0: high → up, 16×16 down to 4×4",
        "20% to 97% of the MACs",
    )
