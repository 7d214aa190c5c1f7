"""A budget for a UNet's cost: the limits that a pass or a trajectory may not exceed, for automated checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clockwork_hooks._numbers import percent, quantity
from clockwork_hooks.analysis.flops import FlopsReport
from clockwork_hooks.errors import ArgumentError, is_number
from clockwork_hooks.reports.tables import Table, table

PASSES = ("full", "adaptor_pass", "trajectory")
LIMITS = (*(f"{name}_macs" for name in PASSES), *(f"{name}_flops" for name in PASSES), "parameters")


@dataclass(frozen=True, slots=True)
class BudgetCheck:
    """A report held against a budget.

    Attributes:
        limits: name of a count → (its limit, what was counted).
    """

    limits: Mapping[str, tuple[int, int]]

    @property
    def exceeded(self) -> tuple[str, ...]:
        """Names of the counts that are over their limits."""
        return tuple(name for name, (limit, counted) in self.limits.items() if counted > limit)

    def table(self) -> Table:
        """Limits, counts and differences."""
        rows = [
            (
                name,
                _amount(limit, name),
                _amount(counted, name),
                f"{'+' if counted > limit else ''}{percent(counted / limit - 1)}",
                "over" if counted > limit else "within",
            )
            for name, (limit, counted) in self.limits.items()
        ]
        return table("Budget", ("count", ">limit", ">counted", ">difference", ""), rows)


def read_budget(path: str | Path) -> dict[str, int]:
    """Read a budget: a JSON object of counts and their limits, e.g. {"trajectory_macs": 2500000000000}.

    Raises:
        ArgumentError: no such file, no JSON, an unknown count, or a limit that is no positive number.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "a budget is a JSON file",
            seen={"file": path, "error": error},
            do='write {"full_macs": 1e12}',
        ) from error
    wrong = [name for name in data if name not in LIMITS] if isinstance(data, dict) else ["no object"]
    if wrong or not data:
        raise ArgumentError(
            "a budget is a JSON object of counts and their limits",
            seen={"file": path, "not a count": ", ".join(wrong) or "it is empty"},
            do=f"name some of {', '.join(LIMITS)}",
        )
    for name, limit in data.items():
        if not is_number(limit) or limit <= 0:
            raise ArgumentError(
                "a limit is a positive number",
                seen={"file": path, name: repr(limit)},
                do="1 GMAC is 1e9",
            )
    return {name: int(limit) for name, limit in data.items()}


def check_budget(report: FlopsReport, budget: Mapping[str, int]) -> BudgetCheck:
    """Hold a report against a budget.

    Args:
        report: the counts; its convention (attention products or not) holds for the limits too.
        budget: name of a count (an attribute of the report) → its limit.

    Returns:
        The check; `.exceeded` is empty where all is within the budget.

    Raises:
        ArgumentError: the budget limits adaptor passes, and the UNet has no region.

    Example:
        >>> from clockwork_hooks.analysis.flops import flops_report
        >>> from clockwork_hooks.models import load_model
        >>> unet, args, kwargs = load_model("ddpm-cifar10")
        >>> check_budget(flops_report(unet, *args, **kwargs), {"full_macs": 6_000_000_000}).exceeded
        ('full_macs',)
    """
    counts = {name: getattr(report, name) for name in budget}
    missing = [name for name, count in counts.items() if count is None]
    if missing:
        raise ArgumentError(
            "a budget for adaptor passes needs a region",
            seen={"limits": ", ".join(missing), "no region because": report.no_region.splitlines()[0]},
            do="limit full_macs, or name a region by hand",
        )
    return BudgetCheck({name: (limit, counts[name]) for name, limit in budget.items()})


def _amount(value: int, name: str) -> str:
    unit = {"macs": "MACs", "flops": "FLOPs"}.get(name.rpartition("_")[2], " parameters")
    return quantity(value, unit)
