"""Numbers with their units and shapes, as people read them."""

from __future__ import annotations

from collections.abc import Iterable

_PREFIXES = ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


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


def count(number: int, one: str, several: str = "") -> str:
    """A number of things, in the singular or the plural.

    Example:
        >>> count(1, "prompt"), count(1200, "prompt"), count(2, "batch", "batches")
        ('1 prompt', '1,200 prompts', '2 batches')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def duration(seconds: float) -> str:
    """A time in the unit that people would say it in, with three digits.

    Example:
        >>> duration(0.0031), duration(2.6), duration(83), duration(4980)
        ('3.1 ms', '2.6 s', '1 min 23 s', '1 h 23 min')
    """
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def macs(value: int | None) -> str | None:
    """Multiply-accumulates: 338610585600 → "338.61 GMACs"; None stays None."""
    return None if value is None else quantity(value, "MACs")


def flops(value: int | None) -> str | None:
    """Floating point operations, two a MAC: 677221171200 → "677.22 GFLOPs"; None stays None."""
    return None if value is None else quantity(value, "FLOPs")


def percent(share: float | None) -> str | None:
    """0.309 → "30.9%"; two digits where one decimal would be nothing, 0.000031 → "0.0031%"; None stays None.

    What is less than 0.001% is said to be so.
    """
    if share is None:
        return None
    if 0 < share < 0.00001:
        return "<0.001%"
    return f"{100 * share:.2g}%" if 0 < abs(share) < 0.0005 else f"{share:.1%}"


def shape(sizes: Iterable[int]) -> str:
    """(1, 4, 64, 64) → "1×4×64×64"; () → ""."""
    return "×".join(map(str, sizes))
