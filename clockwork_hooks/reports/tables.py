"""Tables, one description for the terminal, as Markdown and as HTML; and the page that shows a report in a browser.

The page needs nothing else: no network, no script. It is light or dark, narrow, and on paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from clockwork_hooks._version import __version__

if TYPE_CHECKING:
    import rich.console
    import rich.table
    import rich.text


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

    def to_html(self, *, heading: bool = True) -> str:
        """The table as HTML; columns of numbers are aligned to the right."""
        right, kind = [name.startswith(">") for name in self.columns], ' class="n"'

        def cells(tag: str, texts: Iterable[str]) -> str:
            return "".join(
                f"<{tag}{kind if number else ''}>{escape(text)}</{tag}>"
                for text, number in zip(texts, right, strict=True)
            )

        head = cells("th", (name.lstrip(">") for name in self.columns))
        rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        notes = "".join(f"\n<p>{escape(note)}</p>" for note in self.notes)
        title = f"<h2>{escape(self.title)}</h2>\n" if heading else ""
        return (
            f'{title}<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
            f"</table></div>{notes}"
        )

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
        whole = [rows[k] if self.columns[k].startswith(">") else 0 for k in range(len(heads))]
        whole[0] = min(rows[0], room // 3)  # names stay whole, and long ones leave room for the others
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


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2733; --quiet: #5a6675; --line: #dde3ea; --stripe: #f5f7fa }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14181f; --ink: #e4eaf2; --quiet: #9aa7b8; --line: #2c3541; --stripe: #1a2029 }
}
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { color: var(--quiet); margin: .4rem 0; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem; text-align: left; border-bottom: 1px solid var(--line) }
th { font-weight: 600; border-bottom-width: 2px }
th.n, td.n { text-align: right; white-space: nowrap }
td:first-child:not(.n) { min-width: 8.5rem }
tbody tr:nth-child(even) { background: var(--stripe) }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--stripe); border-radius: 4px; font-size: 13px }
figure { margin: 1rem 0; overflow-x: auto } figure svg { min-width: 26rem } figure svg.ch-u { min-width: 40rem }
footer { margin-top: 3rem; border-top: 1px solid var(--line) }
@media print { body { max-width: none; padding: 0 } h2, table { break-inside: avoid }
  figure svg, figure svg.ch-u { min-width: 0 } }
"""


def page(title: str, parts: Iterable[Table | str], *, data: Mapping[str, Any]) -> str:
    r"""An HTML page.

    Args:
        title: its heading.
        parts: tables, SVG pictures (text that begins with "<svg"), and other text, which is set as it is typed.
        data: the report as plain data, kept in the page for programs: `<script type="application/json" id="data">`.

    Returns:
        The page's text.

    Example:
        >>> from clockwork_hooks.reports.tables import table
        >>> '<td class="n">7</td>' in page("Seven", [table("One", (">n",), [(7,)])], data={"n": 7})
        True
    """
    stored = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    body = "\n".join(_part(part, title) for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"\n{body}\n"
        f"<footer><p>clockwork_hooks {escape(__version__)}. Method: arXiv 2312.08128.</p></footer>\n"
        f'<script type="application/json" id="data">{stored}</script>\n</body>\n</html>\n'
    )


def _part(part: Table | str, title: str) -> str:
    if isinstance(part, Table):
        return part.to_html(heading=part.title != title)
    return f"<figure>{part}</figure>" if part.startswith("<svg") else f"<pre>{escape(part)}</pre>"
