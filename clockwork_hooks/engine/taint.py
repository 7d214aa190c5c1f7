"""Placeholders that pass themselves on: what of a skipped module's output comes into what an adaptor pass returns?

Nobody may look into what stands in for a skipped output. A recorded call shows what operators did with the output at
that step: not what Python reads (`low.mean().item()`), what NumPy or a kernel without an operator reads, what the UNet
keeps for its next call, nor what it does at another step. So in every adaptor pass a placeholder is a tensor without
memory, and whatever an operator makes of one is one too. Who asks for a value of it gets an exception, also in C++.
Who writes one to memory that is real does too, unless that memory was made in this pass and is followed (fresh.py).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import nn

from clockwork_hooks._tree import address, flat, map_leaves, tensors
from clockwork_hooks.graph.recorder import OperatorMode, written_by
from clockwork_hooks.graph.tracing import FIRST_ONLY, SHAPE_ONLY

if TYPE_CHECKING:
    from typing_extensions import Self

_DEEPEST = 4
# They return what is no tensor, and look at no value. TorchScript asks for sizes through operators in inference mode.
_METADATA = frozenset(
    f"aten::{name}"
    for name in (
        *("size", "dim", "numel", "is_floating_point", "is_complex"),
        *("is_same_size", "is_pinned", "_has_compatible_shallow_copy_type"),
    )
)
_SELECTS = frozenset({"aten::index", "aten::masked_select"})  # the shape follows from the values of what selects
_COMPOSITE = "CompositeImplicitAutograd"
_STATISTICS, _TRAINS = {"running_mean", "running_var"}, {"training", "train", "use_input_stats"}


class SkippedValueError(RuntimeError):
    """Code asks for a value of what an adaptor pass has skipped; the pass is run again in full."""


class Reads(OperatorMode):
    """Sees whether an operator takes one tensor: the exit that an adaptor pass gives.

    A UNet may read another one, where a skipped call would have left it: in another module's attribute, for example.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storage: Any = None
        self._read = False

    def wait_for(self, exit: torch.Tensor) -> None:
        """From here on: is this read, whose memory nothing else has?"""
        self._storage = exit.untyped_storage()

    def missed(self, output: Any) -> bool:
        """Was one given, and nobody has read it, nor is it in the output?"""
        return self._storage is not None and not (self._read or self._among(output))

    def _among(self, values: Any) -> bool:
        plain = (tensor for tensor in tensors(values) if is_dense(tensor) and not isinstance(tensor, Tainted))
        return any(address(tensor.untyped_storage()) == address(self._storage) for tensor in plain)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._storage is not None and not self._read:
            self._read = self._among((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Taint:
    """Follows the placeholders of one pass, within its `with` block.

    Args:
        scratch: storages that may be written to, as each call overwrites them before it reads them.

    Attributes:
        used: has something of them come where nothing of them may be?
        follows: may they be written to memory that was made in this pass?
    """

    follows = False

    def __init__(self, scratch: Collection[int] = ()) -> None:
        self.used, self.scratch = False, scratch
        self._placeholders: list[weakref.ref[Any]] = []
        self._refused: list[weakref.ref[Any]] = []  # memory that one was to be written to
        self._around: Taint | None = None

    def __enter__(self) -> Taint:
        self._around, _here.taint = _here.taint, self
        _under_way.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        _here.taint, self._around = self._around, None
        _under_way.discard(self)

    def like(self) -> Self:
        """The same for another pass."""
        return type(self)(self.scratch)

    def on(self, placeholder: torch.Tensor | TensorMetadata) -> torch.Tensor:
        """The placeholder, as one that passes itself on."""
        tainted = Tainted(placeholder)
        self.add(tainted)
        return tainted

    def add(self, own: torch.Tensor) -> None:
        """Such a tensor is of this pass: it must not outlive it."""
        # its storage lives as long as the tensor, and where another tensor's `.data` was exchanged for it, longer
        self._placeholders.append(weakref.ref(_storage(own) if _throws() else own))

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """What runs within is no part of the UNet: the adaptor."""
        return contextlib.nullcontext()

    def real(self, values: Any) -> Any:
        """The same, for those who know nothing of this pass."""
        return values

    def reaches(self, values: Any) -> bool:
        """Is any of these values made of a placeholder, or has one come where none may be?"""
        return self.used or holds_placeholder(values)

    def outlives(self, unet: nn.Module, results: Any = ()) -> bool:
        """The pass is over: does anybody hold something made of a placeholder, for the next call?

        Args:
            unet: the UNet.
            results: of the pass; they may.
        """
        if not _alive(self._placeholders):
            return False
        may = [_storage(tensor) for tensor in tensors(results) if is_dense(tensor)]
        self._placeholders = [one for one in self._placeholders if all(one() is not storage for storage in may)]
        if torch.is_grad_enabled():  # autograd holds what a checkpoint would run again; so only modules are asked
            return any(map(self.is_one, _held(unet)))
        return _alive(self._placeholders, collect=True)

    def was_refused(self, memory: torch.Tensor) -> None:
        """A placeholder was to be written to this memory, which is real."""
        if is_dense(memory):
            self._refused.append(weakref.ref(memory.untyped_storage()))

    @property
    def wrote_to_its_own(self) -> bool:
        """The pass is over: was one to be written to memory, all of which is gone with the pass?"""
        return bool(self._refused) and not _alive(self._refused, collect=True)

    def exchanged(self, unet: nn.Module) -> bool:
        """Is a placeholder's memory, which is none, that of a tensor of the UNet's? To read it crashes the process."""
        return any(self.is_one(one) and not isinstance(one, Tainted) for one in _held(unet))

    def is_one(self, tensor: torch.Tensor) -> bool:
        """Is this one of the pass's own, or one whose memory was exchanged for such a one's?"""
        if isinstance(tensor, Tainted) or not is_dense(tensor):
            return isinstance(tensor, Tainted)
        storage = tensor.untyped_storage()  # what `.data` was exchanged for
        return any(placeholder() is storage for placeholder in self._placeholders)


def _alive(references: Iterable[weakref.ref[Any]], *, collect: bool = False) -> bool:
    """Does anybody hold any of these; `collect`: also once all that nobody reaches was collected?"""
    for generation in range(3 if collect else 0):  # a function that calls itself is a cycle, and holds its variables
        if all(one() is None for one in references):
            return False
        gc.collect(generation)
    return any(one() is not None for one in references)


def _held(unet: nn.Module) -> Iterator[torch.Tensor]:
    return (one for module in unet.modules() for one in _within(dict(vars(module)), _DEEPEST))


def _within(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors in lists, tuples and dictionaries, which may hold each other."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for one in list(value.values()) if isinstance(value, dict) else value:
            yield from _within(one, depth - 1)


def is_dense(tensor: torch.Tensor) -> bool:
    """Does it lie in one piece of memory?"""
    return tensor.layout == torch.strided and not tensor.is_nested


class _Here(threading.local):
    """The pass that follows its placeholders in this thread."""

    taint: Taint | None = None


_here = _Here()
_under_way: set[Taint] = set()  # of all threads


def here() -> Taint | None:
    """The pass that follows its placeholders in this thread."""
    return _here.taint


def refuse(written: torch.Tensor | None = None) -> NoReturn:
    """Somebody asks for a value of a placeholder, or writes one to memory that is real."""
    _mark()
    if written is not None and _here.taint is not None:
        _here.taint.was_refused(written)
    raise SkippedValueError("an adaptor pass has no values of what it skips, and something asks for one")


def _mark() -> None:
    """Something of a placeholder has come where nothing of one may be."""
    # a UNet may start threads of its own, and whose they are nobody knows
    for taint in list(_under_way) if _here.taint is None else (_here.taint,):
        taint.used = True


def may_cause(error: BaseException) -> bool:
    """May a placeholder have caused an error of torch's or Python's own? Did code that holds one raise it, that is."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    values = None if traceback is None else dict(traceback.tb_frame.f_locals)
    return type(error).__module__.split(".")[0] in ("builtins", "torch") and any(
        isinstance(one, Tainted) for one in _within(values, 2)
    )


def holds_placeholder(values: Any) -> bool:
    """Is any of these values one, or made of one?"""
    return any(map(_is_placeholder, flat(values)))


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Tainted) and value.taints


class TensorMetadata(NamedTuple):
    """What is known of a placeholder: how such a tensor would lie in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorMetadata:
        """That of a tensor."""
        return cls(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.device)

    def zeros(self) -> torch.Tensor:
        """Memory that a tensor so laid out has."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        size = self.offset + last + 1 if 0 not in self.shape else 0
        memory = torch.zeros(size, dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.stride, self.offset if size else 0)


class Tainted(torch.Tensor):
    """A placeholder, or what was made of one: operators that take it return such tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: torch.Tensor | TensorMetadata) -> Tainted:
        """Args: zeros of its shape, with which operators compute; or metadata, and zeros are made once one asks."""
        like, throw = plain if isinstance(plain, TensorMetadata) else TensorMetadata.of(plain), _throws()
        if throw is None:  # it has memory then: C++ that is no operator may read zeros
            memory = plain.zeros() if isinstance(plain, TensorMetadata) else plain
            tainted: Tainted = torch.Tensor._make_subclass(cls, memory)
        else:
            tainted = torch.Tensor._make_wrapper_subclass(
                cls,
                like.shape,
                strides=like.stride,
                storage_offset=like.offset,
                dtype=like.dtype,
                layout=torch.strided,
                device=like.device,
            )
            throw(tainted)
        tainted._plain, tainted._home = plain, address(_storage(tainted))
        return tainted

    _plain: torch.Tensor | TensorMetadata
    _home: int
    taints = True  # is what an operator makes of it a placeholder?

    @property
    def plain(self) -> torch.Tensor:
        """What operators compute with."""
        if isinstance(self._plain, TensorMetadata):
            self._plain = self._plain.zeros()
        return self._plain

    def takes_placeholder(self) -> bool:
        """One is about to be written to it: may it?"""
        return True

    def lies_under(self, out: torch.Tensor) -> bool:
        """Is its memory real, and what an operator has returned a view of that?"""
        return False

    def over(self, out: torch.Tensor) -> Tainted:
        """Such a view, followed as this one is."""
        raise NotImplementedError

    def is_known_elsewhere(self) -> None:
        """Who is no operator knows the memory from now on, or may."""

    @property
    def exchanged(self) -> bool:
        """Was its memory exchanged for another tensor's, by `.data = other`? Then the plain one is not what it is."""
        return address(_storage(self)) != self._home

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse()

    # what reads values, and is no operator
    data_ptr = untyped_storage = storage = share_memory_ = _refuse
    numpy = tolist = __array__ = __dlpack__ = __deepcopy__ = __reduce_ex__ = _refuse
    __repr__ = __format__ = _refuse  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own, traits = _own((args, tuple(kwargs.values())), []), _traits(func)
        if traits.shape_only:
            return _on_plain(func, args, kwargs)
        if traits.made_of_others:
            return func.decompose(*args, **kwargs)
        if traits.reshapes:
            refuse()
        tainted = _is_placeholder(args[0]) if traits.first_only else any(one.taints for one in own)
        # nobody reads what comes of placeholders: once such a call has shown its metadata, nothing is computed
        key = _key(func, args, kwargs) if tainted and traits.pure and all(type(one) is cls for one in own) else None
        known = None if key is None else _results.get(key)
        if known is not None:
            return _made(known)
        if tainted:
            if traits.reads and not (traits.selects and not holds_placeholder((args[1:], kwargs))):
                refuse()
            for tensor in _written_by(func, args, kwargs) if traits.writes else ():
                if not _takes_placeholder(tensor):
                    refuse(tensor)
        if traits.foreign:
            for one in own:
                one.is_known_elsewhere()
        try:
            out = _on_plain(func, args, kwargs)
        except Exception:  # memory that zeros share cannot be written to, for one; and the UNet may catch it
            if tainted:
                _mark()
            raise
        if not tainted:
            return _real(out, own)
        placeholders = _tainted(out, own)
        if key is not None and all(_same(one, own) is None for one in tensors(out)):
            _remember(key, map_leaves(_metadata, out))
        return placeholders


def _throws() -> Any:
    """What has a tensor throw where C++ asks for its memory."""
    return getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)


_storage = torch.Tensor.untyped_storage


class _Traits(NamedTuple):
    """What is known of an operator: does its result depend on shapes alone, does it read values, does it write?

    One that selects reads only what follows its first argument; one that reshapes gives a tensor another shape, where
    Python sees the old one; one that is foreign may do with memory as it likes. One that is made of others reads what
    those read: autograd takes it apart, inference mode does not. One that is pure does nothing but make tensors, whose
    metadata follow from those of what it is given.
    """

    shape_only: bool
    first_only: bool
    reads: bool
    writes: bool
    selects: bool
    reshapes: bool
    foreign: bool
    made_of_others: bool
    pure: bool


@functools.cache
def _traits(func: Any) -> _Traits:
    schema, tags = getattr(func, "_schema", None), getattr(func, "tags", ())
    name = getattr(schema, "name", "")
    reads = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    if schema is not None and schema.returns:
        values = [str(one.type) for one in schema.returns if "Tensor" not in str(one.type)]
        beside = len(values) < len(schema.returns)
        sizes = func.namespace == "aten" and beside and set(values) == {"int"}  # attention returns some
        reads |= bool(values) and not sizes
    shape_only = name in SHAPE_ONLY or name in _METADATA
    writes = schema is not None and (schema.is_mutable or any(one.name in _STATISTICS for one in schema.arguments))
    reshapes, foreign = torch.Tag.inplace_view in tags, getattr(func, "namespace", "") != "aten"
    composite = schema is not None and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
    makes = schema is not None and bool(schema.returns) and all("Tensor" in str(one.type) for one in schema.returns)
    pure = makes and not (reads or writes or foreign or torch.Tag.nondeterministic_seeded in tags)
    return _Traits(shape_only, name in FIRST_ONLY, reads, writes, name in _SELECTS, reshapes, foreign, composite, pure)


def _written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that an operator writes to; of running statistics, which norms write to, no schema says so."""
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    if all(given.get(name, True) for name in _TRAINS):
        return written_by(func, args, kwargs) + tensors([given.get(name) for name in sorted(_STATISTICS)])
    return written_by(func, args, kwargs)


def _takes_placeholder(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, Tainted):
        return tensor.takes_placeholder()
    scratch = () if _here.taint is None else _here.taint.scratch
    return bool(scratch) and address(tensor.untyped_storage()) in scratch


def _own(value: Any, own: list[Tainted]) -> list[Tainted]:
    """The placeholders among an operator's arguments."""
    if isinstance(value, Tainted):
        if value.exchanged:
            refuse()
        own.append(value)
    elif type(value) in (list, tuple):
        for one in value:
            _own(one, own)
    return own


def _on_plain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns for these arguments without placeholders."""
    return func(*map(_plain, args), **{name: _plain(arg) for name, arg in kwargs.items()})


def _plain(value: Any) -> Any:
    """An operator's argument without placeholders."""
    if isinstance(value, Tainted):
        return value.plain
    return [_plain(one) for one in value] if type(value) in (list, tuple) else value


def _tainted(out: Any, own: list[Tainted]) -> Any:
    """What an operator returns, with placeholders in the place of tensors; it may return what it was given."""
    if isinstance(out, torch.Tensor):
        if not is_dense(out):  # how much such a tensor holds is a value
            refuse()
        same = _same(out, own)
        if not all(one.takes_placeholder() for one in own if one.lies_under(out)):
            refuse()
        taint = _here.taint
        return same if same is not None else Tainted(out) if taint is None else taint.on(out)
    return type(out)([_tainted(one, own) for one in out]) if type(out) in (list, tuple) else out


_results: dict[Hashable, Any] = {}  # metadata of what operators make of placeholders, in all passes
_MOST_RESULTS = 4096


def _remember(key: Hashable, metadata: Any) -> None:
    if len(_results) >= _MOST_RESULTS:
        _results.clear()
    _results[key] = metadata


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What the metadata of an operator's results follow from; None where that is not known."""
    try:
        key = (func, *map(_part, args), *((name, _part(arg)) for name, arg in kwargs.items()))
        hash(key)
    except TypeError:
        return None
    return key


def _part(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        if type(value) not in (Tainted, torch.Tensor, nn.Parameter) or not is_dense(value):
            raise TypeError
        return TensorMetadata.of(value)
    return (type(value), *(map(_part, value) if type(value) in (list, tuple) else (value,)))


def _metadata(leaf: Any) -> Any:
    return TensorMetadata.of(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _made(metadata: Any) -> Any:
    """Placeholders so laid out."""
    if isinstance(metadata, TensorMetadata):
        return Tainted(metadata) if _here.taint is None else _here.taint.on(metadata)
    return type(metadata)([_made(one) for one in metadata]) if type(metadata) in (list, tuple) else metadata


def _same(out: torch.Tensor, own: list[Tainted]) -> Tainted | None:
    """The argument that an operator returns as it is, or as it has written to it."""
    same = next((one for one in own if one.plain is out), None)
    if same is not None and same.shape != out.shape:  # the shape that Python sees stays the old one
        refuse()
    return same


def _real(out: Any, own: list[Tainted]) -> Any:
    """What an operator has made of followed memory that is real: it is followed where it is a view of that."""
    if isinstance(out, torch.Tensor):
        same = _same(out, own)
        return same if same is not None else next((one.over(out) for one in own if one.lies_under(out)), out)
    return type(out)([_real(one, own) for one in out]) if type(out) in (list, tuple) else out
