"""A user's sampling code, called as generate(batch, seed) whichever of its two forms it has."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
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
