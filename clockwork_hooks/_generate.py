"""A user's sampling code, called as generate(batch, seed) whichever of its two forms it has."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

Generate = Callable[..., Any]  # generate(batch, seed), or generate(batch)


def with_seed(generate: Generate, *, seeding: bool = True) -> Callable[[Any, int], Any]:
    """The same as a function of batch and seed.

    The seed goes to the parameter called `seed`, or to a second one without default. Torch's, numpy's and Python's
    random numbers are seeded around each call, too: code may take its noise from them alone, or what it adds in each
    step, as ancestral samplers do. Two runs of one seed then differ by what is compared, and by no noise.

    Args:
        generate: generate(batch, seed) or generate(batch), a pipeline for example.
        seeding: off where the caller has seeded more than the sampler, or wants other noise each time.

    Example:
        >>> noise = with_seed(lambda count: torch.rand(count))
        >>> torch.equal(noise(2, 7), noise(2, 7)), torch.equal(noise(2, 7), noise(2, 8))
        (True, False)
    """
    named, second = _takes(generate)

    def call(batch: Any, seed: int) -> Any:
        with seeded(seed) if seeding else contextlib.nullcontext():
            if named:
                return generate(batch, seed=seed)
            return generate(batch, seed) if second else generate(batch)

    return call


def _takes(generate: Generate) -> tuple[bool, bool]:
    """(the seed by name, the seed as the second argument)."""
    try:
        parameters = list(inspect.signature(generate).parameters.values())
    except (TypeError, ValueError):  # written in C: the documented form
        return False, True
    if any(one.name == "seed" and one.kind is not one.POSITIONAL_ONLY for one in parameters[1:]):
        return True, False
    placed = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    several = any(one.kind is one.VAR_POSITIONAL for one in parameters) and len(placed) < 2
    return False, several or (len(placed) > 1 and placed[1].default is inspect.Parameter.empty)


@contextlib.contextmanager
def seeded(*keys: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python from a seed of these keys; as they were before, afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # no context on the other GPUs
    states = random.getstate(), np.random.get_state()
    seed = seed_of(*keys)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_of(*keys: int) -> int:
    """One seed of several whole numbers, from 0."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def told_apart(value: Any) -> str:
    """Text that tells a value from others of its kind, the same in every process where it can be.

    Functions by their code, by what they enclose, and by their defaults; tensors, arrays and pictures by all of their
    values; what has a `config`, as diffusers' schedulers, by that; any other object by its `repr`.

    Example:
        >>> told_apart(lambda t: -t) == told_apart(lambda t: -t), told_apart(lambda t: -t) == told_apart(lambda t: t)
        (True, False)
    """
    return _told_apart(value, [])


def _told_apart(value: Any, within: list[Any]) -> str:
    """The same; `within` are the objects that hold it: a function may enclose itself."""
    if any(one is value for one in within):
        return "itself"
    within = [*within, value]

    def several(values: Any) -> str:
        return ", ".join(_told_apart(one, within) for one in values)

    if isinstance(value, functools.partial):
        return f"partial({several([value.func, value.args, value.keywords])})"
    if isinstance(value, types.MethodType):
        return _told_apart(value.__func__, within)
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        known = [one for one in cells if isinstance(one, _KNOWN)]  # a UNet, a list of results: these are no settings
        return f"{value.__qualname__}({several([value.__code__, known, value.__defaults__, value.__kwdefaults__])})"
    if isinstance(value, types.CodeType):
        return f"{value.co_code.hex()} {value.co_names} {several(value.co_consts)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {_told_apart(one, within)}' for key, one in value.items()))}}}"
    if isinstance(value, (list, tuple, set, frozenset)):
        texts = [_told_apart(one, within) for one in value]
        return f"[{', '.join(sorted(texts) if isinstance(value, (set, frozenset)) else texts)}]"
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if callable(getattr(value, "tobytes", None)):  # numpy's arrays, PIL's pictures
        form = getattr(value, "shape", None) or getattr(value, "size", None)
        return f"{type(value).__name__} {form} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(config := getattr(value, "config", None), Mapping):
        return f"{type(value).__name__} {_told_apart(config, within)}"
    return repr(value)


_KNOWN = (types.FunctionType, functools.partial, str, int, float, bool, tuple, types.NoneType)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None
