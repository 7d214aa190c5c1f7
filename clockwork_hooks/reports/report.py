"""Reports: tables, pictures and data for the terminal, as Markdown, JSON, SVG and PNG, and as one HTML page.

How a page and a picture are made is imported when one is asked for: a wrapped UNet has reports, and few are looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Union, get_args, get_origin, get_type_hints

from clockwork_hooks.errors import ArgumentError

if TYPE_CHECKING:
    import rich.console
    from typing_extensions import Self

    from clockwork_hooks.reports.tables import Table

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
        from clockwork_hooks.reports.tables import page

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
        return "".join(
            [*(picture.to_svg() for picture in self.figures()), *(table.to_html() for table in self.tables())]
        )

    def __rich__(self) -> rich.console.Group:
        from rich.console import Group

        return Group(*self.tables())

    def __str__(self) -> str:
        return self.to_markdown()


class FieldReport(Report):
    """A report that is a dataclass, whose data are its fields, but for those that are not compared.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Steps(FieldReport):
        ...     SCHEMA = "steps/1"
        ...     at: tuple[int, ...]
        ...     errors: Mapping[int, float | None]
        >>> steps = Steps((3, 5), {2: 0.5, 3: None})
        >>> Steps.from_json(steps.to_json()) == steps
        True
    """

    __slots__ = ()

    def data(self) -> dict[str, Any]:
        """All fields, but for those that are not compared: what was drawn, and objects of this session."""
        return {one.name: _as_data(getattr(self, one.name)) for one in _compared(type(self))}

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote; what else the text holds is left out.

        Raises:
            ArgumentError: the text is no such report.
        """
        with reading(cls, text) as data:
            del data["schema"]
            return _as_type(cls, data)  # type: ignore[no-any-return]


def _compared(kind: Any) -> list[dataclasses.Field[Any]]:
    return [one for one in dataclasses.fields(kind) if one.compare]


def _as_data(value: Any) -> Any:
    """Dataclasses as mappings, within tuples and mappings too."""
    if dataclasses.is_dataclass(value):
        return {one.name: _as_data(getattr(value, one.name)) for one in _compared(value)}
    if isinstance(value, Mapping):
        return {key: _as_data(one) for key, one in value.items()}
    return [_as_data(one) for one in value] if isinstance(value, tuple) else value


def _as_type(hint: Any, value: Any) -> Any:
    """What JSON holds as its type hint has it: dataclasses, tuples, mappings with keys that are numbers."""
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: _as_type(hints[name], one) for name, one in value.items() if name in hints})  # type: ignore[operator]
    origin, inner = get_origin(hint), get_args(hint)
    if hint is float and value is None:  # as `plain` writes what is not finite: an error of results that are no numbers
        return math.inf
    if origin in (Union, UnionType):
        return None if value is None else _as_type(next(one for one in inner if one is not type(None)), value)
    if origin is tuple:
        return tuple(_as_type(inner[0], one) for one in value)  # all of ours are of one type
    if origin is not None and isinstance(value, Mapping):
        return {inner[0](key): _as_type(inner[1], one) for key, one in value.items()}
    return value


@contextlib.contextmanager
def reading(kind: type[Report], text: str, file: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """The data of a report that `to_json` wrote; what is wrong with it, here or within, is one error.

    Args:
        kind: of report.
        text: its JSON.
        file: that it was read from, for the error.

    Raises:
        ArgumentError: the text is no JSON, follows another schema, or lacks something.
    """
    wanted = f"clockwork_hooks/{kind.SCHEMA}"
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"it is no JSON object: {str(data)[:40]}")
        if data.get("schema") != wanted:
            raise ValueError(f"its schema is {data.get('schema')!r}, not {wanted!r}")
        yield data
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ArgumentError(
            f"a {kind.__name__.lower()} is what {kind.__name__}.to_json wrote",
            seen={**({} if file is None else {"file": file}), "error": f"{type(error).__name__}: {error}"},
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
