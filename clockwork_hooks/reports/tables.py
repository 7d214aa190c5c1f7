"""Tables and numbers as people read them: one description, rendered for the terminal and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console

__all__ = ["Table", "flops", "macs", "percent", "quantity", "shape", "table"]

_PREFIXES = ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


@dataclass(frozen=True, slots=True)
class Table:
    """A table that does not know yet where it will be printed.

    Attributes:
        title: what it shows.
        columns: headings; a leading ">" aligns the column to the right.
        rows: cells as text.
        notes: sentences below it.

    Example:
        >>> print(table("Passes", ("pass", ">MACs"), [("full", macs(338_610_585_600))]).to_markdown())
        **Passes**
        <BLANKLINE>
        | pass |         MACs |
        |:-----|-------------:|
        | full | 338.61 GMACs |
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """The table as Markdown, its columns aligned in the source too."""
        heads = [name.lstrip(">") for name in self.columns]
        right = [name.startswith(">") for name in self.columns]
        lines = [heads, *([_escaped(cell) for cell in row] for row in self.rows)]
        widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(heads))]

        def line(cells: Sequence[str]) -> str:
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
            return "| " + " | ".join(padded) + " |"

        rule = "|".join("-" * (w + 1) + ":" if r else ":" + "-" * (w + 1) for w, r in zip(widths, right, strict=True))
        text = [f"**{self.title}**", "", line(heads), f"|{rule}|", *(line(row) for row in lines[1:])]
        return "\n".join([*text, *(part for note in self.notes for part in ("", note))])

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        widths, room = self._widths(), options.max_width - 2
        heads = [name.lstrip(">") for name in self.columns]
        natural = [max(map(len, [head, *(row[k] for row in self.rows)])) for k, head in enumerate(heads)]
        tight = sum(natural) + len(natural) - 1 > room
        for number, block in enumerate(self._blocks(widths, room)):
            made = RichTable(
                title=None if number else self.title,
                title_justify="left",
                title_style="bold",
                box=box.SIMPLE_HEAD,
                padding=0,
                pad_edge=False,
            )
            for k in block:
                whole, right = self._whole(k), self.columns[k].startswith(">")
                heading = "\n".join(textwrap.wrap(heads[k], widths[k])) if tight and whole else heads[k]
                made.add_column(
                    heading,
                    justify="right" if right else "left",
                    min_width=widths[k],
                    no_wrap=tight and whole,
                    overflow="fold",
                )
            for row in self.rows:
                made.add_row(*(Text(row[k]) for k in block))
            yield made
        for note in self.notes:
            yield Text(note, style="dim")
        yield Text()

    def _whole(self, k: int) -> bool:
        """Numbers and the first column, which names the row, never break; headings do, at spaces."""
        return k == 0 or self.columns[k].startswith(">")

    def _widths(self) -> list[int]:
        """What each column needs at least."""
        words = [name.lstrip(">").split() for name in self.columns]
        cells = [[row[k] for row in self.rows] if self._whole(k) else [] for k in range(len(words))]
        return [min(40, max(map(len, [*heading, *held, ""]))) for heading, held in zip(words, cells, strict=True)]

    def _blocks(self, widths: Sequence[int], room: int) -> list[list[int]]:
        """The columns, in as many tables one below the other as the room asks for; each begins with the first one."""
        blocks, used = [[0]], widths[0]
        for k, width in list(enumerate(widths))[1:]:
            if len(blocks[-1]) > 1 and used + 1 + width > room:
                blocks.append([0])
                used = widths[0]
            blocks[-1].append(k)
            used += 1 + width
        return blocks


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, notes: Sequence[str] = ()) -> Table:
    """A `Table` from any cells; None becomes an en dash.

    Args:
        title: what it shows.
        columns: headings; a leading ">" aligns the column to the right.
        rows: as many cells each as there are columns.
        notes: sentences below it.
    """
    texts = tuple(tuple("–" if cell is None else str(cell) for cell in row) for row in rows)
    return Table(title, tuple(columns), texts, tuple(notes))


def quantity(value: float, unit: str) -> str:
    """A number with its unit, prefixed so that one to three digits stand before the point.

    Example:
        >>> quantity(7_250_000_000_000, "FLOPs"), quantity(999, "MACs")
        ('7.25 TFLOPs', '999 MACs')
    """
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 0.99999:
            return f"{value / size:.2f} {prefix}{unit}"
    return f"{value:g} {unit}"


def macs(value: int | None) -> str | None:
    """Multiply-accumulates: 338610585600 → "338.61 GMACs"; None stays None."""
    return None if value is None else quantity(value, "MACs")


def flops(value: int | None) -> str | None:
    """Floating point operations, two a MAC: 677221171200 → "677.22 GFLOPs"; None stays None."""
    return None if value is None else quantity(value, "FLOPs")


def percent(share: float | None) -> str | None:
    """0.309 → "30.9%"; two digits where one decimal would be nothing, 0.000031 → "0.0031%"; None stays None."""
    if share is None:
        return None
    return f"{100 * share:.2g}%" if 0 < abs(share) < 0.0005 else f"{share:.1%}"


def shape(sizes: Iterable[int]) -> str:
    """(1, 4, 64, 64) → "1×4×64×64"; () → ""."""
    return "×".join(map(str, sizes))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
