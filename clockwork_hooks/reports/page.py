"""A report as one HTML page that needs nothing else: no network, no script; light and dark, narrow, and on paper."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from clockwork_hooks._version import __version__
from clockwork_hooks.reports.tables import Table

__all__ = ["page", "table_html"]

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
