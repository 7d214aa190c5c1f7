"""Tables: one description, rendered for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console
    import rich.table
    import rich.text

__all__ = ["Table", "table"]


@dataclass(frozen=True, slots=True)
class Table:
    """A table that does not know yet where it will be printed.

    Attributes:
        title: what it shows.
        columns: headings; a leading ">" aligns the column to the right.
        rows: cells as text.
        notes: sentences below it.

    Example:
        >>> from clockwork_hooks._numbers import macs
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
        yield self._grid(options.max_width) or self._records()
        yield from (_text(note, "dim") for note in self.notes)
        yield _text("")

    def _grid(self, room: int) -> rich.table.Table | None:
        """As a grid that rich folds at spaces, headings and texts before numbers; None where the words do not fit."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable

        heads = [name.lstrip(">") for name in self.columns]
        columns = [[head, *(row[k] for row in self.rows)] for k, head in enumerate(heads)]
        words = [max((len(word) for text in column for word in text.split()), default=1) for column in columns]
        rows = [max(map(len, [*column[1:], ""])) for column in columns]  # what holds a cell in one line
        whole = [rows[k] if k == 0 or self.columns[k].startswith(">") else 0 for k in range(len(heads))]
        widths = [max(map(len, column)) for column in columns]
        while sum(widths) + len(widths) + 1 > room:
            k = max(range(len(heads)), key=lambda k: (widths[k] > words[k], widths[k] > whole[k], widths[k]))
            if widths[k] <= words[k]:
                return None
            widths[k] -= 1
        grid = RichTable(title=self.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
        for head, name, width in zip(heads, self.columns, widths, strict=True):
            grid.add_column(head, justify="right" if name.startswith(">") else "left", width=width)
        for row in self.rows:
            grid.add_row(*map(_text, row))
        return grid

    def _records(self) -> rich.console.Group:
        """Row by row, a line a cell: for terminals too narrow for a grid."""
        from rich.console import Group
        from rich.table import Table as RichTable

        parts = [RichTable.grid(padding=(0, 1)) for _ in self.rows]
        for part, row in zip(parts, self.rows, strict=True):
            for name, cell in zip(self.columns, row, strict=True):
                part.add_row(_text(name.lstrip(">"), "dim"), _text(cell))
            part.add_row("")
        return Group(_text(self.title, "bold"), *parts)


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


def _text(words: str, style: str = "") -> rich.text.Text:
    from rich.text import Text

    return Text(words, style, overflow="fold")


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
