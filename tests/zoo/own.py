"""A UNet as one writes it in an afternoon: thirty lines, no time, no library."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import ZooCase, case


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class PlainUNet(nn.Module):
    """Ronneberger's UNet, two poolings deep."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = _double(3, 8)
        self.down2 = _double(8, 16)
        self.middle = _double(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge2 = _double(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge1 = _double(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.down1(image)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.middle(F.max_pool2d(two, 2))
        two = self.merge2(torch.cat((self.up2(three), two), dim=1))
        one = self.merge1(torch.cat((self.up1(two), one), dim=1))
        return self.out(one)


@case
def plain() -> ZooCase:
    return ZooCase(
        name="plain",
        model=PlainUNet(),
        args=(torch.randn(2, 3, 16, 24),),
        entry=("down1", "down1.4"),
        exit=("up1",),
        resolution=(16, 24),
        source="our own, without time",
        note="PlainUNet.forward: `one` is a skip and goes into a functional max pooling, so no module consumes the "
        "entry; `up1` gives the top resolution again, the cat with `one` comes next. `down1` ends in an in-place ReLU: "
        "`down1.3` returns the same tensor, but before it is written to, so it is not the entry.",
        skipped=frozenset({"down2", "middle", "up2", "merge2"}),
        kept=frozenset({"down1", "merge1", "out"}),
    )
