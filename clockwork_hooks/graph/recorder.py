"""Records one call of a module as nodes of a `torch.fx.Graph`, while the call runs.

Two observers work together: a `TorchDispatchMode` sees every operator with its real tensors, and global module hooks
see where each module call (`ModuleCall`) begins and ends. Nothing of the module is touched, and no activation is kept
alive but a few that may turn out to be the region's exit (`LikelyExits`): which node a tensor is, `Bindings` knows by
weak references and storages. Compiled code runs in eager meanwhile: what it fuses could not be seen, and under a
dispatch mode torch.compile would give up on it for good.
"""

from __future__ import annotations

import contextlib
import gc
import math
import operator
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode  # public, though its module's name is not

from clockwork_hooks._tree import Leaf, address, flat, held, is_changeable, map_leaves, tensors
from clockwork_hooks.graph.arguments import Arguments, find_sample, is_number
from clockwork_hooks.graph.operators import is_spatial, qualified_name

if TYPE_CHECKING:
    from typing_extensions import Self

_ALIAS = torch.ops.aten.alias.default
_BLANK = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
_PLAIN = (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Collect no garbage in the block: what a recording makes stays, and so much of it asks for a look at all objects.

    A first call takes 232 ms in the place of 537 where a process has imported diffusers and transformers (SD v1.5's
    structure, a tenth as wide; CPU time, medians in turns: `-k collections` of benchmarks/bench_first_call.py).
    """
    collects = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if collects:
            gc.enable()


class NodeMeta(TypedDict, total=False):
    """What `node.meta` of a recorded graph holds: every key that the recorder writes, and when it does.

    Attributes:
        index: number of the node in the order in which the operators ran; `trace.nodes[index]` is the node. Always.
        call: index of the module call that the node belongs to. Always.
        module: dotted path of that call's module, "" for the root; of the nearest registered one around it. Always.
        shape: of the node's tensor; missing where there are several outputs, and where the tensor is nested.
        dtype: of the node's tensor.
        device: of the node's tensor.
        storage: number of the tensor's storage while recording; nodes with the same one share memory.
        input: path of the argument that a placeholder is: "sample", "added_cond_kwargs.time_ids".
        nested: True where the tensor's rows have different lengths.
        constant: True for a placeholder of a tensor that is no argument: it was made outside of the call.
        was: of an in-place operator, the node that the tensor was before it.
        after: nodes that must come first though they are no argument: writes through another view, a number that
            became a tensor, what code filled that nobody saw.
    """

    index: int
    call: int
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage: int
    input: str
    nested: bool
    constant: bool
    was: fx.Node
    after: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec(Leaf):
    """What stands for a tensor once it is gone: its node, shape (of a nested tensor none), dtype and device."""

    node: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def specs_in(value: object) -> list[TensorSpec]:
    """What stands for the tensors of a call's inputs or output, in order."""
    return [leaf for leaf in flat(value) if isinstance(leaf, TensorSpec)]


Put = tuple[int, int | None]  # node, and the node that made its memory, if that was there before


class Bindings:
    """The graph as it grows, and the tensors that its nodes stand for.

    Attributes:
        graph: the graph.
        nodes: its nodes by index.
        inputs: path of each tensor or number among the arguments → its placeholder.
        numbers: the numbers among the arguments, each with its placeholder.
    """

    def __init__(self, root: nn.Module, arguments: Arguments) -> None:
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.inputs: dict[str, fx.Node] = {}
        self.numbers: list[tuple[Any, fx.Node]] = []
        self._call, self._module = 0, ""
        self._tensors: dict[int, tuple[weakref.ref[torch.Tensor], fx.Node]] = {}
        self._views: dict[int, dict[tuple[Any, ...], fx.Node]] = {}
        self._shared: dict[int, set[int]] = {}
        self._storages: dict[int, Any] = {}
        self._owners: dict[int, fx.Node] = {}
        self._writes: dict[int, fx.Node] = {}
        self._blank: set[int] = set()
        self._weights = {
            id(tensor): (weakref.ref(tensor), name)
            for walk in (root.named_parameters, root.named_buffers)
            for name, tensor in walk(remove_duplicate=False)
        }
        for path, leaf in arguments.leaves():
            if id(leaf) in self._tensors:  # it comes twice: nobody sees which is read
                self.inputs[path] = self._tensors[id(leaf)][1]
            elif isinstance(leaf, torch.Tensor) or is_number(leaf):
                node = self.inputs[path] = self.add("placeholder", "".join(c if c.isalnum() else "_" for c in path))
                node.meta["input"] = path
                if isinstance(leaf, torch.Tensor):
                    self.bind(leaf, node)
                else:
                    self.numbers.append((leaf, node))

    def within(self, call: int, module: str) -> None:
        """The nodes that come belong to this module call, of a module at this dotted path."""
        self._call, self._module = call, module

    def forget(self) -> None:
        """Let go of every tensor: nothing more will be recorded."""
        self._tensors.clear()
        self._views.clear()
        self._shared.clear()
        self._storages.clear()

    def add(self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        """Append a node to the graph."""
        name = qualified_name(target).rpartition("::")[2] if op == "call_function" else target.rpartition(".")[2]
        node = self.graph.create_node(op, target, name=name)  # one that it makes up takes regular expressions: 4 µs
        if args:  # put in afterwards: `create_node` would walk them once more, a sixth of what recording takes
            node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta.update(index=len(self.nodes), call=self._call, module=self._module)
        self.nodes.append(node)
        return node

    def puts(self, values: Any, first: int) -> tuple[Put, ...]:
        """Of the tensors among these that were made or written to since the node of index `first`; adds no node."""
        puts: list[Put] = []
        for tensor in tensors(values):
            ref, node = self._tensors.get(id(tensor), (None, None))
            if ref is not None and node is not None and ref() is tensor and node.meta["index"] >= first:
                owner = self._owners.get(node.meta.get("storage", 0), node).meta["index"]
                puts.append((node.meta["index"], owner if owner < first else None))
        return tuple(puts)

    def lift(self, value: Any) -> Any:
        """The argument with nodes for tensors."""
        if type(value) in _PLAIN:  # most are: asked first, 2 of 12 ms
            return value
        if isinstance(value, torch.Tensor):
            return None if is_lazy(value) else self.node(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self.lift, value))
        if isinstance(value, dict):
            return {key: self.lift(item) for key, item in value.items()}
        return value if isinstance(value, _PLAIN) else None

    def specs(self, value: Any, before: int | None = None) -> Any:
        """The structure with a `TensorSpec` for each tensor; as before the node of index `before`, if given."""

        def spec(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or is_lazy(leaf):
                return leaf
            node = self.node(leaf) if before is None else self.earlier(leaf, before)
            return TensorSpec(node, () if leaf.is_nested else tuple(leaf.shape), leaf.dtype, leaf.device)

        return map_leaves(spec, value)

    def storage(self, tensor: torch.Tensor) -> int:
        """A number that names the tensor's storage as long as we record; 0 where it has none."""
        key = _storage(tensor)
        if key and key not in self._storages:
            self._storages[key] = held(tensor.untyped_storage())
        return key

    def bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """From here on the tensor is this node's."""
        describe(node, tensor)
        self._tensors[id(tensor)] = (weakref.ref(tensor), node)
        if storage := self.storage(tensor):
            self._views.setdefault(storage, {})[_view(tensor)] = node
            self._shared.setdefault(storage, set()).add(id(tensor))
            node.meta["storage"] = storage
            self._owners.setdefault(storage, node)
            if node.op == "call_function" and getattr(node.target, "_schema", node).name in _BLANK:
                self._blank.add(storage)

    def write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """An in-place operator: its node is what the tensor is from now on; other views become nodes of their own."""
        node.meta["was"] = self.node(tensor)
        storage = self.storage(tensor)
        self._blank.discard(storage)
        self._views.pop(storage, None)
        shared = self._shared.pop(storage, set())
        self.bind(tensor, node)
        if not storage:
            return
        self._writes[storage] = node
        for key in shared - {id(tensor)}:
            ref, before = self._tensors[key]
            other = ref()
            if other is not None and self.storage(other) == storage:
                now = self.add("call_function", _ALIAS, (before,))
                now.meta["after"] = (node,)
                self.bind(other, now)

    @property
    def any_blank(self) -> bool:
        """Is there memory that no operator seen so far has written to?"""
        return bool(self._blank)

    def blank(self, tensor: torch.Tensor) -> bool:
        """Is it memory that no operator seen so far has written to?"""
        return bool(self._blank) and self.storage(tensor) in self._blank

    def reveal(self, tensor: torch.Tensor, first: int, taken: Any) -> None:
        """Unseen code made its values, out of what its call took and all since the node of index `first`."""
        source = self.node(tensor)
        inside = {spec.node for spec in specs_in(taken)} | set(self.nodes[first:])
        now = self.add("call_function", _ALIAS, (source,))
        now.meta["after"] = tuple(sorted(inside - {source, now}, key=lambda node: int(node.meta["index"])))
        self._blank.discard(self.storage(tensor))
        self.bind(tensor, now)

    def earlier(self, tensor: torch.Tensor, before: int) -> fx.Node:
        """The node that the tensor was before the node of index `before`."""
        node = self.node(tensor)
        while node.meta["index"] >= before:
            if "was" in node.meta:
                node = node.meta["was"]
            elif node.target is _ALIAS and "after" in node.meta:
                node = node.args[0]  # type: ignore[assignment]
            else:
                break
        return node

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """Its own node, that of an equal view, a weight's, a new view of what owns its storage, or a constant."""
        entry = self._tensors.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        storage = self.storage(tensor)
        views = self._views.get(storage)
        if views is not None and (same := views.get(_view(tensor))) is not None:
            return same
        weight = self._weights.get(id(tensor))
        if weight is not None and weight[0]() is tensor:
            node = self.add("get_attr", weight[1])
        elif storage in self._owners:
            view = (self._owners[storage], tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
            node = self.add("call_function", torch.ops.aten.as_strided.default, view)
            if storage in self._writes:
                node.meta["after"] = (self._writes[storage],)
        else:
            node = self._constant(tensor)
        self.bind(tensor, node)
        return node

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor from outside the call. `torch.tensor([t])` hides an int time in one: the value links them again."""
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            node = self.add("placeholder", f"constant_{len(self.nodes)}")
        node.meta["constant"] = True
        if self.numbers and tensor.numel() == 1 and tensor.device.type == "cpu":
            value = _number(tensor)
            node.meta["after"] = tuple(source for number, source in self.numbers if number == value)
        return node


def _number(tensor: torch.Tensor) -> Any:
    """The value of a tensor of one element, read behind the recorder's back; None where torch has no way to."""
    unseen = getattr(torch._C, "_DisableTorchDispatch", None)
    if unseen is None:
        return None
    with unseen():
        return tensor.detach().item()


def describe(node: fx.Node, tensor: torch.Tensor) -> None:
    """Write down what the node's tensor looks like."""
    meta = node.meta
    meta["dtype"], meta["device"] = tensor.dtype, tensor.device
    if tensor.is_nested:
        meta["nested"] = True
    else:
        meta["shape"] = tuple(tensor.shape)


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells the views of one storage apart."""
    try:
        return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    except (NotImplementedError, RuntimeError):
        return ()


@dataclass(slots=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        index: number of the call in the trace; 0 is the root's.
        path: dotted path of the module under the root ("" for the root), None for a module that is not registered.
        scope: the path, or that of the nearest registered module around.
        kind: class name.
        ordinal: how many calls of the same module came before.
        parent: index of the enclosing call, -1 for the root.
        first, last: the call's nodes are those with first <= index < last.
        inputs: the arguments, (args, kwargs), with every tensor replaced by its `TensorSpec`.
        output: what the call returned, likewise.
        same: which of the arguments is a container that the call has returned, perhaps with other contents.
        puts: (node, what its memory was made by) of each tensor that the call has put into another argument, where
            whoever called it may find it; of memory that was there before, its node, else None.
        keeps: the same of its module's attributes.
    """

    index: int
    path: str | None
    scope: str
    kind: str
    ordinal: int
    parent: int
    first: int
    last: int = -1
    inputs: Any = ((), {})
    output: Any = None
    same: int | None = None
    puts: tuple[Put, ...] = ()
    keeps: tuple[Put, ...] = ()
    module: int = field(default=0, repr=False)


_FACTORIES = (
    torch.ops.aten.full.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.scalar_tensor.default,
    torch.ops.aten.fill_.Scalar,
)


class _Eager:
    """Has torch.compile run everything in eager while any recorder is on, in whatever thread.

    Under a dispatch mode it skips what it is asked to compile, and skips it ever after, in every model. torch has one
    stance for all threads: the first recorder sets it, and the last one sets it back. A recorder that an interrupt has
    kept from leaving counts until it is gone; one that leaves twice, or never came, changes nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recorders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._stance: Any = None

    def enter(self, recorder: object) -> None:
        with self._lock:
            self._recorders.add(recorder)
            if self._stance is None and "torch._dynamo" in sys.modules:  # else nothing is compiled, and it loads slowly
                with contextlib.suppress(RuntimeError):  # refused while something is compiled around the call
                    self._stance = torch.compiler.set_stance("force_eager")

    def leave(self, recorder: object) -> None:
        with self._lock:
            self._recorders.discard(recorder)
            if not self._recorders and self._stance is not None:
                stance, self._stance = self._stance, None
                stance.__exit__(None, None, None)


eager = _Eager()


class OperatorMode(TorchDispatchMode):
    """Sees every operator that runs within its block; what is compiled runs in eager there, as it would not be seen."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        eager.enter(self)
        # torch's own way notes for the whole process that a mode is on, for the guards of what is compiled; where those
        # of two threads overlap, the note stays for ever
        if hasattr(dispatch, "_push_mode"):
            dispatch._push_mode(self)
        else:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        if hasattr(dispatch, "_push_mode"):
            dispatch._pop_mode()
        else:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        eager.leave(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled within. Else torch loads its compiler with the first operator, which takes 1.7 s."""
        return False


class Recorder(OperatorMode):
    """Records between `start()` and `stop()`; both are called in the thread that calls the module."""

    def __init__(self, root: nn.Module, arguments: Arguments, paths: Mapping[int, str]) -> None:
        super().__init__()
        self.bindings = Bindings(root, arguments)
        self.calls: list[ModuleCall] = []
        self.likely: LikelyExits | None = None
        self.saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._root = root
        self._paths = paths
        self._stack: list[ModuleCall] = []
        self._ordinals: dict[int, int] = {}
        self._owned: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._frame: FrameType | None = None
        self._thread = -1
        self._caller = threading.current_thread()
        self._outside = False
        self._arguments = arguments

    # -- begin and end -------------------------------------------------------------------------------------------

    def start(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        frame: FrameType,
        keep: bool = False,
        exits: tuple[frozenset[str], ...] = (),
        outside: bool = False,
        save: bool = False,
    ) -> None:
        """Begin; the root's call is open from here on.

        Args:
            args, kwargs: the root's arguments.
            frame: the one that runs the root's call; once it is off the stack, recording was abandoned.
            keep: keep a few likely exits of a region alive (`likely_exits`).
            exits: sets of paths of modules; what the last call of each set returns is kept alive too.
            outside: the root is yet to be called; else one of its own pre-hooks is what calls us.
            save: keep a copy of every parameter that the call writes to (`saved`).
        """
        self._outside = outside
        self._owned = _owners(self._root) if save else {}
        self._thread, self._caller = threading.get_ident(), threading.current_thread()
        self._frame = frame
        if keep:
            sample = find_sample(self._arguments)
            self.likely = LikelyExits(None if sample is None else self.bindings.inputs[sample], exits)
        try:
            self._open(self._root)
            self._stack[0].inputs = self.bindings.specs((args, dict(kwargs)))
            self._handles.append(register_module_forward_pre_hook(self._before))
            self._handles.append(register_module_forward_hook(self._after, with_kwargs=True))
            self.__enter__()
        except BaseException:
            self.stop()
            raise

    def stop(self, output: Any = None) -> None:
        """End, whatever happened in between; idempotent."""
        if self._thread < 0:
            return
        try:
            self._leave()
        finally:
            eager.leave(self)  # also where an interrupt has taken this mode off the stack
            for handle in self._handles:
                handle.remove()
                # torch forgets to take this off, and warns of it ever after
                getattr(nn_module, "_global_forward_hooks_with_kwargs", {}).pop(handle.id, None)
            while self._stack:
                self._close(output if len(self._stack) == 1 else None)
            self._thread, self._frame = -1, None
            self.bindings.forget()

    def likely_exits(self, *, graph: bool = False) -> dict[int, torch.Tensor]:
        """Outputs that may be a region's exit, by the index of their nodes; afterwards none is kept alive here.

        Args:
            graph: only those that still are in autograd's graph: what was written to in place was copied out of it.
        """
        if self.likely is None:
            return {}
        tensors = self.likely.tensors()
        for index in self.likely.copied if graph else ():
            tensors.pop(index, None)
        self.likely.clear()
        return tensors

    def _leave(self) -> None:
        """Take this mode off the thread's stack, and no other: after an interrupt there may be some above it."""
        above = []
        if hasattr(dispatch, "_get_current_dispatch_mode_stack"):  # else it is the topmost one, but after an interrupt
            modes = dispatch._get_current_dispatch_mode_stack()
            if not any(mode is self for mode in modes):
                return
            while modes[-1] is not self:
                above.append(modes.pop())
                dispatch._pop_mode()
        self.__exit__(None, None, None)
        for mode in reversed(above):
            dispatch._push_mode(mode)

    def _abandoned(self) -> bool:
        """KeyboardInterrupt passes torch's always-called hooks by: has the root's frame left the stack?"""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is None

    # -- module calls --------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != self._thread:
            if not self._caller.is_alive():
                self.stop()
            return
        if self._abandoned():
            self.stop()
            return
        if self._outside and module is self._root:
            self._outside = False
            return
        self._open(module)
        self._stack[-1].inputs = (self.bindings.specs(args), {})

    def _after(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """Called with (kwargs, output); with the output alone where another thread sees us half registered."""
        if threading.get_ident() != self._thread:
            return
        if not any(call.module == id(module) for call in reversed(self._stack)):
            return
        while self._stack[-1].module != id(module):
            self._close(None)
        call = self._stack[-1]
        kwargs, output = rest
        if kwargs:
            call.inputs = (call.inputs[0], self.bindings.specs(dict(kwargs), before=call.first))
        values = [*args, *kwargs.values()]
        call.same = next((k for k, one in enumerate(values) if one is output and is_changeable(one)), None)
        call.puts = self.bindings.puts([one for k, one in enumerate(values) if k != call.same], call.first)
        if attributes := [one for one in vars(module).values() if isinstance(one, torch.Tensor)]:
            call.keeps = self.bindings.puts(attributes, call.first)
        returned = self._close(output)
        if self.likely is not None and call.path is not None:
            self.likely.returned(call.path, [(self.bindings.node(tensor), tensor) for tensor in returned])

    def _open(self, module: nn.Module) -> None:
        ordinal = self._ordinals.get(id(module), 0)
        self._ordinals[id(module)] = ordinal + 1
        path = "" if module is self._root else self._paths.get(id(module))
        parent, scope = (self._stack[-1].index, self._stack[-1].scope) if self._stack else (-1, "")
        scope = scope if path is None else path
        call = ModuleCall(
            len(self.calls), path, scope, type(module).__name__, ordinal, parent, len(self.bindings.nodes)
        )
        call.module = id(module)
        self.calls.append(call)
        self._stack.append(call)
        self.bindings.within(call.index, call.scope)

    def _close(self, output: Any) -> list[torch.Tensor]:
        """End the innermost call; the tensors that it has returned."""
        call, returned = self._stack.pop(), tensors(output)
        around = self._stack[-1] if self._stack else None
        for tensor in returned:
            node = None if is_lazy(tensor) else self.bindings.node(tensor)
            if node is not None and node.meta["index"] >= call.first and self._hidden(tensor, node):
                self.bindings.reveal(tensor, call.first, call.inputs)
        self.bindings.within(around.index if around else 0, around.scope if around else "")
        if any(tensor.is_nested for tensor in returned):
            call.path = None  # nothing can stand in for rows of different lengths: no call to skip
        call.output = self.bindings.specs(output)
        call.last = len(self.bindings.nodes)
        return returned

    def _hidden(self, tensor: torch.Tensor, node: fx.Node) -> bool:
        """Did code fill it that no dispatcher sees: a kernel of Triton, CUDA, NumPy?"""
        return bool(node.meta.get("constant")) or self.bindings.blank(tensor)

    # -- operators -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._abandoned():
            return func(*args, **kwargs)
        if func is torch.ops.higher_order.cond:  # what the branch runs is seen; of other such operators the whole is
            pred, taken, other, operands = args
            with self:
                return (taken if pred else other)(*operands)
        written = written_by(func, args, kwargs)
        # a view of blank memory (`out[:, :3] = ...`) reads nothing yet
        reads = self.bindings.any_blank and not getattr(func, "is_view", False)
        for tensor in tensors((args, kwargs)) if reads else ():
            if self.bindings.blank(tensor) and all(tensor is not other for other in written):
                self.bindings.reveal(tensor, self._stack[-1].first, self._stack[-1].inputs)
        for tensor in written if self._owned else ():
            self._save(tensor)
        if written and self.likely is not None:
            self.likely.written(written)
        out = func(*args, **kwargs)
        bindings = self.bindings
        node = bindings.add("call_function", func, bindings.lift(args), bindings.lift(kwargs))
        if bindings.numbers and func in _FACTORIES:
            numbers = [value for value in args if is_number(value)]
            node.meta["after"] = tuple(source for number, source in bindings.numbers if number in numbers)
        for tensor in written:
            bindings.write(tensor, node)
        if isinstance(out, torch.Tensor):
            if any(out is one for one in (*args, *kwargs.values())):  # contiguous, to, dropout may return self
                describe(node, out)
            else:
                bindings.bind(out, node)
        elif isinstance(out, (tuple, list)):
            for k, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    bindings.bind(item, bindings.add("call_function", operator.getitem, (node, k)))
        if self.likely is not None:
            self.likely.saw(node)
        return out

    def _save(self, tensor: torch.Tensor) -> None:
        """Copy the parameter that is about to be written to for the first time."""
        weight = self._owned.pop(self.bindings.storage(tensor), None)
        if weight is not None:
            self.saved.append((weight, weight.clone()))


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensor arguments that the operator writes to, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = []
    for k, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors(args[k] if k < len(args) else kwargs.get(argument.name))
    return written


def _owners(root: nn.Module) -> dict[int, torch.Tensor]:
    """Storage → the parameter in it, where there is one in memory."""
    return {
        address(tensor.untyped_storage()): tensor
        for tensor in root.parameters()
        if tensor.layout == torch.strided and tensor.device.type != "meta" and not is_lazy(tensor)
    }


_RECENT = 16  # module outputs that are looked for on the way to a merge, as long as somebody else holds them
_HELD = 2  # of those, the last ones are held: what is interpolated or padded before the merge is let go by the UNet
_NEAREST = 2  # of those, the ones that a merge keeps
_ALIKE = 3  # of one shape
_FAR = 24  # operators between a module's output and the merge


@dataclass(slots=True)
class _Candidate:
    """A module's output that was merged; `depth` says how low the resolutions were that it comes from."""

    tensor: torch.Tensor
    depth: int
    merge: int


class LikelyExits:
    """Which outputs of a call may turn out to be the region's exit? They are kept alive: it is known only afterwards.

    An exit is what the low resolutions leave through, so the next thing that happens to it is a *merge*: an operator
    takes it together with a tensor that went round the low resolutions. At each merge the last module outputs before
    it are kept, few of each shape. One that turns out to be passed by (an older tensor from below is used after the
    merge) leads nowhere and is let go.

    Depths count the resolutions on the way down: a node that comes from the lowest one so far has the depth of that.

    Args:
        sample: the sample's placeholder.
        named: sets of paths of modules: what the last call of each set returns is kept in any case.

    Attributes:
        copied: nodes of those that were about to be written to: what is kept is a copy without a graph of autograd.
    """

    def __init__(self, sample: fx.Node | None, named: Iterable[frozenset[str]] = ()) -> None:
        self.copied: set[int] = set()
        self._named: list[tuple[frozenset[str], dict[int, torch.Tensor]]] = [(paths, {}) for paths in named]
        self._depths: dict[fx.Node, int] = {} if sample is None else {sample: 0}
        self._lowest, self._depth = math.inf, 0
        self._recent: dict[int, weakref.ref[torch.Tensor]] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._candidates: dict[int, _Candidate] = {}

    def tensors(self) -> dict[int, torch.Tensor]:
        """What is kept, by the index of its node."""
        tensors = self._held | {index: candidate.tensor for index, candidate in self._candidates.items()}
        for _, outputs in self._named:
            tensors |= outputs
        return tensors

    def clear(self) -> None:
        """Let everything go."""
        self._named.clear()
        self._recent.clear()
        self._held.clear()
        self._candidates.clear()
        self._depths.clear()

    def saw(self, node: fx.Node) -> None:
        """An operator ran."""
        depths = {source: own for source in _sources(node) if (own := self._depth_of(source)) >= 0}
        sources, depth = list(depths), max(depths.values(), default=-1)
        positions = _positions(node) if depth >= 0 else 0
        if 0 < positions < self._lowest:
            self._lowest, self._depth = positions, self._depth + 1
            self._candidates = {n: one for n, one in self._candidates.items() if one.depth >= self._depth - 1}
        self._depths[node] = self._depth if positions == self._lowest else depth
        low = [source for source in sources if depths[source] == self._depth]
        if self._candidates:
            self._pass_by(node, sources)
        if low and len(low) < len(sources) and self._depths[node] == depth:
            for source in low:
                self._keep(source, node)

    def returned(self, path: str, outputs: list[tuple[fx.Node, torch.Tensor]]) -> None:
        """The module at this path returned these tensors."""
        for k, (paths, _) in enumerate(self._named):
            if path in paths:
                self._named[k] = paths, {node.meta["index"]: tensor for node, tensor in outputs}
        for node, tensor in outputs:
            if self._depth_of(node) == self._depth > 0:
                _put_last(self._recent, node.meta["index"], weakref.ref(tensor), most=_RECENT)
                _put_last(self._held, node.meta["index"], tensor, most=_HELD)

    def written(self, tensors: Iterable[torch.Tensor]) -> None:
        """Something is about to write to these (FreeU does): what is kept of them is kept as it is now."""
        storages = {storage for tensor in tensors if (storage := _storage(tensor))}
        for index, ref in list(self._recent.items()):
            if index not in self._held and (tensor := ref()) is not None and _storage(tensor) in storages:
                del self._recent[index]
        for index, tensor in self.tensors().items():
            if _storage(tensor) in storages:
                self._replace(index, tensor.clone())  # below autograd: the copy has no graph
                self.copied |= {index} if tensor.requires_grad else set()

    def _replace(self, index: int, tensor: torch.Tensor) -> None:
        if index in self._recent:
            self._recent[index] = weakref.ref(tensor)
        for outputs in (self._held, *(outputs for _, outputs in self._named)):
            if index in outputs:
                outputs[index] = tensor
        if index in self._candidates:
            self._candidates[index].tensor = tensor

    def _depth_of(self, node: fx.Node) -> int:
        """How low the resolutions were that the node comes from; -1 for what does not come from the sample."""
        if node not in self._depths:  # views and parts of outputs are made on demand
            self._depths[node] = max(map(self._depth_of, _sources(node)), default=-1)
        return self._depths[node]

    def _keep(self, source: fx.Node, merge: fx.Node) -> None:
        """Keep the last module outputs on the ways to this source of a merge."""
        ways, seen, reached = [source], {source}, 0
        while ways and reached < _NEAREST and len(seen) < _FAR:
            ways.sort(key=lambda node: int(node.meta["index"]))
            node = ways.pop()
            index = node.meta["index"]
            tensor = self._recent[index]() if index in self._recent else None
            if tensor is not None:
                reached += 1
                self._add(index, tensor, merge)
            more = [one for one in _sources(node) if one not in seen and self._depth_of(one) == self._depth]
            seen.update(more)
            ways += more

    def _add(self, index: int, tensor: torch.Tensor, merge: fx.Node) -> None:
        same = (one for one in self._candidates.values() if one.depth == self._depth)
        alike = sum(one.tensor.shape == tensor.shape for one in same)
        if index not in self._candidates and alike < _ALIKE:
            self._candidates[index] = _Candidate(tensor, self._depth, merge.meta["index"])

    def _pass_by(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Let candidates go that this operator passes by: it takes what is older and comes from as low.

        What it takes may be the exit instead: a residual block merges within, and adds its input after that.
        """
        now = node.meta["index"]
        for index, one in list(self._candidates.items()):
            older = [s for s in sources if s.meta["index"] < index and self._depths[s] >= one.depth]
            if older and one.merge < now:
                del self._candidates[index]
                self._keep(older[0], node)


def _put_last(recent: dict[int, Any], index: int, value: Any, *, most: int) -> None:
    recent.pop(index, None)
    recent[index] = value
    while len(recent) > most:
        del recent[next(iter(recent))]


def _sources(node: fx.Node) -> list[fx.Node]:
    after: tuple[fx.Node, ...] = node.meta.get("after", ())
    return [*node.all_input_nodes, *after]


def _positions(node: fx.Node) -> int:
    """Positions that a convolution, pooling or interpolation works at; 0 for others, and for gates of one pixel."""
    shape = node.meta.get("shape", ())
    if len(shape) < 3 or not is_spatial(node) or math.prod(shape[2:]) <= 1:
        return 0
    return math.prod(shape) // shape[1] if shape[1] else 0


def _storage(tensor: torch.Tensor) -> int:
    try:
        return 0 if tensor.is_nested else address(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return 0
