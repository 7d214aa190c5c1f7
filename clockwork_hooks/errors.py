"""The error tree, and the three warnings.

    ClockworkError
    ├── ArgumentError (ValueError)        an option has a value outside its rule
    ├── TraceError                        a call of the UNet could not be recorded
    │   └── AmbiguousInputError           which input is the time (or the sample) cannot be told
    ├── RegionNotFoundError               no low-resolution region can be skipped
    ├── AdaptorError                      an adaptor does not fit the region's boundary
    ├── WrapError                         the UNet cannot be wrapped, or is wrapped already
    ├── CompileError                      a pass could not be compiled or captured
    ├── CountError                        an operator's MACs are unknown
    ├── DistillError                      an adaptor cannot be trained, or training went wrong
    ├── ModelNotFoundError                a preset, folder or factory names no model
    └── DemoError                         the demo's prompt or weights cannot be used
    NoEffectWarning (UserWarning)         wrapping changes nothing
    OtherStepsWarning (UserWarning)       an adaptor runs at other steps than those that it was made for
    SkippedModuleWarning (UserWarning)    somebody looks at modules that adaptor passes skip

Every message has three parts: the rule, what was seen (one value a line), and what to do. Below a traceback (Python
3.11 or newer) stands the command that prints causes and fixes, a page of docs/errors.

The checks that many functions make of their arguments are here too: whole numbers, shares, packages of an extra.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard, TypeVar

__all__ = [
    "AdaptorError",
    "AmbiguousInputError",
    "ArgumentError",
    "ClockworkError",
    "CompileError",
    "CountError",
    "DemoError",
    "DistillError",
    "ModelNotFoundError",
    "NoEffectWarning",
    "OtherStepsWarning",
    "RegionNotFoundError",
    "SkippedModuleWarning",
    "TraceError",
    "WrapError",
    "first_line",
    "is_number",
    "is_whole",
    "named",
    "named_options",
    "need",
    "no_option",
    "share",
    "warn",
    "whole",
]


class ClockworkError(Exception):
    """Base of all errors of the library.

    Args:
        rule: what must hold, one sentence.
        seen: what was found instead, name → value; one a line in the message.
        do: what the reader can do about it.
        arguments: those that `do` names in braces, name → value: "pass {share}" with {"share": 0.5} reads "pass
            share=0.5", and on the command line "pass --share 0.5". None for no value, ... for one of the reader's own.

    Attributes:
        page: the page of this project's documentation with the error's causes and fixes.

    Example:
        >>> print(ArgumentError("clock is an int of at least 1", seen={"clock": 0}, do="pass clock=2"))
        clock is an int of at least 1
          clock: 0
        What to do: pass clock=2
    """

    def __init__(
        self,
        rule: str,
        *,
        seen: Mapping[str, object] | None = None,
        do: str = "",
        arguments: Mapping[str, object] | None = None,
    ) -> None:
        self.rule = rule
        self.seen = dict(seen or {})
        self.arguments = dict(arguments or {})
        self._do = do
        super().__init__(self.message())
        if sys.version_info >= (3, 11):
            self.add_note(self.where)

    @property
    def do(self) -> str:
        """What the reader can do about it, in Python's words."""
        return self._advice(_keyword)

    def message(self, spell: Callable[[str, object], str] | None = None) -> str:
        """The three parts.

        Args:
            spell: how an argument that the advice names is written; None for Python's way.
        """
        advice = self._advice(spell or _keyword)
        lines = [self.rule, *(f"  {name}: {value}" for name, value in self.seen.items())]
        return "\n".join([*lines, f"What to do: {advice}"] if advice else lines)

    def _advice(self, spell: Callable[[str, object], str]) -> str:
        words = {name: spell(name, value) for name, value in self.arguments.items()}
        return self._do.format_map(words) if words else self._do

    @property
    def page(self) -> str:
        """Of the class itself, or of the public one that it is a kind of."""
        return f"docs/errors/{self._public}.md"

    @property
    def where(self) -> str:
        """The line that says how to read that page; it ships with the package."""
        return f"Causes and fixes: clockwork-hooks explain {self._public}"

    @property
    def _public(self) -> str:
        public = next(kind.__name__ for kind in type(self).__mro__ if kind.__name__ in __all__)
        return "index" if public == "ClockworkError" else public

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.rule, self.seen, self._do, self.arguments)


def _rebuild(
    kind: type[ClockworkError], rule: str, seen: Mapping[str, object], do: str, arguments: Mapping[str, object]
) -> ClockworkError:
    return kind(rule, seen=seen, do=do, arguments=arguments)


def _keyword(name: str, value: object) -> str:
    """share=0.5; modules=[...] for a value of the reader's own, max_error= for none."""
    return f"{name}={'[...]' if value is ... else '' if value is None else repr(value)}"


class ArgumentError(ClockworkError, ValueError):
    """An option has a value outside its rule."""


class TraceError(ClockworkError):
    """A call of the UNet could not be recorded."""


class AmbiguousInputError(TraceError):
    """Which input is the time (or the sample) cannot be told from the call."""


class RegionNotFoundError(ClockworkError):
    """No low-resolution region of the UNet can be skipped."""


class AdaptorError(ClockworkError):
    """An adaptor does not fit the region's boundary."""


class WrapError(ClockworkError):
    """The UNet cannot be wrapped, or is wrapped already.

    Attributes:
        wrapper: what it is wrapped with already, to `remove()` where nobody kept it; else None. Pickles leave it out.
    """

    wrapper: Any = None


class CompileError(ClockworkError):
    """A pass of the UNet could not be compiled or captured."""


class CountError(ClockworkError):
    """An operator multiplies and accumulates, but its MACs are unknown."""


class DistillError(ClockworkError):
    """An adaptor cannot be trained, or training went wrong; what was trained until then is kept.

    Attributes:
        result: what was trained until then, a `DistillResult`; None before training began. Pickles leave it out.
    """

    result: Any = None


class ModelNotFoundError(ClockworkError):
    """A preset, folder or factory names no model."""


class DemoError(ClockworkError):
    """The demo's prompt or weights cannot be used."""


class NoEffectWarning(UserWarning):
    """Wrapping changes nothing, as every pass is full; or it brings nothing: fewer plain steps do better."""


class SkippedModuleWarning(UserWarning):
    """A hook, or an attention processor with state, of other code is on a module that adaptor passes skip."""


class OtherStepsWarning(UserWarning):
    """An adaptor runs at other steps, or in another number of steps, than it was made for; or nobody says how many.

    The last where a schedule depends on the number of steps, and the loop is one's own: `cw.trajectory(steps=20)`. Also
    of a schedule that names steps which a run does not have.
    """


def first_line(error: BaseException) -> str:
    r"""Of what another's error says, for `seen`; its class where it says nothing.

    Example:
        >>> first_line(OSError("no room\nnone at all")), first_line(KeyError())
        ('no room', 'KeyError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_whole(value: object, least: float = -math.inf, most: float = math.inf) -> TypeGuard[int]:
    """Is it an int within these bounds? True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object) -> TypeGuard[float]:
    """Is it an int or a float, and finite? True and False are none, nor is an int larger than any float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_several(value: Any) -> bool:
    """Is it a list, a generator, a tensor with axes, ...? A text is one value, and a mapping is none of these.

    Example:
        >>> is_several([1, 2]), is_several("ab"), is_several(3)
        (True, False, False)
    """
    try:
        iter(value)
    except TypeError:  # a tensor of one number has the method, and raises too
        return False
    return not isinstance(value, (str, bytes, bytearray, Mapping))


def whole(name: str, value: object, *, least: int, rule: str = "", example: int | None = None) -> None:
    """Check an argument that counts something.

    Args:
        name: of the argument.
        value: what the user passes.
        least: the smallest it may be.
        rule: what must hold, where more is to be said than "an int of at least `least`".
        example: what the error advises; None for the least.

    Raises:
        ArgumentError: it is no int, or smaller.

    Example:
        >>> whole("steps", 8, least=1)
    """
    if not is_whole(value, least):
        raise ArgumentError(
            rule or f"{name} is an int of at least {least}",
            seen={name: repr(value)},
            do=f"pass {{{name}}}",
            arguments={name: least if example is None else example},
        )


def share(name: str, value: object, *, rule: str = "", example: float = 0.5, ends: bool = True) -> None:
    """Check an argument that is a share.

    Args:
        name: of the argument.
        value: what the user passes.
        rule: what must hold, where more is to be said than "a share".
        example: what the error advises.
        ends: 0 and 1 are shares too.

    Raises:
        ArgumentError: it is no number, or none between 0 and 1.

    Example:
        >>> share("alpha", 0.3)
    """
    inside = is_number(value) and (0 <= value <= 1 if ends else 0 < value < 1)
    if not inside:
        raise ArgumentError(
            rule or f"{name} is a share{', 0 to 1' if ends else ' between 0 and 1'}",
            seen={name: repr(value)},
            do=f"pass {{{name}}}",
            arguments={name: example},
        )


def as_path(name: str, value: object) -> Path:
    """The path that an argument holds.

    Args:
        name: of the argument.
        value: what the user passes.

    Raises:
        ArgumentError: it is neither text nor a path.

    Example:
        >>> as_path("folder", "my-adaptor").name
        'my-adaptor'
    """
    if not isinstance(value, (str, Path)):
        raise ArgumentError(f"{name} is a path", seen={name: repr(value)[:80]}, do=f'pass {name}="my-adaptor"')
    return Path(value)


def need(what: str, *packages: str, install: str, error: type[ClockworkError] = ArgumentError) -> None:
    """Import packages, or tell how to install them.

    Args:
        what: who needs them for what, one sentence.
        packages: as they are imported.
        install: what pip installs them by, such as "clockwork-hooks[train]".
        error: what is raised.

    Raises:
        ClockworkError: of the class `error`, if a package cannot be imported; with the reason for each.

    Example:
        >>> need("reports are tables", "rich", install="rich")
    """
    missing: dict[str, ImportError] = {}
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as problem:
            missing[f"import {name}"] = problem
    if missing:
        raise error(what, seen=missing, do=f'pip install "{install}"') from next(iter(missing.values()))


def no_option(name: str, options: Iterable[str], *, rule: str) -> ArgumentError:
    """The error for an option that is not there, with the one that has nearly its name.

    Example:
        >>> print(no_option("lvl", ["level", "share"], rule="a region is chosen by options of known names"))
        a region is chosen by options of known names
          no such option: lvl
          options: level, share
        What to do: pass level=
    """
    names = list(options)
    near = get_close_matches(name, names, n=1)
    return ArgumentError(
        rule,
        seen={"no such option": name, "options": ", ".join(names)},
        do=f"pass {near[0]}=" if near else "pass some of these",
    )


def named(function: Callable[..., object]) -> list[str]:
    """Names of a function's own arguments."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, one in inspect.signature(function).parameters.items() if one.kind in kinds]


_P = ParamSpec("_P")
_R = TypeVar("_R")


def named_options(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a public function answer a misspelt option with `no_option`, in the place of Python's `TypeError`.

    Example:
        >>> @named_options
        ... def plan(*, min_saving=0.3): ...
        >>> try:
        ...     plan(min_savings=0.2)
        ... except ArgumentError as error:
        ...     print(error.do)
        pass min_saving=
    """
    names = named(function)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in names:
                raise no_option(name, names, rule=f"{function.__name__} has options of known names")
        return function(*args, **kwargs)

    return checked


class Enough(BaseException):
    """Leaves a sampling loop once its first call is seen, through whatever the loop catches: no error."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the caller's line that led here: the first one outside of this library and of torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_inside(names: Mapping[str, Any]) -> bool:
    return str(names.get("__name__")).split(".")[0] in ("clockwork_hooks", "torch")
