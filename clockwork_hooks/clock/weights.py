"""Are the UNet's weights still those of the step before?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from clockwork_hooks._tree import version

__all__ = ["Weights"]

_PARAMETERS, _LAYERS = 16, 8
_VALUES = 3  # read of each parameter
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Weights:
    """Watches parameters and PEFT's layers, some of each where there are many: what changes weights changes many.

    Of a parameter: the counter of in-place writes, and in main memory some of its values, as fused optimizers and
    writes through `.data` leave no other mark. On a device they are not read, which would wait for it: there it is
    where its memory is, and `cw.reset()` has to tell of such writes. And adapters of PEFT that are loaded, switched,
    scaled, fused or taken off.

    Args:
        unet: the UNet.

    Example:
        >>> unet = nn.Conv2d(1, 1, 1)
        >>> weights = Weights(unet)
        >>> before = weights.state()
        >>> _ = unet.weight.data.mul_(2)
        >>> weights.state() == before
        False
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._adapters: tuple[str, ...] | None = None
        self._parameters: Sequence[_Watched] = ()
        self._layers: Sequence[Any] = ()

    def state(self) -> tuple[Hashable, ...]:
        """Equal for two calls between which no weight has changed."""
        adapters = tuple(vars(self._unet).get("peft_config") or ())
        if adapters != self._adapters:
            self._adapters = adapters
            self._look()
        marks = [parameter.mark() for parameter in self._parameters]
        # NumPy asks nothing of torch: between two calls of a UNet 29 µs; by `torch.cat` 50, by a `tolist` of each 100
        picked = [one.picked for one in self._parameters]  # another thread's call may exchange them
        values = [value for one in picked if one is not None for value in one.tolist()]
        return (adapters, *marks, *values, *(_switches(layer) for layer in self._layers))

    def _look(self) -> None:
        modules = list(self._unet.modules())
        present = [(m._parameters, name) for m in modules for name, one in m._parameters.items() if one is not None]
        self._parameters = [_Watched(*one) for one in _spread(present, _PARAMETERS)]
        self._layers = _spread([one for one in modules if hasattr(one, "merged_adapters")], _LAYERS)


class _Watched:
    """One parameter, looked up anew in each call: offloading exchanges it.

    Args:
        owner: the `_parameters` of its module.
        name: its name in there.

    Attributes:
        picked: some of its values, bit by bit, where it lies in main memory; None elsewhere.
    """

    __slots__ = ("_address", "_name", "_owner", "picked")

    def __init__(self, owner: dict[str, Any], name: str) -> None:
        self._owner, self._name = owner, name
        self._address = 0
        self.picked: np.ndarray[Any, Any] | None = None

    def mark(self) -> Hashable:
        """Its counter of writes; on a device also where its memory is.

        Neither which object it is nor, in main memory, where: offloading makes a new one for each call.
        """
        parameter: Any = self._owner.get(self._name)
        if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.layout is not torch.strided:
            self.picked = None
            return parameter._version if _counts(parameter) else -1
        address = parameter.data_ptr()
        if self.picked is not None and self._address == address:  # a view holds its memory: nobody else's is there
            return version(parameter)
        if not parameter.is_cpu:
            self.picked = None
            return version(parameter), address
        self._address, self.picked = _pick(parameter.detach(), address)
        return version(parameter)


def _pick(values: torch.Tensor, address: int) -> tuple[int, np.ndarray[Any, Any]]:
    """(address, a view of some of the values); (0, a copy) where they lie with gaps, or are not what lies in memory."""
    step, extent = max(values.numel() // _VALUES, 1), 1
    extent += sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    if values.numel() == extent and not (values.is_quantized or values.is_conj() or values.is_neg()):
        return address, _bits(values.as_strided((min(_VALUES, extent),), (step,), values.storage_offset()))
    whole = values.dequantize() if values.is_quantized else values.resolve_conj().resolve_neg()
    return 0, _bits(whole.flatten()[::step])


def _bits(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """Integers, by which NaN is equal to itself."""
    bits: np.ndarray[Any, Any] = values.view(_INTEGERS.get(values.element_size(), values.dtype)).numpy()
    return bits


def _counts(parameter: Any) -> bool:
    """Does a subclass keep a count of writes? Not where it is not made yet, or in inference mode."""
    try:
        return isinstance(parameter._version, int)
    except (AttributeError, RuntimeError):
        return False


def _spread(values: list[Any], count: int) -> list[Any]:
    """So many of them, evenly, the last one among them."""
    return values if len(values) <= count else [values[(k + 1) * len(values) // count - 1] for k in range(count)]


def _switches(layer: Any) -> tuple[Hashable, ...]:
    """Of a layer that PEFT has put around one of the UNet's: which adapters are on, how strong, fused or not."""
    active = layer._active_adapter
    return (
        layer._disable_adapters,
        active if isinstance(active, str) else tuple(active),
        tuple(layer.merged_adapters),
        tuple(getattr(layer, "scaling", {}).values()),
    )
