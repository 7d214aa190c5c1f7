"""`ch.trace`: the graph is faithful, whatever the model does, and nothing of the model has changed afterwards."""

import dataclasses
import subprocess
import sys
import types
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from clockwork_hooks._tree import Leaf, leaves, map_leaves
from clockwork_hooks.graph.arguments import Binder
from clockwork_hooks.graph.recorder import Recorder
from tests.bendable import Tiny, noise, proven
from tests.snapshot import snapshot
from tests.zoo.proof import same


def replay(model: nn.Module, *args: Any, **kwargs: Any) -> ch.Trace:
    """Trace, then let torch.fx run the recorded graph on the same inputs: it gives the same tensors to the bit."""
    traced = ch.trace(model, *args, **kwargs)
    traced.graph.lint()
    arguments = Binder(model.forward)(args, kwargs)
    inputs = [arguments.get(node.meta["input"]) for node in traced.nodes if "input" in node.meta]
    assert not [node for node in traced.nodes if node.meta.get("constant")]
    with torch.no_grad():
        output = fx.Interpreter(fx.GraphModule(model, traced.graph)).run(*inputs)
        expected = [leaf for _, leaf in leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    assert same(list(output), expected)
    return traced


# -- what a node and a call know ----------------------------------------------------------------------------------


def test_nodes_know_shape_dtype_path_and_call() -> None:
    traced = ch.trace(Tiny(), noise(), torch.tensor([3, 4]))
    conv = next(node for node in traced.nodes if node.meta["module"] == "body" and node.op == "call_function")
    assert conv.meta["shape"] == (2, 32, 8, 8)
    assert conv.meta["dtype"] is torch.float32
    call = traced.calls[conv.meta["call"]]
    assert (call.path, call.kind, call.ordinal, call.parent) == ("body", "Conv2d", 0, 0)
    assert call.output.node is conv
    assert call.inputs[0][0].shape == (2, 32, 8, 8)
    assert [call.path for call in traced.calls] == ["", "stem", "down", "embed", "body", "up", "head"]
    assert "conv2d" in str(traced.graph)
    assert str(traced).endswith("7 module calls, x 2×3×16×16")


def test_sample_time_and_context_are_found() -> None:
    class Text(Tiny):
        def forward(self, x: Tensor, t: Any, text: Tensor, *, extra: dict[str, Any]) -> Tensor:
            return super().forward(x, t) + text.mean() + extra["ids"].sum()

    traced = ch.trace(Text(), noise(), 3, torch.ones(2, 5, 8), extra={"ids": torch.ones(2, 6), "flag": None})
    assert (traced.sample, traced.time, traced.context) == ("x", "t", ("text", "extra.ids"))


Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Output:
    sample: Any
    aside: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    sample: Any


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, None),
    "list": lambda y: [y, 3],
    "dict": lambda y: {"sample": y, "none": None},
    "ordered": lambda y: OrderedDict(sample=y),
    "read-only": lambda y: types.MappingProxyType({"sample": y}),
    "namedtuple": lambda y: Pair(y, "text"),
    "dataclass": lambda y: Output(y, (y, {"deep": [y]})),
    "frozen": lambda y: Frozen(y),
    "structseq": lambda y: y.max(dim=1, keepdim=True),
    "size": lambda y: (y, y.shape),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_in_and_out_of_modules(name: str) -> None:
    class Packs(nn.Module):
        def forward(self, h: Tensor) -> Any:
            return STRUCTURES[name](h)

    class Unpacks(nn.Module):
        def forward(self, packed: Any) -> Tensor:
            return next(leaf for _, leaf in leaves(packed) if isinstance(leaf, Tensor))

    class Packed(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.packs, self.unpacks = Packs(), Unpacks()

        def low(self, h: Tensor, t: Any) -> Tensor:
            return super().low(self.unpacks(self.packs(h)).expand_as(h), t)

        def forward(self, x: Tensor, t: Any) -> Any:
            out = super().forward(x, t)
            return out if name == "read-only" else STRUCTURES[name](out)

    proven(Packed(), noise(), torch.tensor([3.0, 3.0]))


def test_a_leaf_is_no_container() -> None:
    @dataclasses.dataclass
    class Spec(Leaf):
        inner: Any

    spec = Spec((1, 2))
    assert list(leaves({"a": spec})) == [("a", spec)]
    assert map_leaves(lambda leaf: leaf, [spec])[0] is spec


# -- operators that write -----------------------------------------------------------------------------------------


class Fills(Tiny):
    """An output that is allocated first and filled by slices."""

    def forward(self, x: Tensor, t: Any) -> Tensor:
        out = torch.empty(2, 6, 16, 16, device=x.device)
        out[:, :3] = super().forward(x, t)
        out[:, 3:] = x
        return out


class FillsInside(Tiny):
    def join(self, h: Tensor, low: Tensor) -> Tensor:
        both = h.new_zeros(2, 16, 16, 16)
        both[:, :8] = h
        both[:, 8:] = low
        return self.head(both)


class WritesAView(Tiny):
    """The entry is written through a slice of it."""

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.stem(x)
        h[:, :3] += x
        return self.join(h, self.low(h, t))


class WritesTheBase(Tiny):
    """A view made before its base is written, and read after."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = h.clone()
        view = h[:, :4]
        h.mul_(2).add_(1)
        return super().low(h, t) + F.pad(view, (0, 0, 0, 0, 0, 4))


class WritesOut(Tiny):
    def low(self, h: Tensor, t: Any) -> Tensor:
        low, total = super().low(h, t), torch.empty_like(h)
        torch.add(low, low, out=total)
        return total.clamp_(-3, 3)


class WritesInAModule(Tiny):
    """A module writes its argument in place and returns something else."""

    class Bump(nn.Module):
        def forward(self, *, h: Tensor) -> Tensor:
            h.add_(0.5)
            return h.mean()

    def __init__(self) -> None:
        super().__init__()
        self.bump = self.Bump()

    def low(self, h: Tensor, t: Any) -> Tensor:
        low = super().low(h, t)
        return low * self.bump(h=low)


class WritesABuffer(Tiny):
    """A scratch buffer carries the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scratch", torch.zeros(2, 8, 16, 16), persistent=False)

    def low(self, h: Tensor, t: Any) -> Tensor:
        self.scratch.copy_(super().low(h, t))
        return self.up(self.body(self.down(self.scratch)))


WRITERS = [Fills, FillsInside, WritesAView, WritesTheBase, WritesOut, WritesInAModule, WritesABuffer]


@pytest.mark.parametrize("kind", WRITERS)
def test_writes_are_followed_and_replayed(kind: type[Tiny]) -> None:
    x, t = noise(), torch.tensor([3.0, 3.0])
    replay(kind(), x, t)
    proven(kind(), x, t)


def test_a_view_written_entry_is_read_whole() -> None:
    """The adaptor reads the tensor after the write, in its full shape, not the slice."""
    region = ch.find_region(WritesAView(), noise(), 3)
    assert region.entry.shape == (2, 8, 16, 16)
    assert len(region.entries) == 1
    assert [call.path for call in region.skipped] == ["down", "body", "up"]


def test_keyword_arguments_are_seen_as_they_were_before_the_call() -> None:
    class Calls(WritesInAModule):
        def forward(self, x: Tensor, t: Any) -> Tensor:
            h = self.stem(x)
            self.bump(h=h)
            return self.join(h, self.low(h, t))

    traced = ch.trace(Calls(), noise(), 3)
    bump = next(call for call in traced.calls if call.path == "bump")
    assert bump.inputs[1]["h"].node.meta["index"] < bump.first


# -- ways of calling modules --------------------------------------------------------------------------------------


class Shared(Tiny):
    """One module twice on the way, registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.body

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.up(self.again(F.silu(self.body(self.down(h) + self.time(t, h)))))


class Sliced(Tiny):
    """`blocks[1:]` is another Sequential every time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Identity(), self.down, nn.SiLU(), self.up)

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.blocks[1:](h)


class ByForward(Tiny):
    """Modules called through `.forward`: nobody sees these calls."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.up(self.body.forward(self.down.forward(h)) + self.time(t, h))


class OnTheFly(Tiny):
    """Modules that are made in forward and never registered."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        return super().low(nn.Sequential(nn.SiLU(), nn.AvgPool2d(3, 1, 1))(h), t)


class Recursive(Tiny):
    """A UNet that calls itself on the half-size image, before any other module."""

    def forward(self, x: Tensor, t: Any, depth: int = 1) -> Any:
        if depth:
            x = x + F.interpolate(self(F.avg_pool2d(x, 2), t, depth=depth - 1), scale_factor=2)
        return super().forward(x, t)


class Checkpointed(Tiny):
    def low(self, h: Tensor, t: Any) -> Tensor:
        return checkpoint(super().low, h, t, use_reentrant=False)


class Rearranged(Tiny):
    def low(self, h: Tensor, t: Any) -> Tensor:
        tokens = einops.rearrange(h, "b c h w -> b (h w) c")
        h = einops.rearrange(tokens, "b (h w) c -> b c h w", h=16)
        return super().low(einops.reduce(h, "b c h w -> b c 1 1", "mean") * h, t)


class Odd(Tiny):
    """Control flow on values, len, iteration over a tensor."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        rows = [row * len(h) for row in h]
        return super().low(torch.stack(rows) if bool(h.abs().sum() > 0) else h, t)


CALLERS = [Shared, Sliced, ByForward, OnTheFly, Recursive, Checkpointed, Rearranged, Odd]


@pytest.mark.parametrize("kind", CALLERS)
def test_ways_of_calling(kind: type[Tiny]) -> None:
    x, t = noise(), torch.tensor([3.0, 3.0])
    replay(kind(), x, t)
    proven(kind(), x, t)


def test_calls_of_a_shared_module_are_counted() -> None:
    traced = ch.trace(Shared(), noise(), 3)
    assert [(call.path, call.ordinal) for call in traced.calls if call.kind == "Conv2d"][2:4] == [
        ("body", 0),
        ("body", 1),
    ]


def test_a_recursive_call_is_a_call_of_the_root_within_the_root() -> None:
    traced = ch.trace(Recursive(), noise(), 3)
    inner = [call for call in traced.calls if call.path == "" and call.parent == 0]
    assert [(call.ordinal, call.output.shape) for call in inner] == [(1, (2, 3, 8, 8))]
    assert traced.calls[0].output.shape == (2, 3, 16, 16)
    assert traced.calls[0].first <= inner[0].first < inner[0].last < traced.calls[0].last


def test_every_key_of_a_node_is_documented() -> None:
    """`NodeMeta` is the table: what the recorder writes stands there, and what stands there is written."""
    seen: set[str] = set()
    for model, args in [(Tiny(), (noise(), 3)), (WrittenThroughAView(), (noise(), 3)), (NestedRows(), (noise(), 3))]:
        for node in ch.trace(model, *args).nodes:
            seen |= node.meta.keys()
    assert seen == ch.graph.NodeMeta.__annotations__.keys()
    assert all(f"    {key}: " in (ch.graph.NodeMeta.__doc__ or "") for key in seen)


class WrittenThroughAView(Tiny):
    scale = torch.tensor(2.0)

    def low(self, h: Tensor, t: Any) -> Tensor:
        h[:, :2] = h[:, :2] * self.scale
        return super().low(h, t)


class NestedRows(Tiny):
    def low(self, h: Tensor, t: Any) -> Tensor:
        low = super().low(h, t)
        return low + torch.nested.nested_tensor(list(low), layout=torch.jagged).to_padded_tensor(0.0)


def test_an_unregistered_module_takes_the_scope_around_it() -> None:
    traced = ch.trace(OnTheFly(), noise(), 3)
    calls = [call for call in traced.calls if call.path is None]
    assert [(call.kind, call.scope) for call in calls] == [("Sequential", ""), ("SiLU", ""), ("AvgPool2d", "")]


# -- time as a number ---------------------------------------------------------------------------------------------


class Constants(Tiny):
    """Operators with a tensor and a fill value, beside a time that is a plain number."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        h = h + torch.full_like(h, 0.5) + h.new_full((1,), 2.0)
        return super().low(h + torch.zeros_like(h).fill_(float(torch.as_tensor(t).max())), t)


@pytest.mark.parametrize("t", [7, 7.0, np.float32(7), np.int64(7), torch.tensor(7), torch.tensor([7, 7])])
def test_a_time_of_any_type_feeds_what_it_feeds(t: Any) -> None:
    model = Constants()
    traced = ch.trace(model, noise(), t)
    assert traced.time == "t"
    reached = traced.reached("t")
    assert {node.meta["module"] for node in traced.nodes if reached[node.meta["index"]]} >= {"embed", "body", "up"}
    proven(model, noise(), t)


def test_a_constant_from_outside_is_one_input_of_the_graph() -> None:
    class Scaled(Tiny):
        class Mul(nn.Module):
            def forward(self, h: Tensor, scale: Tensor) -> Tensor:
                return h * scale

        def __init__(self) -> None:
            super().__init__()
            self.mul, self.scale = self.Mul(), [torch.ones(1)]

        def low(self, h: Tensor, t: Any) -> Tensor:
            return self.mul(h, self.scale[0]) + self.up(self.body(self.down(h)))

    traced = ch.trace(Scaled(), noise(), 7)
    assert sum(bool(node.meta.get("constant")) for node in traced.nodes) == 1
    assert not [node for node in traced.nodes if "detach" in str(node.target)]


# -- modes and devices --------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_everywhere() -> None:
    x, fingerprints = noise(), set()
    model = Tiny()
    for other in (model, Tiny().half(), Tiny().bfloat16(), Tiny().to("meta")):
        like = next(other.parameters())
        for shape in ((2, 3, 16, 16), (1, 3, 32, 24), (5, 3, 40, 8)):
            y = torch.zeros(shape, dtype=like.dtype, device=like.device)
            fingerprints.add(ch.find_region(other, y, torch.zeros(shape[0], device=like.device)).fingerprint)
    for context in (
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad(),
    ):
        with context:
            fingerprints.add(ch.find_region(model, x, 3).fingerprint)
            with ch.wrap(model) as cw:
                model(x, 3)
                assert cw.region is not None
                fingerprints.add(cw.region.fingerprint)
    assert len(fingerprints) == 1
    wider = Tiny()
    wider.body = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1))
    assert ch.find_region(wider, x, 3).fingerprint in fingerprints  # the same calls are skipped
    wider.down = nn.Sequential(nn.Identity(), wider.down)
    wider.low = lambda h, t: wider.up(wider.down[1](h))  # type: ignore[method-assign]
    assert ch.find_region(wider, x, 3).fingerprint not in fingerprints


@torch.library.custom_op("clockwork_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


class Custom(Tiny):
    """An operator of one's own, without a fake kernel."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        return super().low(twice(h), t)


LIBRARY = torch.library.Library("clockwork_tests", "FRAGMENT")
LIBRARY.define("thrice(Tensor x) -> Tensor")
LIBRARY.impl("thrice", lambda x: x * 3, "CPU")


class CustomByLibrary(Tiny):
    def low(self, h: Tensor, t: Any) -> Tensor:
        return super().low(torch.ops.clockwork_tests.thrice(h), t)


@pytest.mark.parametrize("kind", [Custom, CustomByLibrary])
def test_a_custom_operator_runs_on_a_device_and_says_so_on_meta(kind: type[Tiny]) -> None:
    proven(kind(), noise(), torch.tensor([3.0, 3.0]))
    with pytest.raises(ch.TraceError, match="meta kernel") as caught:
        ch.trace(kind().to("meta"), noise().to("meta"), 3)
    assert "clockwork_tests" in str(caught.value)
    assert "register_fake" in str(caught.value)


@pytest.mark.parametrize("reads", [lambda h: float(h.sum()), torch.unique, torch.nonzero, Tensor.tolist])
def test_a_value_that_is_needed_on_meta_is_a_trace_error(reads: Callable[[Tensor], Any]) -> None:
    class Reads(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            reads(h)
            return super().low(h, t)

    with pytest.raises(ch.TraceError, match="trace on a real device"):
        ch.trace(Reads().to("meta"), noise().to("meta"), 3)
    ch.trace(Reads(), noise(), 3)


def test_other_errors_on_meta_are_the_model_s_own() -> None:
    class Looks(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            raise RuntimeError("a size that does not fit")

    with pytest.raises(RuntimeError, match="does not fit"):
        ch.trace(Looks().to("meta"), noise().to("meta"), 3)


def test_only_a_module_with_a_sample_and_all_parameters_can_be_traced() -> None:
    with pytest.raises(ch.TraceError, match=r"only an nn\.Module"):
        ch.trace(lambda x: x, noise())  # type: ignore[arg-type]
    with pytest.raises(ch.TraceError, match="has a sample"):
        ch.trace(nn.Linear(3, 3), torch.ones(2, 3))
    model = Tiny()
    model.body = nn.LazyConv2d(32, 3, 1, 1)
    with pytest.raises(ch.TraceError, match="all its parameters"):
        ch.trace(model, noise(), 3)
    model(noise(), 3)
    proven(model, noise(), torch.tensor([3.0, 3.0]))


# -- nothing is left behind ---------------------------------------------------------------------------------------


class Learns(Tiny):
    """Everything that a call can change: running statistics, a buffer, a weight, caches, a submodule, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(32), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}
        self.grown: nn.Module | None = None
        self.waves: Tensor | None = None

    def low(self, h: Tensor, t: Any) -> Tensor:
        self.calls += 1
        self.stem.weight.data.div_(self.stem.weight.norm())
        with torch.no_grad():
            self.head.weight[:1].mul_(0.5)
        if self.grown is None:
            self.grown = nn.Conv2d(8, 8, 1)
        if self.waves is None:
            self.waves = torch.linspace(0, 1, 16)
        h = h * self.cache.setdefault("scale", torch.ones(1)) + self.waves
        return self.up(self.drop(self.norm(self.body(self.down(self.grown(h))))))


def test_parameters_buffers_caches_flags_and_rng_are_what_they_were() -> None:
    model = Learns().train()
    model.body.register_forward_hook(lambda module, args, output: None)
    before, weights = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    ch.trace(model, noise(), 3)
    ch.find_region(model, noise(), 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    assert same(dict(model.state_dict()), weights)
    assert model.cache == {}


def test_a_traced_model_can_be_trained() -> None:
    """What a call makes for later (rotary tables, lazy layers) is made again outside of inference mode."""
    model = Learns().train()
    ch.find_regions(model, noise(), 3)
    model(noise(), 3).sum().backward()
    assert model.down.weight.grad is not None


def test_nothing_stays_on_after_an_error() -> None:
    class Breaks(Tiny):
        error: BaseException | None = RuntimeError("in the middle")

        def low(self, h: Tensor, t: Any) -> Tensor:
            if self.error is not None:
                raise self.error
            return super().low(h, t)

    for error in (RuntimeError("in the middle"), KeyboardInterrupt()):
        model = Breaks()
        model.error = error
        before = snapshot(model)
        with pytest.raises(type(error)):
            ch.trace(model, noise(), 3)
        assert_clean()
        assert snapshot(model) == before
        model.error = None
        assert len(ch.trace(model, noise(), 3).calls) == 7


def assert_clean() -> None:
    assert not _get_current_dispatch_mode_stack()
    assert not _has_any_global_hook()


@pytest.mark.parametrize("compiled", ["root", "body", "in place"])
@pytest.mark.parametrize("how", ["find_region", "wrap"])
def test_compiled_models_are_recorded_in_eager_and_compiled_ever_after(compiled: str, how: str) -> None:
    torch._dynamo.reset()
    runs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: (runs.append("compiled"), graph(*args))[1]

    class Box(nn.Module):  # torch.compile leaves a lone module of torch.nn alone
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).tanh()

    class Boxed(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.body = Box(self.body)

    def compiled_model() -> Tiny:
        model = Boxed()
        if compiled == "root":
            model.compile(backend=backend)
        elif compiled == "body":
            model.body.compile(backend=backend)
        else:
            model.body = torch.compile(model.body, backend=backend)
        return model

    def runs_of(model: nn.Module) -> int:
        runs.clear()
        assert torch.equal(model(x, 3), expected)
        return len(runs)

    model, other, x = compiled_model(), compiled_model(), noise()
    with torch.no_grad():
        expected, region = Boxed()(x, 3), ch.find_region(Boxed(), x, 3)
        assert runs_of(model) > 0
        before, others = runs_of(model), runs_of(other)
        called = vars(model).get("_compiled_call_impl"), vars(model.body).get("_compiled_call_impl")
        with warnings.catch_warnings():  # torch tells everybody with global hooks about OptimizedModule
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            if how == "find_region":
                runs.clear()
                first = ch.find_region(model, x, 3)
                assert first.fingerprint == region.fingerprint
                assert first.macs == region.macs
                assert runs == []
            else:
                with ch.wrap(model) as cw:
                    assert torch.equal(model(x, 3), expected)
                    assert cw.region.fingerprint == region.fingerprint
        assert (vars(model).get("_compiled_call_impl"), vars(model.body).get("_compiled_call_impl")) == called
        assert runs_of(model) == before
        assert runs_of(other) == others


def test_two_recordings_that_overlap_leave_torch_compile_as_it_was() -> None:
    model, x = Tiny(), noise()
    before = torch._dynamo.eval_frame._stance
    first, second = (Recorder(model, Binder(model.forward)((x, 3), {}), {}) for _ in range(2))
    first.start((x, 3), {}, frame=sys._getframe(), outside=True)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.start((x, 3), {}, frame=sys._getframe(), outside=True)
    first.stop()  # as in two threads: the first to begin is the first to end
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.stop()
    assert torch._dynamo.eval_frame._stance is before


def test_torch_compile_s_wrapper_is_not_in_the_paths_below_it() -> None:
    model = Tiny()
    model.body = nn.Sequential(model.body, nn.SiLU())
    plain = [call.path for call in ch.trace(model, noise(), 3).calls]
    model.body = torch.compile(model.body, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        compiled = [call.path for call in ch.trace(model, noise(), 3).calls]
    assert [path for path in compiled if path != "body._orig_mod"] == plain


# -- cost ---------------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib, resource, sys, time, torch
torch.set_num_threads(2)
import clockwork_hooks as ch
from clockwork_hooks.models import load_model
unet, args, kwargs = load_model(sys.argv[1])
start = time.perf_counter()
ch.trace(unet, *args, **kwargs)
took = time.perf_counter() - start
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = pathlib.Path("/proc/self/status")
if status.exists():  # on Linux the former begins with what the parent had at the fork
    most = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
print(took, most)
"""


@pytest.mark.parametrize(("name", "seconds"), [("sd15", 4), ("sdxl", 8)])
def test_time_and_memory_of_a_trace_on_meta(name: str, seconds: float) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, name], capture_output=True, text=True, check=True)
    took, resident = map(float, done.stdout.split())
    assert took < seconds
    assert resident < (1.5 * 1024**2 if sys.platform != "darwin" else 1.5 * 1024**3)  # KiB; bytes on macOS


@pytest.mark.parametrize("analyse", [ch.trace, ch.find_region, ch.flops_report])
def test_a_call_without_all_arguments_says_what_the_forward_takes(analyse: Any) -> None:
    with pytest.raises(ch.TraceError) as caught:
        analyse(Tiny(), noise())
    text = str(caught.value)
    assert "Tiny.forward(" in text
    assert "passed: Tensor" in text
    assert "'t'" in text
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_type_error_within_the_forward_is_the_unet_s_own() -> None:
    class Wrong(Tiny):
        def forward(self, x: Any, t: Any) -> Any:
            return super().forward(x, t) + len(t)

    with pytest.raises(TypeError, match="len"):
        ch.trace(Wrong(), noise(), 3)
