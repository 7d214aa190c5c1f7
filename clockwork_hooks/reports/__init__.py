"""Reports and what they are made of: tables, pictures, plots, pages and progress; knows nothing of who measured.

Everything is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clockwork_hooks.reports.plots import Plot
    from clockwork_hooks.reports.progress import ProgressBar
    from clockwork_hooks.reports.report import Report
    from clockwork_hooks.reports.tables import Table
    from clockwork_hooks.reports.u_drawing import Diagram

__all__ = ["Diagram", "Plot", "ProgressBar", "Report", "Table"]

_HOMES = {
    "Diagram": "u_drawing",
    "Plot": "plots",
    "ProgressBar": "progress",
    "Report": "report",
    "Table": "tables",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
