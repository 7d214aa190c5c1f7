"""Plots as pictures of reports: drawn by matplotlib when they are asked for, in the reader's colours in a page."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clockwork_hooks.errors import ArgumentError, need

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

INK = "#010203"  # stands for the reader's text colour until the SVG is written
LINES = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
CLEAR = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none")
FIXED = {"legend.edgecolor": "#8a94a3", "svg.fonttype": "none", "svg.hashsalt": "clockwork_hooks"}


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure that is drawn when it is needed.

    Attributes:
        draw: makes the figure; needs matplotlib.
        title: what it shows, for those who cannot see it.
    """

    draw: Callable[[], Figure]
    title: str

    def to_svg(self) -> str:
        """As SVG text without a background; lines and words have the colour of the text around."""
        _need_matplotlib()
        from matplotlib import rc_context

        buffer = io.StringIO()
        style: dict[Any, Any] = {**dict.fromkeys(LINES, INK), **CLEAR, **FIXED}
        with rc_context(style):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.draw().savefig(buffer, format="svg", metadata=nothing)
        text = buffer.getvalue().replace(INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        size = re.search(r'viewBox="0 0 ([\d.]+)', text)
        wide = f'width="100%" style="max-width:{float(size[1]) * 4 / 3:.0f}px" role="img"' if size else ""
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2).replace("<svg", f"<svg {wide}", 1)
        return text.replace(">", f"><title>{escape(self.title)}</title>", 1)

    def save(self, path: str | Path) -> None:
        """As a PNG, SVG or PDF file on white paper.

        Raises:
            ArgumentError: another ending, or matplotlib is missing.
        """
        target = Path(path)
        if target.suffix not in (".png", ".svg", ".pdf"):
            raise ArgumentError(
                "a plot is written as PNG, SVG or PDF", seen={"file": target}, do="end the name with .png"
            )
        _need_matplotlib()
        self.draw().savefig(target)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A picture of pixels that is drawn when it is needed.

    Attributes:
        draw: makes the picture; needs Pillow.
        title: what it shows, for those who cannot see it.
    """

    draw: Callable[[], Image]
    title: str

    def to_svg(self) -> str:
        """As SVG text that holds the pixels."""
        picture, buffer = self.draw(), io.BytesIO()
        picture.save(buffer, "PNG")
        pixels = base64.b64encode(buffer.getvalue()).decode()
        width, height = picture.size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="100%" role="img" '
            f'style="max-width:{width}px"><title>{escape(self.title)}</title>'
            f'<image width="{width}" height="{height}" href="data:image/png;base64,{pixels}" /></svg>'
        )

    def save(self, path: str | Path) -> None:
        """As a file of any format that Pillow writes, or SVG."""
        target = Path(path)
        if target.suffix == ".svg":
            target.write_text(self.to_svg(), encoding="utf-8")
        else:
            self.draw().save(target)


def plots(*drawn: Plot) -> tuple[Plot, ...]:
    """These plots, or none where matplotlib is not installed: a page does without them."""
    return drawn if importlib.util.find_spec("matplotlib") else ()


def _need_matplotlib() -> None:
    need("a plot is drawn by matplotlib", "matplotlib", install="clockwork-hooks[plot]")
