"""`cw.compile()`: two graphs, the same numbers, and nothing compiled again."""

import copy
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from benchmarks.guided import GuidedUNet
from clockwork_hooks._tree import tensors
from clockwork_hooks.clock import reasons
from clockwork_hooks.engine import cuda_graphs
from clockwork_hooks.engine.hooks import Census
from tests.oracle import Judge
from tests.small_unet import Tiny
from tests.snapshot import snapshot
from tests.tape import FakeCuda, Tape
from tests.test_adaptive import Still
from tests.test_nested import Recursive
from tests.test_skipped_values import Saturating, added, inputs
from tests.zoo.third_party import trainers

TIMES = (900, 700, 500, 300, 200, 100)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's own, while dynamo is imported
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()  # what it has traced keeps tensors alive


def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def lucidrains_unet() -> nn.Module:
    with trainers():
        from denoising_diffusion_pytorch import Unet
    return Unet(dim=8, dim_mults=(1, 2), channels=3, attn_heads=2, attn_dim_head=4).eval()


class Case:
    """A UNet and its calls."""

    def __init__(self, make: Callable[[], nn.Module], channels: int = 3, **conditions: Tensor) -> None:
        self.make, self.channels, self.conditions = make, channels, conditions

    def call(self, unet: Any, k: int, batch: int = 2, time: Callable[[int, int], Any] | None = None) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(k)
            x = torch.randn(batch, self.channels, 16, 16)
        t = torch.full((batch,), TIMES[k]) if time is None else time(TIMES[k], batch)
        rows = {name: self.rows(name, batch) for name in self.conditions}
        return tensors(unet(x, t, **rows))[0]

    def rows(self, name: str, batch: int) -> Tensor:
        cached: dict[int, Tensor] = self.__dict__.setdefault(f"rows of {name}", {})
        return cached.setdefault(batch, self.conditions[name].expand(batch, -1, -1))


CASES = {
    "diffusers": Case(diffusers_unet, 4, encoder_hidden_states=torch.ones(1, 3, 8)),
    "guided-diffusion": Case(lambda: GuidedUNet(8, (1, 2))),
    "lucidrains": Case(lucidrains_unet),
    "tiny": Case(Tiny, 2),
}


class Halve(nn.Module):
    """An adaptor with a weight, which reads everything that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, entry: Any, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        return exit_cached * self.scale + sum(part.mean() for part in (entry, time, text) if part is not None)


def rollout(case: Case, unet: nn.Module, *, compiled: bool, adaptor: Any = None, **options: Any) -> list[Tensor]:
    with ch.wrap(unet, adaptor, clock=2) as cw, cw.trajectory():
        if compiled:
            cw.compile(backend=options.pop("backend", "eager"))
        outputs = [case.call(unet, k, **options) for k in range(len(TIMES))]
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3)
        assert dict(cw.stats.reasons) == {"first step": 1, "scheduled": 2}
    return outputs


SLOW = {"diffusers", "lucidrains"}  # seconds of dynamo each; what they need of ours, the others need too


@pytest.mark.parametrize(
    ("name", "adaptor"),
    [pytest.param(name, None, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
    + [("guided-diffusion", "module"), ("tiny", "module")],
)
def test_two_graphs_and_the_same_numbers(name: str, adaptor: str | None) -> None:
    case = CASES[name]
    unet = case.make()
    chosen = Halve() if adaptor else None
    expected = rollout(case, unet, compiled=False, adaptor=chosen)
    before = snapshot(unet)
    counters.clear()
    with ch.wrap(unet, chosen, clock=2) as cw, cw.trajectory():
        cw.compile(backend="eager")
        got = [case.call(unet, k) for k in range(len(TIMES))]
        assert counters["stats"]["unique_graphs"] == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = [case.call(unet, k) for k in range(len(TIMES))]
        assert counters["stats"]["unique_graphs"] == 2
        assert counters["graph_break"] == {}
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (6, 6)
    assert snapshot(unet) == before
    for eager, one, two in zip(expected, got, again, strict=True):
        torch.testing.assert_close(one, eager, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(two, eager, rtol=1e-5, atol=1e-5)


def test_aot_autograd_gets_the_boundary_as_input_and_output() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    case = CASES["guided-diffusion"]
    unet = case.make()
    got = rollout(case, unet, compiled=True, backend=look)
    full, adaptor = graphs
    assert sum(node.op == "call_function" for node in adaptor.graph.nodes) < len(full.graph.nodes) / 2
    outputs = [len(next(n for n in g.graph.nodes if n.op == "output").args[0]) for g in graphs]
    assert outputs[0] == 2  # output and exit
    torch.testing.assert_close(got, rollout(case, unet, compiled=False))


def test_a_new_shape_compiles_once() -> None:
    case = CASES["tiny"]
    unet = case.make()
    counters.clear()
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(backend="eager")
        for batch in (1, 2, 3, 1, 2, 3):
            for k in range(len(TIMES)):
                case.call(unet, k, batch=batch)
        assert counters["stats"]["unique_graphs"] == 2 * 3


@pytest.mark.parametrize("time", [lambda t, _: t, lambda t, _: float(t), lambda t, _: torch.tensor(t)])
def test_numbers_as_times_are_no_constants(time: Any) -> None:
    case = CASES["tiny"]
    unet = case.make()
    expected = rollout(case, unet, compiled=False, time=time)
    counters.clear()
    torch.testing.assert_close(rollout(case, unet, compiled=True, time=time), expected)
    assert counters["stats"]["unique_graphs"] == 2


def test_new_weights_and_attributes_are_seen() -> None:
    case = CASES["tiny"]
    unet = case.make()
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(backend="eager")
        old = [case.call(unet, k) for k in range(4)]
        unet.head.bias.add_(1)
        new = [case.call(unet, k) for k in range(4)]
        unet.head.weight = nn.Parameter(torch.zeros_like(unet.head.weight))
        zero = [case.call(unet, k) for k in range(4)]
    for a, b, c in zip(old, new, zero, strict=True):
        torch.testing.assert_close(b, a + 1)
        torch.testing.assert_close(c, unet.head.bias[None, :, None, None].expand_as(c))


def test_modules_are_looked_at_after_the_first_launch_of_a_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it the device would wait."""
    case, unet, events = CASES["tiny"], Tiny(), []

    def noting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return lambda *args: events.append("launch") or graph(*args)

    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(backend=noting)
        for _ in range(2):
            [case.call(unet, k) for k in range(len(TIMES))]
        holds = Census.holds
        monkeypatch.setattr(Census, "holds", lambda census, root: events.append("look") or holds(census, root))
        events.clear()
        [case.call(unet, k) for k in range(3)]
    assert events == ["launch", "look", "launch", "launch"]


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize(
    ("name", "fits"), [("body", False), ("head", False), ("head", True)], ids=["patched", "other", "like the old one"]
)
def test_nothing_is_compiled_for_modules_that_were_exchanged(name: str, fits: bool, step: int) -> None:
    """Where no graph fits, the call is full and the next one recorded; where one does, it runs with their weights."""
    case, unet, plain = CASES["tiny"], Tiny(), Tiny()
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(backend="eager")
        for _ in range(2):
            [case.call(unet, k) for k in range(len(TIMES))]
        [case.call(unet, k) for k in range(step)]
        torch.manual_seed(1)
        other = Tiny(1).get_submodule(name).requires_grad_(fits)
        setattr(unet, name, other)
        setattr(plain, name, copy.deepcopy(other))
        counters.clear()
        cw.stats.clear()
        got = case.call(unet, step)
        assert counters["stats"]["unique_graphs"] == 0
        assert cw.stats.adaptor_passes == (fits and step == 3)
        if not cw.stats.adaptor_passes:
            torch.testing.assert_close(got, case.call(plain, step), rtol=1e-5, atol=1e-5)


def test_a_compiler_that_is_switched_off() -> None:
    case, unet = CASES["tiny"], Tiny()
    expected = rollout(case, unet, compiled=False)
    counters.clear()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(rollout(case, unet, compiled=True), expected)
    assert counters["stats"]["unique_graphs"] == 0


class Meanwhile:
    """While a call runs, another thread compiles something of its own."""

    def before(self, call: Any) -> None:
        """Returns when the compiler is at work."""
        self.works, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=self.backend)(x0))
        self.thread.start()
        assert self.works.wait(60)

    def backend(self, graph: Any, inputs: Any) -> Any:
        """Takes a while; two do not compile at the same time."""
        self.works.set()
        self.done.wait(1)
        return graph

    def after(self, call: Any, outcome: Any) -> None:
        """The call is over."""
        self.done.set()
        self.thread.join()


x0 = torch.zeros(2)


def test_another_thread_compiles_meanwhile() -> None:
    """What torch says of the process says nothing of this thread: no unproved pass runs uncompiled for a graph."""
    unet, plain = Saturating(added), Saturating(added)
    (x, c), letters = inputs(), ""
    with ch.wrap(unet, clock=4) as cw, cw.trajectory(steps=8):
        cw.compile(backend="eager")
        for k in range(4):
            with cw.observed(Meanwhile()) if k == 3 else nullcontext():
                got = unet(x, torch.tensor(900 - 100 * k), c)
            letters += "F" if torch.equal(got, plain(x, torch.tensor(900 - 100 * k), c)) else "A"
        assert cw.pass_kind is None
    assert letters == "FAAF"  # the fourth call adds something of what is skipped


def test_what_cannot_be_one_graph_says_so_and_leaves_the_wrapper_alive() -> None:
    class Peeks(Tiny):
        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            return super().forward(x if float(x.sum()) > 1e9 else x * 1, t, c, **more)

    unet = Peeks()
    before = snapshot(unet)
    case = Case(Peeks, 2)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(backend="eager")
        case.call(unet, 0)
        case.call(unet, 1)
        with pytest.raises(ch.CompileError, match="one graph"):
            case.call(unet, 2)
    assert snapshot(unet) == before


def test_a_unet_that_counts_is_told_what_a_graph_is_for() -> None:
    """Each number is another graph, and dynamo has its limit."""

    class Counts(Tiny):
        calls = 0

        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            self.calls += 1
            return super().forward(x * self.calls, t, c, **more)

    unet, calls = Counts(), 0
    before = snapshot(unet)
    with ch.wrap(unet, clock=20) as cw, cw.trajectory():
        cw.compile(backend="eager")
        with pytest.raises(ch.CompileError, match=r"they may take few different values\n.*\n  graphs: 8"):  # noqa: PT012
            for calls in range(30):
                unet(torch.ones(1, 2, 8, 8), torch.tensor(900.0 - 10 * calls))
        assert unet.calls == calls  # nothing of the call that failed has run
    del unet.calls
    assert snapshot(unet) == before


def test_modes_are_checked() -> None:
    with ch.wrap(Tiny(), clock=2) as cw:
        with pytest.raises(ch.ArgumentError, match="reduce-overhead"):
            cw.compile(mode="fastest")
        with pytest.raises(ch.ArgumentError, match="CUDA device"):
            cw.compile(mode="cudagraphs")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "nope"}, "Invalid backend: 'nope'"),
        ({"options": {"nope": 1}}, "Unexpected optimization option nope"),
        ({"mode": "default", "options": {"epilogue_fusion": True}}, "Either mode or options"),
        ({"mode": "cudagraphs", "options": {"epilogue_fusion": True}}, 'pass mode="cudagraphs" without them'),
        ({"mode": "cudagraphs", "backend": "eager"}, "backend: 'eager'"),
        ({"mode": "compiled-cudagraphs", "options": {"triton.cudagraphs": True}}, 'leave "triton.cudagraphs" out'),
        ({"mode": "compiled-cudagraphs"}, "must be on a CUDA device"),
    ],
    ids=str,
)
def test_options_that_torch_refuses_are_refused_before_any_call(options: dict[str, Any], said: str) -> None:
    with ch.wrap(Tiny(), clock=2) as cw, pytest.raises(ch.ArgumentError, match=said):
        cw.compile(**options)


def test_a_filter_of_guards_stays_the_users() -> None:
    """Since torch takes it out of the options that it gets."""
    seen: list[int] = []

    def keep(guards: Any) -> list[bool]:
        seen.append(len(guards))
        return [True] * len(guards)

    case, unet, options = CASES["tiny"], Tiny(), {"guard_filter_fn": keep}
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(backend="eager", options=options)
        [case.call(unet, k) for k in range(len(TIMES))]
    assert len(seen) >= 2  # of full passes and of adaptor passes
    assert options == {"guard_filter_fn": keep}


def test_an_adaptor_whose_output_no_longer_fits_is_told() -> None:
    """It would fit where the UNet broadcasts; the first adaptor pass is not the only one that is checked."""

    class Shrinks(nn.Module):
        narrow = False

        def forward(self, entry: Any, exit_cached: Tensor, **inputs: Any) -> Tensor:
            return exit_cached[:, :1] if self.narrow else exit_cached * 1

    class Adds(Tiny):
        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            h = self.stem(x)
            return self.head(torch.cat([h, h + self.up(self.body(self.act(self.down(h))))], 1))

    unet, adaptor, case = Adds(), Shrinks(), CASES["tiny"]
    with ch.wrap(unet, adaptor, clock=2) as cw, cw.trajectory():
        cw.compile(backend="eager")
        for k in range(4):
            case.call(unet, k)
        adaptor.narrow = True
        case.call(unet, 4)
        with pytest.raises(ch.AdaptorError, match="like the region's exit"):
            case.call(unet, 5)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_through_checkpoints(training: bool) -> None:
    """Dynamo traces what is checkpointed as an operator, which may have no side effects: calls are counted in it."""

    class Saves(Tiny):
        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            h = self.stem(x)
            z = checkpoint(lambda y: self.up(self.body(self.act(self.down(y)))), h, use_reentrant=False)
            return self.head(checkpoint(lambda *both: torch.cat(both, 1).sin(), h, z, use_reentrant=False))

    grads = []
    for compiled in (False, True):
        case, unet = CASES["tiny"], Saves().train(training)
        with ch.wrap(unet, clock=2) as cw, cw.trajectory(), torch.enable_grad():
            if compiled:
                cw.compile(backend="aot_eager")
            for _ in range(2):
                unet.zero_grad()
                sum(case.call(unet, k).square().mean() for k in range(4)).backward()
        grads.append([parameter.grad for parameter in unet.parameters()])
        assert cw.stats.adaptor_passes == (0 if training else 4)
    torch.testing.assert_close(*grads)


def test_copies_are_plain() -> None:
    case = CASES["tiny"]
    unet = case.make()
    expected = case.call(unet, 0)
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(backend="eager")
        for k in range(4):
            case.call(unet, k)
        twin, thawed = copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))
    for other in (twin, thawed):
        torch.testing.assert_close(case.call(other, 0), expected)


def test_remove_in_the_middle_and_errors_restore() -> None:
    unet = Tiny()
    before = snapshot(unet)
    case = Case(Tiny, 2)
    cw = ch.wrap(unet, clock=2).compile(backend="eager")
    for k in range(5):
        case.call(unet, k)
    with pytest.raises((RuntimeError, ch.CompileError)):
        unet(torch.zeros(2, 5, 16, 16), 100)
    cw.remove()
    assert snapshot(unet) == before


@pytest.mark.parametrize("ours", [False, True], ids=["wrapped", "wrapped and compiled"])
def test_a_unet_compiled_in_place_before(ours: bool) -> None:
    """It is set aside while wrapped, so no switch compiles anything, and it is there again afterwards."""
    case, unet = CASES["tiny"], Tiny()
    expected, plain = rollout(case, unet, compiled=False), case.call(unet, 0)
    unet.compile(backend="eager")
    counters.clear()
    torch.testing.assert_close(case.call(unet, 0), plain)
    assert counters["stats"]["unique_graphs"] == 1
    before = snapshot(unet)
    torch.testing.assert_close(rollout(case, unet, compiled=ours), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(case.call(unet, 0), plain)
    assert snapshot(unet) == before
    assert counters["stats"]["unique_graphs"] == (3 if ours else 1)


# -- plain captures, on a stand-in for CUDA graphs ------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph_pool_handle", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("cpu",))
    return fake


# passes are captured as they are, or as torch.compile has made them
AS_IT_IS: dict[str, Any] = {"mode": "cudagraphs"}
AS_COMPILED: dict[str, Any] = {"mode": "compiled-cudagraphs", "backend": "eager"}
captured_as = pytest.mark.parametrize("how", [AS_IT_IS, AS_COMPILED], ids=["as it is", "as compiled"])


@pytest.mark.parametrize(
    ("name", "adaptor"), [("diffusers", None), ("guided-diffusion", None), ("diffusers", "module")]
)
def test_captured_passes_are_replayed(name: str, adaptor: str | None, cuda: FakeCuda) -> None:
    case = CASES[name]
    unet = case.make()
    chosen = Halve() if adaptor else None
    expected = rollout(case, unet, compiled=False, adaptor=chosen)
    before = snapshot(unet)
    with ch.wrap(unet, chosen, clock=2) as cw, cw.trajectory():
        cw.compile(mode="cudagraphs")
        for _ in range(2):
            got = [case.call(unet, k) for k in range(len(TIMES))]
            torch.testing.assert_close(got, expected)
        assert cuda.captures == 2
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (6, 6)
        assert dict(cw.stats.reasons) == {"first step": 2, "scheduled": 4}
        case.call(unet, 0, batch=1), case.call(unet, 1, batch=1), case.call(unet, 2, batch=1)
        assert cuda.captures == 3
    assert snapshot(unet) == before


@captured_as
def test_captured_branches_keep_their_own_exits(how: dict[str, Any], cuda: FakeCuda) -> None:
    unet = Tiny()
    conditions = torch.zeros(2, 3), torch.ones(2, 3)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        return [unet(torch.randn(2, 2, 16, 16), t, c) for t in TIMES for c in conditions]

    with ch.wrap(unet, clock=3) as cw, cw.trajectory():
        expected = run()
    with ch.wrap(unet, clock=3) as cw, cw.trajectory():
        cw.compile(**how)
        for _ in range(3):
            torch.testing.assert_close(run(), expected)
    assert cuda.captures == 2


@captured_as
def test_captured_outputs_are_the_callers_own(how: dict[str, Any], cuda: FakeCuda) -> None:
    case, unet = CASES["tiny"], Tiny()
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(**how)
        for _ in range(2):
            outputs = [case.call(unet, k) for k in range(len(TIMES))]
            copies = [output.clone() for output in outputs]
            case.call(unet, 3)
            assert all(map(torch.equal, outputs, copies))
            outputs[-1].zero_()
    assert torch.equal(case.call(unet, 0), case.call(Tiny(), 0))


@captured_as
@pytest.mark.parametrize(("clock", "copies"), [(2, [1, 0, 1, 0, 1, 0]), (3, [1, 1, 0, 1, 1, 0])])
def test_what_no_later_step_reads_is_not_copied_out_of_a_graph(
    clock: int, copies: list[int], how: dict[str, Any], cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit is, where the next step may use the adaptor."""
    unet, seen, clone = Tiny(), list[int](), Tensor.clone
    exit = torch.Size([2, 8, 8, 8])

    def counted(tensor: Tensor, **options: Any) -> Tensor:
        seen.extend([1] * (tensor.shape == exit))
        return clone(tensor, **options)

    steps = [(torch.randn(2, 2, 8, 8), t) for t in torch.arange(900.0, 300.0, -100.0)]
    with ch.wrap(unet, Halve(), clock=clock) as cw, cw.trajectory():
        cw.compile(**how)
        expected = [unet(*step) for step in steps]
        monkeypatch.setattr(Tensor, "clone", counted)
        for step, output, times in zip(steps, expected, copies, strict=True):
            seen.clear()
            assert torch.equal(unet(*step), output)
            assert len(seen) == times
        assert cw.stats.adaptor_passes == 2 * (6 - 6 // clock)


@pytest.mark.parametrize("how", ["eager", "cudagraphs", "captured as compiled"])
def test_a_rule_that_changes_its_mind_costs_a_full_pass(how: str, cuda: FakeCuda) -> None:
    """What it said no later step would read was not kept; an older exit may not take its place."""
    unet, changed = Tiny(), False
    plain = copy.deepcopy(unet)
    with ch.wrap(unet, Halve(), schedule=ch.Schedule.where(lambda step: step in (2, 4) or changed)) as cw:
        made_static(cw, how)
        for run in range(3):
            with cw.trajectory():
                for k, t in enumerate(torch.arange(900.0, 300.0, -100.0)):
                    changed, x = run == 2 and k >= 2, torch.randn(1, 2, 8, 8)
                    output = unet(x, t)
                    if run == 2 and k == 2:
                        torch.testing.assert_close(output, plain(x, t))
            assert cw.stats.reasons[reasons.NOT_KEPT] == (run == 2)
        assert cw.stats.adaptor_passes == 2 + 2 + 4


@captured_as
@pytest.mark.parametrize("time", [lambda t, _: t, lambda t, _: float(t), lambda t, _: torch.tensor(t)])
def test_captured_times_are_inputs(time: Any, how: dict[str, Any], cuda: FakeCuda) -> None:
    case, unet = CASES["tiny"], Tiny()
    expected = rollout(case, unet, compiled=False, time=time)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(**how)
        for _ in range(2):
            torch.testing.assert_close([case.call(unet, k, time=time) for k in range(len(TIMES))], expected)
    assert cuda.captures == 2


def _swap_weight(unet: Tiny) -> None:
    unet.head.weight = nn.Parameter(torch.zeros_like(unet.head.weight))


def _move_weight(unet: Tiny) -> None:
    unet.head.weight.data = unet.head.weight.data * 2


def _swap_module(unet: Tiny) -> None:
    unet.head = nn.Sequential(unet.head, nn.Tanh())


def _add_hook(unet: Tiny) -> None:
    unet.stem.register_forward_hook(lambda module, args, output: output * 2)


def _in_place(unet: Tiny) -> None:
    unet.head.bias.add_(1)


@captured_as
@pytest.mark.parametrize("change", [_swap_weight, _move_weight, _swap_module, _add_hook, _in_place])
def test_a_capture_follows_what_changes_between_trajectories(
    change: Callable[[Tiny], None], how: dict[str, Any], cuda: FakeCuda
) -> None:
    case, unet, plain = CASES["tiny"], Tiny(), Tiny()
    change(plain)
    expected = rollout(case, plain, compiled=False)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(**how)
        for _ in range(2):
            [case.call(unet, k) for k in range(len(TIMES))]
        change(unet)
        torch.testing.assert_close([case.call(unet, k) for k in range(len(TIMES))], expected)
    assert (cuda.captures > 2) == (change is not _in_place)


class _Strength:
    """An object of nobody's, as attention processors are."""

    factor = 1.0

    def __init__(self) -> None:
        self.levels = [[1.0]]


@dataclass(slots=True)
class _Slotted:
    value: float = 1.0


class Objects(Tiny):
    """What it computes with lies within objects and containers; it counts its calls in a tensor that is no buffer."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.options = SimpleNamespace(scale=1.0, more={"gains": (1.0, [1.0])})
        self.strength, self.slotted = _Strength(), _Slotted()
        self.blend = partial(torch.mul, other=self.slotted)
        self.plain = [torch.ones(())]
        self.calls = torch.zeros(())
        self.noted = ()

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        self.calls.add_(1)
        gain = self.options.scale * self.options.more["gains"][0] * self.strength.levels[0][0] * self.strength.factor
        x = x * gain * self.blend.keywords["other"].value * self.factor * self.plain[0] + self.calls / 10
        return super().forward(x, t, c, **more)


def _namespace(unet: Any) -> None:
    unet.options.scale = 2.0


def _within_tuples(unet: Any) -> None:
    unet.options.more["gains"] = (2.0, *unet.options.more["gains"][1:])


def _list_of_lists(unet: Any) -> None:
    unet.strength.levels[0][0] = 2.0


def _of_an_object(unet: Any) -> None:
    unet.strength.factor = 2.0


def _of_a_class(unet: Any) -> None:
    class Twice(Objects):
        factor = 2.0

    unet.__class__ = Twice


def _slot(unet: Any) -> None:
    unet.slotted.value = 2.0


def _nothing(unet: Any) -> None:
    """Equal numbers are the same, whoever wrote them: tomesd notes the sample's size at every call."""
    unet.strength.factor, unet.noted = float("1"), (len("16"), float("16"))


@captured_as
@torch._dynamo.config.patch(specialize_float=True)  # else it reads one that changes off the CPU: for the tape, a device
@pytest.mark.parametrize(
    "change", [_namespace, _within_tuples, _list_of_lists, _of_an_object, _of_a_class, _slot, _nothing]
)
def test_a_capture_sees_what_lies_within_objects(
    change: Callable[[Any], None], how: dict[str, Any], cuda: FakeCuda
) -> None:
    case, unet, plain = CASES["tiny"], Objects(), Objects()
    with ch.wrap(plain, clock=2) as eager, ch.wrap(unet, clock=2) as cw:
        cw.compile(**how)
        _nothing(unet)
        for run in range(3):
            with eager.trajectory(), cw.trajectory():
                if run == 2:
                    captures = cuda.captures
                    change(plain), change(unet)
                for k in range(len(TIMES)):
                    torch.testing.assert_close(case.call(unet, k), case.call(plain, k))
    assert captures == 2
    assert cuda.captures == captures or change is not _nothing


def _widen(unet: Tiny) -> None:
    unet.head = nn.Sequential(unet.head, nn.Conv2d(unet.head.out_channels, unet.head.out_channels, 3, padding=1))


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@pytest.mark.parametrize("moves", [0, 10], ids=["captured", "as they are, for weights that move"])
def test_modules_exchanged_between_captured_trajectories_are_counted_anew(moves: int, cuda: FakeCuda) -> None:
    """The first pass after it is launched before anybody asks; what is counted of it and of later ones is right."""
    case, unet, plain = CASES["tiny"], Tiny(), Tiny()
    torch.manual_seed(0)
    _widen(plain)
    with ch.wrap(plain, clock=1) as cw:
        case.call(plain, 0)
        macs = cw.stats.macs_plain
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(mode="cudagraphs")
        for _ in range(2 + moves):
            [case.call(unet, k) for k in range(len(TIMES))]
            unet.head.weight.data = unet.head.weight.data.clone() if moves else unet.head.weight.data
        torch.manual_seed(0)
        _widen(unet)
        for first in (True, False):
            cw.stats.clear()
            outputs = [case.call(unet, k) for k in range(len(TIMES))]
            assert cw.stats.macs_plain == len(TIMES) * macs or (first and moves)
        torch.testing.assert_close(outputs, rollout(case, plain, compiled=False))


def test_the_device_has_work_while_modules_are_looked_at(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trajectory's look comes after its first launch; weights that have moved are found before it."""
    case, unet, events = CASES["tiny"], Tiny(), []
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(mode="cudagraphs")
        for _ in range(2):
            [case.call(unet, k) for k in range(len(TIMES))]
        look, replay = cuda_graphs.Captured._look, cuda.CUDAGraph.replay
        monkeypatch.setattr(cuda_graphs.Captured, "_look", lambda self: events.append("look") or look(self))
        monkeypatch.setattr(cuda.CUDAGraph, "replay", lambda tape: events.append("launch") or replay(tape))
        vars(unet)["_modules"] = _Noting(unet._modules, events)
        [case.call(unet, k) for k in range(len(TIMES))]  # another dictionary: the passes are captured anew
        events.clear()
        [case.call(unet, k) for k in range(3)]
        assert [event for event in events if event != "walk"] == ["launch", "look", "launch", "launch"]
        assert events[0] == "launch"
        assert "walk" in events
        events.clear()
        _move_weight(unet)
        case.call(unet, 0)
        assert [e for e in events if e != "walk"] == ["look", "look", "launch"]  # at once, and as in every first step


class _Noting(dict[str, Any]):
    """A module's children, which notes who walks through them."""

    def __init__(self, children: Any, events: list[str]) -> None:
        super().__init__(children)
        self.events = events

    def values(self) -> Any:
        self.events.append("walk")
        return super().values()


@pytest.mark.parametrize("resets", [True, False], ids=["storages tell", "storages do not tell"])
@pytest.mark.parametrize("holds", [True, False], ids=["old memory kept", "old memory freed"])
def test_weights_that_move_within_a_trajectory(
    holds: bool, resets: bool, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed memory is noticed before a launch, moved weights after it at the latest; nothing old is returned."""
    case, unet, plain, events = CASES["tiny"], Tiny(), Tiny(), []
    expected = []
    with ch.wrap(plain, clock=2):
        for k in range(4):
            if k == 2:
                _move_weight(plain)
            expected.append(case.call(plain, k))
    if not resets:
        dies = SimpleNamespace(ref=lambda one, freed=None: freed(one) if freed else weakref.ref(one))
        monkeypatch.setattr(
            cuda_graphs, "weakref", dies
        )  # as where a storage's Python object does not outlive its name
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(mode="cudagraphs")
        for _ in range(2):
            [case.call(unet, k) for k in range(len(TIMES))]
        got = [case.call(unet, k) for k in range(2)]
        before = unet.head.weight.data
        _move_weight(unet)
        if not holds:
            del before
        replay = cuda.CUDAGraph.replay
        monkeypatch.setattr(cuda.CUDAGraph, "replay", lambda tape: events.append("launch") or replay(tape))
        look = cuda_graphs.Captured._look
        monkeypatch.setattr(cuda_graphs.Captured, "_look", lambda self: events.append("look") or look(self))
        got += [case.call(unet, k) for k in range(2, 4)]
    torch.testing.assert_close(got, expected)
    assert events[:2] == (["launch", "look"] if holds and resets else ["look", "launch"])


def test_weights_that_keep_moving_end_the_captures(cuda: FakeCuda) -> None:
    case, unet = CASES["tiny"], Tiny()
    expected = case.call(unet, 3)

    def move() -> None:
        for _ in range(40):
            unet.head.weight.data = unet.head.weight.data.clone()
            torch.testing.assert_close(case.call(unet, 3), expected)

    with pytest.warns(ch.NoEffectWarning, match="every pass full"):
        cw = ch.wrap(unet, schedule=()).compile(mode="cudagraphs")
    with cw, pytest.warns(ch.NoEffectWarning, match="weights move"):
        move()
    assert cuda.captures < 12


@captured_as
def test_changes_between_runs_do_not_end_the_captures(how: dict[str, Any], cuda: FakeCuda) -> None:
    """As where each picture has another scale: captured anew, a run still saves what it is captured for."""
    case, plain, unet = CASES["tiny"], Scaled(), Scaled()
    with ch.wrap(plain, clock=2) as eager, ch.wrap(unet, clock=2) as cw:
        cw.compile(**how)
        for run in range(12):
            before = cuda.captures
            with eager.trajectory(), cw.trajectory():
                for one in (plain, unet):
                    one.tanh = run % 2 == 1
                for k in range(len(TIMES)):
                    torch.testing.assert_close(case.call(unet, k), case.call(plain, k))
            assert cuda.captures > before


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize("mode", ["cudagraphs", None])
def test_a_hook_that_writes_to_the_exit(mode: str | None, cuda: FakeCuda) -> None:
    case, unet, plain = CASES["tiny"], Tiny(), Tiny()
    for one in (unet, plain):
        one.up.register_forward_hook(lambda module, args, output: output.add_(1))
    with ch.wrap(plain, clock=2) as cw, cw.trajectory():
        expected = [[case.call(plain, k) for k in range(len(TIMES))] for _ in range(3)][-1]
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(mode=mode, **({} if mode else {"backend": "eager"}))
        got = [[case.call(unet, k) for k in range(len(TIMES))] for _ in range(3)][-1]
        assert cw.stats.adaptor_passes >= 6
    torch.testing.assert_close(got, expected)


def test_gradients_are_not_captured(cuda: FakeCuda) -> None:
    case, unet = CASES["tiny"], Tiny()
    with ch.wrap(unet, clock=2) as cw, torch.enable_grad():
        cw.compile(mode="cudagraphs")
        with pytest.warns(ch.NoEffectWarning, match="no gradients"):
            outputs = [case.call(unet, k) for k in range(4)]
        assert all(output.requires_grad for output in outputs)
    assert cuda.captures == 0


def test_a_capture_that_fails_says_so(cuda: FakeCuda) -> None:
    class Peeks(Tiny):
        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            return super().forward(x if float(x.sum()) > 1e9 else x * 1, t, c, **more)

    unet, case = Peeks(), CASES["tiny"]
    before = snapshot(unet)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(mode="cudagraphs")
        case.call(unet, 0), case.call(unet, 1)
        with pytest.raises(ch.CompileError, match="must not wait"):
            case.call(unet, 2)
    assert snapshot(unet) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guided-diffusion", "diffusers"])
def test_inductor_on_the_cpu(name: str) -> None:
    case = CASES[name]
    unet = case.make()
    expected = rollout(case, unet, compiled=False)
    for one, eager in zip(rollout(case, unet, compiled=True, backend="inductor"), expected, strict=True):
        torch.testing.assert_close(one, eager, rtol=1e-5, atol=1e-5)


OUTSIDE = "within torch.compile, torch.export or torch.jit"


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize("first", [0, 3])
def test_compiled_in_place_while_wrapped(first: int) -> None:
    """It is set aside at the first call, which is full, and put back by `remove()`."""
    judge = Judge(Tiny())
    with ch.wrap(judge.unet) as cw, cw.trajectory():
        for k, t in enumerate(range(900, 0, -100)):
            if k == first:
                judge.unet.compile(backend="eager")
            judge.call(torch.randn(1, 2, 8, 8), t, step=k + 1)
        assert judge.letters == {0: "FFAFAFAFA", 3: "FAFFFAFAF"}[first]
        assert cw.stats.reasons[OUTSIDE] == 1
    assert judge.unet._compiled_call_impl is not None


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_compiled_from_outside() -> None:
    """What was made of a wrapped UNet by `torch.compile` is full, and told what to do instead."""
    judge = Judge(Tiny())
    with ch.wrap(judge.unet) as cw, cw.trajectory():
        compiled, judge.unet = judge.unet, torch.compile(judge.unet, backend="eager")  # type: ignore[assignment]
        for k, t in enumerate((900, 800, 700), 1):
            judge.call(torch.randn(1, 2, 8, 8), t, step=k)
        judge.unet = compiled
        for k, t in enumerate((600, 500), 4):
            judge.call(torch.randn(1, 2, 8, 8), t, step=k)
        assert judge.letters == "FFFFA"
        assert cw.stats.reasons[OUTSIDE] == 3


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_who_compiles_a_wrapped_unet_and_samples_with_that_is_warned() -> None:
    unet = Tiny()
    with ch.wrap(unet) as cw:
        compiled = torch.compile(unet, backend="eager")
        for t in range(900, 400, -100):
            compiled(torch.randn(1, 2, 8, 8), torch.tensor([float(t)]))
        with pytest.warns(ch.NoEffectWarning, match="`cw.compile\\(\\)` compiles"):
            compiled(torch.randn(1, 2, 8, 8), torch.tensor([400.0]))
        compiled(torch.randn(1, 2, 8, 8), torch.tensor([300.0]))
        assert cw.stats.reasons[OUTSIDE] == 7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["jit", "export", "make_fx"])
def test_what_is_traced_or_exported_is_the_unet_itself(how: str) -> None:
    """Where the loop's next call would have been the adaptor's."""
    from torch.fx.experimental.proxy_tensor import make_fx

    unet, x = Tiny(), torch.randn(1, 2, 12, 12)  # torch keeps what it has exported: no other test looks for this size
    plain, t = copy.deepcopy(unet), torch.tensor([800.0])
    makers: dict[str, Callable[[], Callable[..., Any]]] = {
        "jit": lambda: torch.jit.trace(unet, (x, t), check_trace=False),
        "export": lambda: torch.export.export(unet, (x, t)).module(),
        "make_fx": lambda: make_fx(unet)(x, t),
    }
    with ch.wrap(unet) as cw, cw.trajectory():
        unet(x, torch.tensor([900.0]))
        program = makers[how]()
        assert cw.stats.reasons[OUTSIDE] == 1
        assert torch.equal(program(2 * x, t), plain(2 * x, t))
        for step in (900.0, 800.0):
            unet(x, torch.tensor([step]))
        assert cw.stats.adaptor_passes == 1


# -- captures of what torch.compile has made -------------------------------------------------------------------------


class Scaled(Tiny):
    """What its Python holds decides what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.tanh = 1, False

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        output = super().forward(x * self.scale, t, c, **more)
        return output.tanh() if self.tanh else output


def test_what_its_python_holds_is_seen_between_trajectories(cuda: FakeCuda) -> None:
    case, plain, unet = CASES["tiny"], Scaled(), Scaled()
    with ch.wrap(plain, clock=2) as eager, ch.wrap(unet, clock=2) as cw:
        cw.compile(**AS_COMPILED)
        for run in range(5):
            with eager.trajectory(), cw.trajectory():
                for one in (plain, unet):
                    one.tanh, one.scale = run in (1, 3), 1 + (run > 2)
                for k in range(len(TIMES)):
                    torch.testing.assert_close(case.call(unet, k), case.call(plain, k))
        assert cw.stats.adaptor_passes == eager.stats.adaptor_passes
    assert cuda.captures > 2


def test_what_cannot_be_captured_runs_compiled(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tape: Any, **_: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    case, unet = CASES["tiny"], Tiny()
    expected = rollout(case, unet, compiled=False)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    counters.clear()
    with ch.wrap(unet, clock=2) as cw, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cw.compile(**AS_COMPILED)
        for _ in range(3):
            with cw.trajectory():
                torch.testing.assert_close([case.call(unet, k) for k in range(len(TIMES))], expected)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (9, 9)
    assert counters["stats"]["unique_graphs"] == 2
    assert [str(one.message).split(":")[0] for one in caught if one.category is ch.NoEffectWarning] == [
        "what is compiled cannot be captured, and runs without CUDA graphs"
    ]


class Failing(Tiny):
    error: Exception | None = None

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x, t, c, **more)


@pytest.mark.parametrize("error", [ValueError("its own"), RuntimeError("its own"), torch.OutOfMemoryError("its own")])
def test_an_error_of_the_unet_in_a_capture_is_its_own(error: Exception, cuda: FakeCuda) -> None:
    case, unet = CASES["tiny"], Failing()
    expected = rollout(case, Tiny(), compiled=False)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        cw.compile(mode="cudagraphs")
        case.call(unet, 0), case.call(unet, 1)
        unet.error = error
        with pytest.raises(type(error), match="its own"):
            case.call(unet, 2)
        unet.error = None
        assert cw.attached
        torch.testing.assert_close([case.call(unet, k) for k in range(len(TIMES))], expected)
    assert cuda.captures == 2


class Writing(Tiny):
    """It writes to its arguments, which its caller sees."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        output = super().forward(x, t, c, **more)
        x.add_(1)
        if c is not None:
            c.mul_(0.9)
        return output


@captured_as
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_captured_unet_writes_to_its_arguments_is_there(mode: Any, how: dict[str, Any], cuda: FakeCuda) -> None:
    plain, unet = Writing(), Writing()
    with ch.wrap(plain, clock=2) as eager, ch.wrap(unet, clock=2) as cw, mode():
        cw.compile(**how)
        for _ in range(3):
            conditions = torch.ones(2, 3), torch.ones(2, 3)
            with eager.trajectory(), cw.trajectory(), eager.branch("one"), cw.branch("one"):
                for t in TIMES:
                    x = torch.randn(2, 2, 16, 16)
                    samples = x.clone(), x.clone()
                    pairs = zip((plain, unet), samples, conditions, strict=True)
                    outputs = [one(sample, t, condition) for one, sample, condition in pairs]
                    for pair in (outputs, samples, conditions):
                        torch.testing.assert_close(*pair)
        assert cw.stats.adaptor_passes == eager.stats.adaptor_passes > 6
    assert cuda.captures == 2


def test_gradients_flow_where_captures_have_none(cuda: FakeCuda) -> None:
    case, unet = CASES["tiny"], Tiny()
    with ch.wrap(unet, clock=2) as cw:
        cw.compile(**AS_COMPILED)
        for _ in range(2):
            [case.call(unet, k) for k in range(len(TIMES))]
        captures = cuda.captures
        with torch.enable_grad():
            for k in range(len(TIMES)):
                case.call(unet, k).sum().backward()
    assert unet.head.weight.grad is not None
    assert cuda.captures == captures > 0


# -- several clocks, and decisions at run time ----------------------------------------------------------------------


class Moved(nn.Module):
    """An adaptor that reads what flowed into its region, now and when the cached exit was made."""

    needs = frozenset({"entry_cached"})

    def forward(self, entry: Tensor, exit_cached: Tensor, *, entry_cached: Tensor, **_: Any) -> Tensor:
        return exit_cached + (entry - entry_cached).mean()


STATIC = ["eager", "cudagraphs", "captured as compiled", pytest.param("aot_eager", marks=pytest.mark.slow)]


def made_static(cw: Any, how: str) -> None:
    """Compile, or capture on the stand-in."""
    cw.compile(**{"cudagraphs": AS_IT_IS, "captured as compiled": AS_COMPILED}.get(how, {"backend": how}))


@pytest.mark.parametrize("how", STATIC)
@pytest.mark.parametrize("adaptor", [None, Moved])
def test_several_clocks(how: str, adaptor: Any, cuda: FakeCuda) -> None:
    """A static callable for full passes, and one for each region; the same numbers as without."""
    counters.clear()
    times = [torch.tensor(float(t)) for t in range(900, 300, -50)]
    weights, outputs = Recursive().state_dict(), {}
    for static in (False, True):
        unet = Recursive().eval()
        unet.load_state_dict(weights)
        adaptors = None if adaptor is None else {1: adaptor(), 2: adaptor()}
        with ch.wrap(unet, adaptors, clocks={1: 2, 2: 6}) as cw:
            if static:
                made_static(cw, how)
            seen = []
            for _ in range(2):
                torch.manual_seed(1)
                with cw.trajectory():
                    seen += [unet(torch.randn(1, 3, 32, 32), t) for t in times]
            outputs[static] = seen
            assert set(cw.stats.regions) == {"level 1", "level 2"}
            assert set(cw.stats.reasons) <= {"first step", "scheduled", "traced"}
            if static and how.startswith("c"):
                assert cuda.captures == 3
            elif static:
                assert counters["stats"]["unique_graphs"] == 3
    torch.testing.assert_close(outputs[True], outputs[False], rtol=0, atol=0)


def test_what_an_adaptor_is_told_is_there_when_its_pass_begins(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched before a captured pass forks: its layers begin at once."""
    before, real = list[int](), cuda_graphs.beside

    def beside(device: torch.device) -> Any:
        before.extend(len(mode.calls) for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Tape))
        return real(device)

    def adaptor(entry: Any, exit_cached: Tensor, *, position: Tensor, position_cached: Tensor, **_: Any) -> Tensor:
        return exit_cached + position / position_cached

    adaptor.needs = frozenset({"position", "position_cached"})  # type: ignore[attr-defined]
    monkeypatch.setattr(cuda_graphs, "beside", beside)
    outputs = {}
    for static in (False, True):
        unet = Still()
        with ch.wrap(unet, adaptor) as cw:
            if static:
                cw.compile(**AS_IT_IS)
            x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
            with cw.trajectory():
                outputs[static] = [unet(x, torch.tensor(t), torch.ones(2, 3)) for t in (900, 800, 600, 300, 200, 100)]
            assert cw.stats.adaptor_passes == 3
    assert before == [0]
    torch.testing.assert_close(outputs[True], outputs[False], rtol=0, atol=0)


@pytest.mark.parametrize("how", STATIC)
def test_an_adaptive_schedule(how: str, cuda: FakeCuda) -> None:
    """Static are the passes that are decided on before they run: full ones, and a step's other calls."""
    conditions = torch.ones(2, 3), torch.zeros(2, 3)
    jumps = (0.0, 0.001, 5.0, 5.001, 5.002, 9.0)
    outputs = {}
    for static in (False, True):
        unet = Still()
        cw = ch.wrap(unet, schedule=ch.Schedule.adaptive(0.2, longest=9))
        if static:
            made_static(cw, how)
        seen = []
        for _ in range(3):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, 2, 8, 8, generator=generator)
            with cw.trajectory():
                for jump, t in zip(jumps, TIMES, strict=True):
                    seen += [unet(x + jump, torch.tensor(float(t)), c) for c in conditions]
        outputs[static] = seen, cw.stats.adaptor_passes, dict(cw.stats.reasons)
        if static and how.startswith("c"):
            assert cuda.captures == 2
    assert outputs[True][1:] == outputs[False][1:]
    assert outputs[True][1] > 10
    torch.testing.assert_close(outputs[True][0], outputs[False][0], rtol=0, atol=0)
