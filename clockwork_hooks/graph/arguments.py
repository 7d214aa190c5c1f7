"""The arguments of one call of the UNet: their names, their signature, and which of them is the sample or the time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clockwork_hooks._tree import attribute, leaves
from clockwork_hooks.errors import ArgumentError

# Usual names of the sample, those first that say it best: beside "x_t", an "image" is what it is conditioned on.
SAMPLE_NAMES = (
    ("sample", "x_t", "xt", "noisy", "latents", "latent"),
    ("x", "z"),
    ("noisy_sample", "noisy_latents", "noisy_image", "noisy_images", "noisy_mask", "noisy_x"),
    ("img", "image", "input", "inputs"),
)
TIME_NAMES = ("timestep", "timesteps", "time", "times", "t", "sigma", "sigmas", "noise_labels", "noise_level")
TIME_PREFIXES = ("c_noise", "timestep", "time_step", "sigma", "diffusion_step", "log_snr", "logsnr", "noise_level")


class Arguments:
    """One call's arguments by parameter name, and the signature that says which trace holds for it.

    Args:
        names: of the parameters, defaults left out; `*args` and `**kwargs` by their own names.
        passed: their values.
        ignored: says of a path that what is there does not matter to the signature, whatever it is or holds.

    Attributes:
        names, passed: the parameters and their values, in the order of the call.
        paths: dotted paths of all leaves: "sample", "added_cond_kwargs.time_ids", "args.0"; equal where signatures are.
        flat: the leaves.
        signature: hashable; equal for two calls that differ in tensor values and numbers only.
        device: of the first tensor.
    """

    __slots__ = ("device", "flat", "names", "passed", "paths", "signature")

    def __init__(
        self, names: Sequence[str], passed: Sequence[Any], ignored: Callable[[str], bool] | None = None
    ) -> None:
        paths: list[str] = []
        flat: list[Any] = []
        parts: list[Any] = []
        first: torch.device | None = None
        for name, value in zip(names, passed, strict=True):
            if ignored is not None and ignored(name):
                parts.append(name)
                paths.append(name)
                flat.append(value)
                continue
            if isinstance(value, Tensor):
                device = value.device
                parts += (name, _sizes(value) if value.is_nested else value.shape, value.dtype, device)
                first = first or device
            elif value is None or isinstance(value, (bool, str)):
                parts += (name, value)
            elif is_number(value):
                parts += (name, type(value))
            else:
                parts.append(name)
                for whole, leaf in leaves(value, name, ignored):
                    path = whole[len(name) + 1 :]
                    paths.append(whole)
                    flat.append(leaf)
                    if ignored is not None and ignored(paths[-1]):
                        parts.append(path)
                    elif isinstance(leaf, Tensor):
                        parts += (path, _sizes(leaf) if leaf.is_nested else leaf.shape, leaf.dtype, leaf.device)
                        first = first or leaf.device
                    else:
                        parts += (path, leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf))
                continue
            paths.append(name)
            flat.append(value)
        self.names, self.passed, self.device = names, passed, first
        self.paths: Sequence[str] = paths
        self.flat: Sequence[Any] = flat
        self.signature: tuple[Any, ...] = tuple(parts)

    @property
    def values(self) -> Mapping[str, Any]:
        """Parameter name → value."""
        return dict(zip(self.names, self.passed, strict=True))

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """(dotted path, leaf) of all arguments."""
        return zip(self.paths, self.flat, strict=True)

    def get(self, path: str) -> Any:
        """The leaf at a dotted path; None where it was not passed."""
        return self.flat[self.paths.index(path)] if path in self.paths else None


class Inputs(NamedTuple):
    """What the leaves of the arguments are, in all calls of one input signature.

    Attributes:
        time: which leaf the time is; None where there is none.
        conditions: which leaves tell the branch.
        paths: of those.
        unread: paths of the tensors that no operator of the recorded call has read.
        forms: may any condition be the time in another form?
        read_forms: may one that is read?
    """

    time: int | None
    conditions: tuple[int, ...]
    paths: tuple[str, ...]
    unread: tuple[str, ...] = ()
    forms: bool = True
    read_forms: bool = True


class Binder:
    """Names the arguments of a module's calls.

    Args:
        forward: of the module.
        ignored: dotted paths of what is not to matter, with all below them.
    """

    def __init__(self, forward: Callable[..., Any], ignored: Collection[str] = ()) -> None:
        self.ignored = tuple(ignored)
        parameters = parameters_of(forward)
        self._names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        self._rest = next((one.name for one in parameters if one.kind is one.VAR_POSITIONAL), None)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Name one call's arguments."""
        names = self._names[: len(args)]
        if len(names) < len(args):
            first = 0 if self._rest else len(names)
            names += [f"{self._rest or 'argument'}[{first + k}]" for k in range(len(args) - len(names))]
        ignored = self.ignores if self.ignored else None
        return Arguments((*names, *kwargs), (*args, *kwargs.values()), ignored)

    def ignores(self, path: str) -> bool:
        """Is what is at this path not to matter?"""
        return any(path == one or path.startswith(f"{one}.") for one in self.ignored)

    def needless(self, paths: Collection[str]) -> tuple[str, ...]:
        """What is ignored and is not there, in a call of these paths."""
        there = [f"{path}." for path in paths]
        return tuple(one for one in self.ignored if not any(path.startswith(f"{one}.") for path in there))


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a forward takes. Of a decorated one the names of what is inside, if it hands its arguments on by position.

    One with parameters of its own is called by these, though `functools.wraps` shows others.
    """
    try:
        own, inner = (
            list(inspect.signature(forward, follow_wrapped=follows).parameters.values()) for follows in (False, True)
        )
    except (TypeError, ValueError):
        return []
    placed = [one.name for one in own if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    hands_on = any(one.kind is one.VAR_POSITIONAL for one in own)
    alike = placed == [one.name for one in inner[: len(placed)]]
    return inner if hands_on and alike else own


def _sizes(nested: torch.Tensor) -> tuple[Any, ...]:
    """What tells nested tensors apart: the lengths of their rows, or how many positions all rows have together."""
    if nested.layout == torch.strided:
        return tuple(map(tuple, nested._nested_tensor_size().tolist()))
    return nested.size(0), nested.values().shape


def is_number(value: Any) -> bool:
    """A Python or numpy number; bool is a flag, not a number."""
    if isinstance(value, (bool, torch.Tensor)):
        return False
    return isinstance(value, (int, float)) or (hasattr(type(value), "dtype") and attribute(value, "ndim", 1) == 0)


def find_sample(arguments: Arguments, outputs: Sequence[tuple[int, ...]] = ()) -> str | None:
    """The path of the noisy input: first what has a usual name, then what is shaped like an output, then what floats.

    Of several with usual names the one whose name says most.

    Args:
        arguments: the call.
        outputs: shapes of the tensors that it returned, if known; a discrete sample (token ids) is found by them.
    """

    def rank(item: tuple[str, torch.Tensor]) -> tuple[bool, bool, bool, int]:
        path, leaf = item
        spaces = (tuple(leaf.shape[2:]), tuple(leaf.shape[1:]))
        like = any(len(shape) > 2 and shape[2:] in spaces for shape in outputs)
        named = next((k for k, names in enumerate(SAMPLE_NAMES) if path in names), None)
        floats = leaf.is_floating_point()
        return named is None or not floats, not like, not floats, named or 0

    dense = [(path, leaf) for path, leaf in arguments.leaves() if isinstance(leaf, torch.Tensor) and not leaf.is_nested]
    spatial = [(path, leaf) for path, leaf in dense if leaf.ndim >= 3]
    return min(spatial, key=rank)[0] if spatial else None


def time_candidates(arguments: Arguments, *, sample: str | None, time: str | None = None) -> tuple[str, ...]:
    """Paths of the inputs that may be the denoising time, best first; one that is named as usual stands alone.

    Args:
        arguments: the call.
        sample: path of the sample, whose batch size a time shares.
        time: the user's own choice; it must exist.

    Raises:
        ArgumentError: `time` names no argument of this call.
    """
    small = [path for path, leaf in arguments.leaves() if path != sample and _may_be_time(leaf)]
    if time is not None:
        if time not in small:
            raise ArgumentError(
                "time= names an input of the UNet that holds one number, or one per row",
                seen={"time": time, "such inputs of this call": ", ".join(small) or "none"},
                do="pass one of these names",
            )
        return (time,)
    for name in TIME_NAMES:
        if name in small:
            return (name,)
    prefixed = [path for path in small if path.startswith(TIME_PREFIXES)]
    return tuple(prefixed[:1] or small)


def has_time(arguments: Arguments, path: str, *, sample: str | None) -> bool:
    """Has the call an input of this name that may be the time?"""
    return any(name == path != sample and _may_be_time(leaf) for name, leaf in arguments.leaves())


def may_be_label(path: str, leaf: Any) -> bool:
    """An integer for each row, of whose name nothing is known: a class label, unless the graph shows a time."""
    name = path.rpartition(".")[2]
    named = name in TIME_NAMES or name.startswith(TIME_PREFIXES)
    return not named and isinstance(leaf, torch.Tensor) and not leaf.is_floating_point()


def _may_be_time(leaf: Any) -> bool:
    if isinstance(leaf, torch.Tensor):
        return not leaf.is_nested and leaf.dtype != torch.bool and leaf.numel() == (leaf.shape[0] if leaf.ndim else 1)
    return is_number(leaf)
