"""Import packages that name others at their top and never need them for their model."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def stand_ins(modules: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Let imports find modules with just the given attributes under these names.

    Only while the block runs: diffusers, transformers and MONAI ask later whether torchvision is there.
    """
    empty = {name: ModuleType(name) for name in modules if name not in sys.modules}
    for name, module in empty.items():
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(modules[name])
        parent, _, child = name.rpartition(".")
        if parent in empty:
            setattr(empty[parent], child, module)
    sys.modules.update(empty)
    try:
        yield
    finally:
        for name in empty:
            del sys.modules[name]


def trainers() -> contextlib.AbstractContextManager[None]:
    """Stand-ins for what the trainers of denoising-diffusion-pytorch and imagen-pytorch use, where it is not there."""
    names = ("torchvision", "torchvision.transforms", "torchvision.utils", "kornia", "kornia.augmentation")
    return stand_ins({name: {} for name in names if importlib.util.find_spec(name.partition(".")[0]) is None})
