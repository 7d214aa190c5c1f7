"""The demo's picture: each prompt with its plain picture and those with Clockwork, labelled."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clockwork_hooks.reports.tables import duration, macs

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["draw_grid"]

SIDE, GAP, MARGIN, CAPTION, HEAD = 144, 6, 24, 46, 74
COLUMNS = {2: 4}  # pictures of a prompt → prompts in a line
INK, FAINT, EDGE, PAPER = (24, 24, 27), (113, 113, 122), (212, 212, 216), (255, 255, 255)


def draw_grid(prompts: Sequence[str], rows: Sequence[Any], images: Mapping[str, Tensor]) -> Image.Image:
    """One cell a prompt: its pictures side by side, the caption below.

    Args:
        prompts: B of them.
        rows: the UNets that drew them, from left to right: each has name, macs_per_image, seconds_per_image, accuracy.
        images: name of the row → its pictures (B, 3, H, W) in [0, 1].

    Returns:
        An RGB picture; as wide as three or four cells, or fewer for fewer prompts.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS.get(len(rows), 3), len(prompts))
    width = len(rows) * SIDE + (len(rows) - 1) * GAP
    height = SIDE + CAPTION
    lines = -(-len(prompts) // columns)
    head, small = ImageFont.load_default(20), ImageFont.load_default(12)
    legend = "     ".join(_words(row) for row in rows)
    total = max(columns * (width + MARGIN) + MARGIN, math.ceil(small.getlength(legend)) + 2 * MARGIN)
    page = Image.new("RGB", (total, HEAD + lines * (height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 14), f"Each prompt: {' | '.join(row.name for row in rows)}", INK, font=head)
    draw.text((MARGIN, 44), legend, FAINT, font=small)
    for k, prompt in enumerate(prompts):
        left = MARGIN + k % columns * (width + MARGIN)
        top = HEAD + k // columns * (height + MARGIN)
        for j, row in enumerate(rows):
            picture = _picture(images[row.name][k]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            at = (left + j * (SIDE + GAP), top)
            page.paste(picture, at)
            draw.rectangle((*at, at[0] + SIDE - 1, at[1] + SIDE - 1), outline=EDGE)
        caption = "\n".join(textwrap.wrap(prompt, width // 6)[:3])
        draw.multiline_text((left, top + SIDE + 5), caption, INK, font=small, spacing=2)
    return page


def _words(row: Any) -> str:
    cost = f"{macs(row.macs_per_image)}, {duration(row.seconds_per_image)} an image"
    return f"{row.name}: {cost}, {row.accuracy:.1%} of attributes right"


def _picture(image: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())
