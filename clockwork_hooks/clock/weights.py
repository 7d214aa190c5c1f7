"""Are the UNet's weights still those of the step before?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from clockwork_hooks._tree import version

__all__ = ["Weights"]

_PARAMETERS, _LAYERS = 16, 8
_VALUES = 3  # read of each parameter
_NUMPYS = frozenset({torch.float32, torch.float16, torch.float64})
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
        marks = [mark for parameter in self._parameters for mark in parameter.marks()]
        return (adapters, *marks, *(_switches(layer) for layer in self._layers))

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
    """

    __slots__ = ("_name", "_owner")

    def __init__(self, owner: dict[str, Any], name: str) -> None:
        self._owner, self._name = owner, name

    def marks(self) -> tuple[Hashable, ...]:
        """Its counter of writes; in main memory some of its values, on a device where its memory is.

        Neither which object it is nor, in main memory, where: offloading makes a new one for each call. Nothing of it
        is held, so that memory that is let go is free.
        """
        parameter: Any = self._owner.get(self._name)
        if type(parameter) not in (nn.Parameter, torch.Tensor) or parameter.layout is not torch.strided:
            return (parameter._version if _counts(parameter) else -1,)
        if not parameter.is_cpu:
            return version(parameter), parameter.data_ptr()
        return version(parameter), _values(parameter.detach())


def _values(parameter: torch.Tensor) -> bytes:
    """A few of them, bit by bit: NaN is equal to itself. NumPy picks them in half of the time that torch takes.

    Five questions to torch are asked only of what NumPy does not read as it is: 155 → 100 µs a call of the demo model.
    """
    if parameter.dtype not in _NUMPYS or parameter.is_neg():
        if parameter.is_quantized or parameter.is_conj() or parameter.is_neg():
            parameter = parameter.dequantize() if parameter.is_quantized else parameter.resolve_conj().resolve_neg()
        parameter = parameter.view(_INTEGERS.get(parameter.element_size(), parameter.dtype))
    values = parameter.numpy()
    step = max(values.size // _VALUES, 1)
    picked: bytes = values.flat[: _VALUES * step : step].tobytes()  # no copy of the others, whatever their strides
    return picked


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
