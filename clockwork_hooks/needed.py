"""Packages that come with an extra, and may not be there."""

from __future__ import annotations

import importlib

from clockwork_hooks.errors import ArgumentError, ClockworkError

__all__ = ["need"]


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
    found: dict[str, ImportError] = {}
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as problem:
            found[f"import {name}"] = problem
    if found:
        raise error(what, seen=found, do=f'pip install "{install}"') from next(iter(found.values()))
