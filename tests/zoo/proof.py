"""Prove a region by running it: what it skips returns NaN, and the output must not change by a bit.

Plain torch, independent of the package, so that it can judge the package.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields})
    if isinstance(value, tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if isinstance(value, dict):
        return type(value)({key: map_tensors(function, item) for key, item in value.items()})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of a structure, in order."""
    tensors: list[Tensor] = []
    map_tensors(lambda tensor: tensors.append(tensor) or tensor, value)
    return tensors


def same(left: Any, right: Any) -> bool:
    """Are the two structures equal, tensors to the bit (NaN equals nothing)?"""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if dataclasses.is_dataclass(left) and not isinstance(left, type):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def _poison(tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.zeros_like(tensor)
    return torch.full_like(tensor, float("nan"))


class _Calls:
    """Counts the calls of some modules; a replaced call still counts the calls that would have run inside it."""

    def __init__(self, modules: Mapping[nn.Module, set[int]]) -> None:
        self.wanted = modules
        self.counts = dict.fromkeys(modules, 0)
        self.inside: dict[tuple[nn.Module, int], dict[nn.Module, int]] = {}
        self.outputs: dict[tuple[nn.Module, int], Any] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the outputs of the wanted calls, and how many wanted calls each of them contains."""
        open_calls: list[tuple[nn.Module, int, dict[nn.Module, int]]] = []

        def enter(module: nn.Module, _args: Any) -> None:
            open_calls.append((module, self.counts[module], dict(self.counts)))
            self.counts[module] += 1

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            _, index, before = open_calls.pop()
            if index in self.wanted[module]:
                self.outputs[module, index] = map_tensors(Tensor.clone, output)
                self.inside[module, index] = {m: self.counts[m] - before[m] for m in self.counts}

        with contextlib.ExitStack() as stack:
            for module in self.wanted:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield

    @contextlib.contextmanager
    def replaced(self, answers: Mapping[tuple[nn.Module, int], Any]) -> Iterator[None]:
        """Answer the given calls without running them."""
        self.counts = dict.fromkeys(self.wanted, 0)

        def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                call = (module, self.counts[module])
                if call not in answers:
                    self.counts[module] += 1
                    return forward(*args, **kwargs)
                for inner, count in self.inside[call].items():
                    self.counts[inner] += count
                return answers[call]

            return run

        before = {module: vars(module).get("forward") for module in self.wanted}
        try:
            for module in self.wanted:
                vars(module)["forward"] = stand_in(module, module.forward)
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*map_tensors(Tensor.clone, args), **map_tensors(Tensor.clone, dict(kwargs)))


class Prover:
    """One plain run of a model, with the outputs of the named calls; each question costs one more run, of what is left.

    Args:
        model: the UNet; left as it was.
        args: positional arguments of the call; cloned for each run.
        kwargs: keyword arguments of the call; cloned for each run.
        named: dotted paths of all modules that `holds` will be asked about, each with the indices of its calls.

    Raises:
        ValueError: when a named call did not happen.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], named: Mapping[str, Iterable[int]]
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        wanted: dict[nn.Module, set[int]] = {}
        for path, calls in named.items():
            wanted.setdefault(model.get_submodule(path), set()).update(calls)
        self.calls = _Calls(wanted)
        with self.calls.recorded():
            self.plain = _run(model, args, kwargs)
        for module, indices in wanted.items():
            for index in indices - {seen for owner, seen in self.calls.outputs if owner is module}:
                raise ValueError(f"call {index} of a {type(module).__name__} was named and did not happen")

    def holds(self, exit_path: str, exit_call: int, skipped: Mapping[str, Iterable[int]]) -> bool:
        """Is the output bit-equal when every skipped call returns NaN and the exit call its own tensor?

        Raises:
            ValueError: when the exit's output is not one tensor.
        """
        exit_key = (self.model.get_submodule(exit_path), exit_call)
        if not isinstance(self.calls.outputs[exit_key], Tensor):
            raise ValueError(f"{exit_path} does not return one tensor")
        keys = [(self.model.get_submodule(path), call) for path, calls in skipped.items() for call in calls]
        answers = {key: map_tensors(_poison, self.calls.outputs[key]) for key in keys}
        answers[exit_key] = self.calls.outputs[exit_key]
        with self.calls.replaced(answers):
            return same(self.plain, _run(self.model, self.args, self.kwargs))


def nan_proof(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    exit_path: str,
    exit_call: int,
    skipped: Mapping[str, Iterable[int]],
) -> bool:
    """`Prover` for one question: the exit is `exit_path`'s call `exit_call`, the calls of `skipped` return NaN."""
    named = {path: set(calls) for path, calls in skipped.items()}
    named.setdefault(exit_path, set()).add(exit_call)
    return Prover(model, args, kwargs, named).holds(exit_path, exit_call, skipped)
