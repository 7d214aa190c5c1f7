"""Are the UNet's weights still those of the step before? By counters and switches: no value of a weight is read."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn

from clockwork_hooks._tree import version

__all__ = ["Weights"]

_PARAMETERS, _LAYERS = 16, 8
_VERSION = operator.attrgetter("_version")


class Weights:
    """Watches parameters and PEFT's layers, some of each where there are many: what changes weights changes many.

    Noticed: whatever is written to parameters (`load_state_dict`, an optimizer, an average of weights), and adapters
    of PEFT that are loaded, switched, scaled, fused or taken off. Writes through `.data` leave no mark.

    Args:
        unet: the UNet.

    Example:
        >>> unet = nn.Conv2d(1, 1, 1)
        >>> weights = Weights(unet)
        >>> before = weights.state()
        >>> _ = unet.load_state_dict(unet.state_dict())
        >>> weights.state() == before
        False
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._trajectory, self._written = 0, -1
        self._adapters: tuple[str, ...] | None = None
        self._owners: Sequence[tuple[dict[str, Any], str]] = ()
        self._held: tuple[list[dict[str, Any]], list[str]] = [], []
        self._layers: Sequence[Any] = ()

    def since(self, trajectory: int) -> tuple[Hashable, ...]:
        """The state, with the counters as they were last read in this trajectory: they only grow, switches go back."""
        return self._state() if trajectory and trajectory == self._trajectory else self.state(trajectory)

    def state(self, trajectory: int = 0) -> tuple[Hashable, ...]:
        """Equal for two calls between which no weight has changed; `trajectory` is for `since`."""
        self._trajectory, self._written = trajectory, -1
        return self._state()

    def _state(self) -> tuple[Hashable, ...]:
        adapters = tuple(vars(self._unet).get("peft_config") or ())
        if adapters != self._adapters:
            self._adapters, self._written = adapters, -1
            self._look()
        if self._written < 0:
            self._written = self._counted()
        return (adapters, self._written, *(_switches(layer) for layer in self._layers))

    def _counted(self) -> int:
        try:  # offloading exchanges the parameters: they are looked up in each call
            return sum(map(_VERSION, map(operator.getitem, *self._held)))
        except (KeyError, AttributeError, RuntimeError):  # gone, None, or made under `inference_mode`
            return sum(version(owner[name]) for owner, name in self._owners if owner.get(name) is not None)

    def _look(self) -> None:
        modules = list(self._unet.modules())
        present = ((m._parameters, name, one) for m in modules for name, one in m._parameters.items())
        owners = [(held, name) for held, name, one in present if one is not None]
        self._owners = _spread(owners, _PARAMETERS)
        self._held = [held for held, _ in self._owners], [name for _, name in self._owners]
        self._layers = _spread([one for one in modules if hasattr(one, "merged_adapters")], _LAYERS)


def _spread(found: list[Any], count: int) -> list[Any]:
    """So many of them, evenly, the last one among them."""
    return found if len(found) <= count else [found[(k + 1) * len(found) // count - 1] for k in range(count)]


def _switches(layer: Any) -> tuple[Hashable, ...]:
    """Of a layer that PEFT has put around one of the UNet's: which adapters are on, how strong, fused or not."""
    active = layer._active_adapter
    return (
        layer._disable_adapters,
        active if isinstance(active, str) else tuple(active),
        tuple(layer.merged_adapters),
        tuple(getattr(layer, "scaling", {}).values()),
    )
