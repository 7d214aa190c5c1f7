"""What stands in for the region on an adaptor pass: the signature, the identity, and the paper's learned kinds.

The learned ones come with huggingface_hub, so they are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clockwork_hooks.adaptors.stand_in import Adaptor, AdaptorInputs, IdentityAdaptor

if TYPE_CHECKING:
    from clockwork_hooks.adaptors.calibrated import CalibratedAdaptor, ResidualAdaptor
    from clockwork_hooks.adaptors.learned import LearnedAdaptor, ResNetAdaptor, ScaledResNetAdaptor, UNetAdaptor

__all__ = [
    "Adaptor",
    "AdaptorInputs",
    "CalibratedAdaptor",
    "IdentityAdaptor",
    "LearnedAdaptor",
    "ResNetAdaptor",
    "ResidualAdaptor",
    "ScaledResNetAdaptor",
    "UNetAdaptor",
]

HOMES = {  # class → the module that it is imported from when it is first asked for, or loaded
    "CalibratedAdaptor": "calibrated",
    "LearnedAdaptor": "learned",
    "ResNetAdaptor": "learned",
    "ResidualAdaptor": "calibrated",
    "ScaledResNetAdaptor": "learned",
    "UNetAdaptor": "learned",
}
KINDS = {"resnet": "ResNetAdaptor", "scaled-resnet": "ScaledResNetAdaptor", "unet": "UNetAdaptor"}  # of `distill`


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
