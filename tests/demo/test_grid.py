"""The demo's picture."""

from types import SimpleNamespace

import torch
from PIL import Image, ImageChops

from clockwork_hooks.demo.run import HEAD, MARGIN, PAPER, draw_grid


def test_the_line_above_one_prompt_ends_within_the_picture() -> None:
    rows = [
        SimpleNamespace(name=name, macs_per_image=12_170_000_000, seconds_per_image=18.189, accuracy=1.0)
        for name in ("plain", "identity", "trained")
    ]
    images = {row.name: torch.zeros(1, 3, 64, 64) for row in rows}
    page = draw_grid(["a red ring"], rows, images)
    head = page.crop((0, 0, page.width, HEAD))
    left, _, right, _ = ImageChops.difference(head, Image.new("RGB", head.size, PAPER)).getbbox()
    assert left >= MARGIN - 2
    assert right <= page.width - MARGIN + 2
