"""A UNet of five layers, and what it returns with any exit put in by a plain hook: small enough for property tests."""

from typing import Any

import torch
from torch import Tensor, nn

EXIT = "up"
SKIPPED = ("down", "act", "body", "up")


class Tiny(nn.Module):
    """Stem, one level below it, head; the time and the conditions matter inside the region and outside of it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(2, 8, 3, padding=1)
            self.emb = nn.Linear(1, 8)
            self.side = nn.Linear(3, 16)
            self.down = nn.Conv2d(8, 16, 4, 2, 1)
            self.act = nn.SiLU()
            self.body = nn.Conv2d(16, 16, 3, padding=1)
            self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
            self.head = nn.Conv2d(16, 2, 3, padding=1)
        self.eval()

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1).expand(len(x), 1) / 100
        h = self.stem(x) + self.emb(time).sin()[:, :, None, None]
        z = self.down(h)
        if c is not None:
            z = z + self.side(c)[:, :, None, None]
        z = self.up(self.body(self.act(z)))
        return self.head(torch.cat([h, z], 1))


def reference(unet: nn.Module, *args: Any, exit: Tensor | None = None, path: str = EXIT, **kwargs: Any) -> Any:
    """(output, exit) of a plain UNet; with `exit`, that tensor takes the place of what the module at `path` returns."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        seen.append((output if exit is None else exit).clone())
        return exit

    handle = unet.get_submodule(path).register_forward_hook(hook)
    try:
        return unet(*args, **kwargs), seen[-1]
    finally:
        handle.remove()
