"""The rows that a FLOP count is made of."""

from __future__ import annotations

from dataclasses import dataclass

from clockwork_hooks.macs import Kind

__all__ = ["MacsRow", "OperatorMacs", "Uncounted"]


@dataclass(frozen=True, slots=True)
class OperatorMacs:
    """One operator of a full pass that multiplies and accumulates.

    Attributes:
        operator: "conv2d", "linear", "scaled_dot_product_attention", ...
        kind: what it is to the count.
        module: dotted path of the module it ran in; "" for the UNet itself.
        resolution: spatial shape of the level it works at; () before the first spatial operator (time embedding).
        macs: its MACs, all samples of the traced batch together.
        skipped: an adaptor pass does not run it.
    """

    operator: str
    kind: Kind
    module: str
    resolution: tuple[int, ...]
    macs: int
    skipped: bool


@dataclass(frozen=True, slots=True)
class Uncounted:
    """An operator that may multiply and accumulate, and that nothing here can count.

    Attributes:
        operator: its name.
        calls: how often it ran.
        modules: paths of the modules it ran in.
    """

    operator: str
    calls: int
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MacsRow:
    """One row of a view: a module, an operator or a level.

    Attributes:
        name: what the row sums up.
        full_macs: MACs in a full pass.
        adaptor_pass_macs: those that an adaptor pass runs too, without the adaptor's own; None without a region.
        operators: how many counted operators it sums up.
    """

    name: str
    full_macs: int
    adaptor_pass_macs: int | None
    operators: int
