"""Reports: tables, pictures and data for the terminal, as Markdown, JSON, SVG and PNG, and as one HTML page.

The page needs nothing else: no network, no script; it shows well in light and dark, narrow, and on paper.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from clockwork_hooks._version import __version__
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.reports.tables import Table

if TYPE_CHECKING:
    import rich.console

__all__ = ["Picture", "Report", "page", "plain", "reading", "table_html"]

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


def page(title: str, parts: Iterable[Table | str], *, data: Mapping[str, Any], about: str = "") -> str:
    r"""An HTML page.

    Args:
        title: its heading.
        parts: tables, SVG pictures (text that begins with "<svg"), and other text, which is set as it is typed.
        data: the report as plain data, kept in the page for programs: `<script type="application/json" id="data">`.
        about: a sentence below the heading.

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
        f"{f'<p>{escape(about)}</p>' if about else ''}\n{body}\n"
        f"<footer><p>clockwork_hooks {escape(__version__)}. Method: arXiv 2312.08128.</p></footer>\n"
        f'<script type="application/json" id="data">{stored}</script>\n</body>\n</html>\n'
    )


def table_html(table: Table, *, heading: bool = True) -> str:
    """A table as HTML; columns of numbers are aligned to the right."""
    right, kind = [name.startswith(">") for name in table.columns], ' class="n"'

    def cells(tag: str, texts: Iterable[str]) -> str:
        return "".join(
            f"<{tag}{kind if number else ''}>{escape(text)}</{tag}>" for text, number in zip(texts, right, strict=True)
        )

    head = cells("th", (name.lstrip(">") for name in table.columns))
    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    notes = "".join(f"\n<p>{escape(note)}</p>" for note in table.notes)
    title = f"<h2>{escape(table.title)}</h2>\n" if heading else ""
    return (
        f'{title}<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        f"</table></div>{notes}"
    )


def _part(part: Table | str, title: str) -> str:
    if isinstance(part, Table):
        return table_html(part, heading=part.title != title)
    return f"<figure>{part}</figure>" if part.startswith("<svg") else f"<pre>{escape(part)}</pre>"


TEXTS = (".json", ".md", ".html")
PICTURES = (".svg", ".png")


class Picture(Protocol):
    """A picture of a report."""

    def to_svg(self) -> str:
        """As SVG text; it follows the reader's light or dark mode."""

    def save(self, path: str | Path) -> None:
        """As a file whose ending tells the format."""


class Report:
    """Base of all that is counted or measured: a report gives its table, data and pictures, and has every form.

    Terminal (rich prints it), Markdown, JSON, one HTML page, a notebook's cell, files. The JSON says which published
    schema it follows: "clockwork_hooks/NAME/VERSION" is docs/schemas/NAME-VERSION.schema.json
        (clockwork_hooks/schemas in a wheel).

    Attributes:
        SCHEMA: NAME/VERSION.

    Example:
        >>> from dataclasses import dataclass
        >>> from clockwork_hooks.reports.tables import table
        >>> @dataclass(frozen=True)
        ... class Two(Report):
        ...     SCHEMA = "two/1"
        ...     number: int
        ...
        ...     def table(self):
        ...         return table("Two", ("name", ">value"), [("number", self.number)])
        ...
        ...     def data(self):
        ...         return {"number": self.number}
        >>> Two(2).to_dict()
        {'schema': 'clockwork_hooks/two/1', 'number': 2}
        >>> print(Two(2))
        **Two**
        <BLANKLINE>
        | name   | value |
        |:-------|------:|
        | number |     2 |
    """

    __slots__ = ()
    SCHEMA: ClassVar[str] = ""

    def table(self) -> Table:
        """The report as one table, the most important one where there are several."""
        raise NotImplementedError

    def tables(self) -> Sequence[Table]:
        """All tables."""
        return (self.table(),)

    def figures(self) -> Sequence[Picture]:
        """The pictures, the most important one first; none where their package is missing."""
        return ()

    def data(self) -> Mapping[str, Any]:
        """All numbers by name; counts and times in units, never rounded."""
        raise NotImplementedError

    @property
    def heading(self) -> str:
        """Title of the page."""
        return self.table().title

    def to_dict(self) -> dict[str, Any]:
        """The data as JSON's own types, with the schema that it follows."""
        data: dict[str, Any] = plain({"schema": f"clockwork_hooks/{self.SCHEMA}", **self.data()})
        return data

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """The tables as Markdown."""
        return "\n\n".join(part.to_markdown() for part in self.tables())

    def to_html(self) -> str:
        """One HTML page with tables and pictures; it needs no network and no script, and holds the data as JSON."""
        first, *more = self.tables()
        drawn = [picture.to_svg() for picture in self.figures()]
        return page(self.heading, [first, *drawn, *more], data=self.to_dict())

    def save(self, path: str | Path) -> Path:
        """Write the report to a file whose ending tells the form: .json, .md, .html; .svg or .png for its picture.

        Args:
            path: the file; its folder is made if need be.

        Returns:
            The path.

        Raises:
            ArgumentError: another ending, no picture, or the file cannot be written.
        """
        target = Path(path)
        drawn = self.figures() if target.suffix in PICTURES else ()
        if target.suffix not in (*TEXTS, *PICTURES) or (target.suffix in PICTURES and not drawn):
            has = (*TEXTS, *(PICTURES if self.figures() else ()))
            raise ArgumentError(
                "a report is written to a file whose ending tells its form",
                seen={"file": target, "forms of this report": " ".join(has)},
                do="end the name with one of these",
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if drawn:
                drawn[0].save(target)
            else:
                form = {".json": self.to_json, ".md": self.to_markdown, ".html": self.to_html}[target.suffix]
                target.write_text(form().rstrip("\n") + "\n", encoding="utf-8")
        except OSError as error:
            raise ArgumentError(
                "a report goes to a file that can be written",
                seen={"file": target, "error": error},
                do="name another one",
            ) from error
        return target

    def _repr_html_(self) -> str:
        return "".join([*(picture.to_svg() for picture in self.figures()), *map(table_html, self.tables())])

    def __rich__(self) -> rich.console.Group:
        from rich.console import Group

        return Group(*self.tables())

    def __str__(self) -> str:
        return self.to_markdown()


@contextlib.contextmanager
def reading(kind: type[Report], text: str) -> Iterator[dict[str, Any]]:
    """The data of a report that `to_json` wrote; what is wrong with it, here or within, is one error.

    Raises:
        ArgumentError: the text is no JSON, follows another schema, or lacks something.
    """
    wanted = f"clockwork_hooks/{kind.SCHEMA}"
    try:
        data = json.loads(text)
        if data.get("schema") != wanted:
            raise ValueError(f"its schema is {data.get('schema')!r}, not {wanted!r}")
        yield data
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"a {kind.__name__.lower()} is what {kind.__name__}.to_json wrote",
            seen={"error": f"{type(error).__name__}: {error}"},
            do="write it again",
        ) from error


def plain(value: Any) -> Any:
    """The value in JSON's own types: tuples become lists, keys text, what is not finite None, the rest its `str`.

    Example:
        >>> plain({2: (1, float("nan")), "where": Path("a")})
        {'2': [1, None], 'where': 'a'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, Set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
