"""UNets with operators, arguments and outputs that are rare: they are served and counted, or refused in plain words."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import clockwork_hooks as ch
from clockwork_hooks._tree import leaves, map_leaves
from tests import small_unet
from tests.bendable import Tiny, noise, proven
from tests.oracle import Judge


@pytest.fixture(autouse=True)
def _eager_operators() -> Iterator[None]:
    """`flex_attention` and `torch.cond` compile themselves; what one test compiled is none of the next one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(low: Tensor) -> Tensor:
    return low.flatten(2).transpose(1, 2)


def as_map(out: Tensor, low: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(low.shape)


# -- operators ----------------------------------------------------------------------------------------------------


def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + 0.1 * (q - k)


def flex(low: Tensor) -> Tensor:
    q = tokens(low).unflatten(-1, (4, 8)).transpose(1, 2)
    return low + as_map(flex_attention(q, q, q, score_mod=biased).transpose(1, 2).flatten(2), low)


def flex_masked(low: Tensor) -> Tensor:
    q = F.pad(tokens(low), (0, 0, 0, 64)).unflatten(-1, (4, 8)).transpose(1, 2)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    return low + as_map(flex_attention(q, q, q, block_mask=mask).transpose(1, 2).flatten(2)[:, :64], low)


def cond(low: Tensor) -> Tensor:
    return torch.cond(low.sum() > 1e9, lambda x: x.cos(), lambda x: x * x.mean(), (low,))


def loop(low: Tensor) -> Tensor:
    return while_loop(lambda k, x: k < 3, lambda k, x: (k + 1, (x @ x.mT).tanh()), (torch.tensor(0), low))[1]


def jagged(low: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([row[: 40 + 20 * k] for k, row in enumerate(tokens(low))], layout=torch.jagged)
    weight = torch.linspace(-1, 1, 32 * 32).reshape(32, 32)
    return low + F.linear(rows, weight).to_padded_tensor(0.0).mean(1)[:, :, None, None]


def strided_nested(low: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([row[: 40 + 20 * k] for k, row in enumerate(tokens(low))])
    weight = torch.linspace(-1, 1, 32 * 32).reshape(32, 32)
    return low + F.linear(rows, weight).to_padded_tensor(0.0).mean(1)[:, :, None, None]


def sparse(low: Tensor) -> Tensor:
    return low + torch.sparse.mm(torch.eye(32).to_sparse(), torch.ones(32, 1)).reshape(1, 32, 1, 1)


class Operator(nn.Module):
    """Calls it within a module of its own, as an attention processor is called."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Odd(Tiny):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.odd = Operator(run)

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.up(self.odd(self.body(self.down(h) + self.time(t, h))))


UNCOUNTED = {loop: "while_loop", jagged: "linear", strided_nested: "linear", sparse: "_sparse_mm"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("run", [flex, flex_masked, cond, loop, jagged, strided_nested, sparse])
def test_operators_that_hold_code_or_rows_of_their_own(run: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        region = proven(Odd(run), noise(), 3)
        assert (region.entry.path, region.exit.path) == ("stem", "up")
        assert "odd" in [call.path for call in region.skipped]
        report = ch.flops_report(Odd(run), noise(), 3)
    missing = [item.operator for item in report.uncounted]
    assert (UNCOUNTED[run] in missing) if run in UNCOUNTED else missing == []
    assert str(ch.diagram(Odd(run), noise(), 3))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_counts_as_attention() -> None:
    with torch.no_grad():
        by_operator = {row.name: row.full_macs for row in ch.flops_report(Odd(flex), noise(), 3).by_operator()}
        without = ch.flops_report(Odd(flex), noise(), 3, attention=False)
    assert by_operator["flex_attention"] == 2 * 4 * 64 * 64 * (8 + 8)  # rows, heads, queries, keys, width
    assert "flex_attention" not in {row.name for row in without.by_operator()}


def test_of_torch_cond_the_branch_that_runs_is_seen() -> None:
    class Branching(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            low = super().low(h, t)
            weight = torch.ones(16, 16)
            return torch.cond(low.sum() > -1e9, lambda x, w: x @ w, lambda x, w: x + w.sum(), (low, weight))

    with torch.no_grad():
        report, plain = (ch.flops_report(kind(), noise(), 3) for kind in (Branching, Tiny))
    assert report.uncounted == ()
    assert report.full_macs - plain.full_macs == 2 * 8 * 16 * 16 * 16


# -- arguments ----------------------------------------------------------------------------------------------------


class Conditioned(Tiny):
    """Takes a condition, whatever it is made of."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.read, self.film = read, nn.Linear(8, 32)

    def forward(self, x: Tensor, t: Any, c: Any = None) -> Tensor:
        h = self.stem(x)
        low = self.down(h) + self.time(t, h) + self.film(self.read(c))[:, :, None, None]
        return self.join(h, self.up(self.body(low)))


class Holder:
    """Somebody's own class, not a dataclass."""

    def __init__(self, text: Tensor) -> None:
        self.text, self.name = text, "text"


ROWS = [torch.linspace(0, 1, 24).reshape(3, 8), torch.linspace(-1, 1, 40).reshape(5, 8)]
CONDITIONS: dict[str, tuple[Callable[[Any], Tensor], Callable[[], Any]]] = {
    "expanded": (lambda c: c, lambda: torch.arange(8.0).reshape(1, 8).expand(2, 8)),
    "one element": (lambda c: c.reshape(1, 1) * torch.ones(2, 8), lambda: torch.tensor(3).expand(1)),
    "no element": (lambda c: torch.ones(2, 8) * len(c), lambda: torch.zeros(0, 8)),
    "jagged": (lambda c: torch.stack([r.mean(0) for r in c.unbind()]), lambda: nested(torch.jagged)),
    "strided nested": (lambda c: torch.stack([r.mean(0) for r in c.unbind()]), lambda: nested(torch.strided)),
    "sparse": (lambda c: c.to_dense(), lambda: torch.eye(2, 8).to_sparse()),
    "an object": (lambda c: c.text, lambda: Holder(torch.ones(2, 8))),
}


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(ROWS, layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("again", [False, True])
def test_conditions_of_any_layout(name: str, again: bool) -> None:
    read, make = CONDITIONS[name]
    unet, x, c = Conditioned(read), noise(), make()
    with torch.no_grad():
        times = [torch.tensor([0.9 - k / 10]).expand(2) for k in range(4)]
        expected = [unet(x, t, c) for t in times]
        with ch.wrap(unet) as cw, cw.trajectory():
            outputs = [unet(x, t, make() if again else c) for t in times]
            assert torch.equal(outputs[0], expected[0])
            assert torch.equal(outputs[2], expected[2])
            # what cannot be compared by value is a new condition where it is made anew, jagged rows in any case
            new = name == "jagged" or (again and name in ("strided nested", "sparse"))
            assert (cw.stats.full_passes, cw.stats.adaptor_passes) == ((4, 0) if new else (2, 2)), cw.report()


def test_a_sample_and_a_time_that_are_expanded() -> None:
    unet, x = Tiny(), noise(1, 3, 16, 16).expand(2, 3, 16, 16)
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory():
        for k in range(4):
            unet(x, torch.tensor(0.9 - k / 10).expand(2))
        assert cw.stats.adaptor_passes == 2


# -- outputs ------------------------------------------------------------------------------------------------------


class Output:
    """Somebody's own class, neither tuple nor dataclass."""

    def __init__(self, sample: Tensor, note: str = "") -> None:
        self.sample, self.note = sample, note


class Slotted:
    __slots__ = ("note", "sample")

    def __init__(self, sample: Tensor, note: str = "") -> None:
        self.sample, self.note = sample, note


class Returns(Tiny):
    def __init__(self, wrapped: Callable[[Tensor, Tensor, Any], Any]) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor, t: Any) -> Any:
        return self.wrapped(super().forward(x, t), x, t)


OUTPUTS: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "its sample": lambda out, x, t: (out, x),
    "its time": lambda out, x, t: {"pred": out, "time": t},
    "an object": lambda out, x, t: Output(out, "as it is"),
    "an object with slots": lambda out, x, t: Slotted(out, "as it is"),
    "an object in a list": lambda out, x, t: [Output(out), None],
}


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_unet_returns(name: str) -> None:
    t = torch.tensor([3.0, 3.0])
    unet = Returns(OUTPUTS[name])
    assert ch.flops_report(unet, noise(), t).region is not None
    assert str(ch.diagram(unet, noise(), t))
    with torch.no_grad():
        expected, exits = unet(noise(), t), []
        unet.up.register_forward_hook(lambda module, args, output: exits.append(output))
        with ch.wrap(unet, lambda entry, exit, **sides: exits[0]) as cw, cw.trajectory():
            outputs = [unet(noise(), t - k / 10) for k in range(2)]
            assert (cw.region.entry.path, cw.region.exit.path) == ("stem", "up")
            assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (1, 1)
    for (path, leaf), (other, right) in zip(leaves(outputs[0]), leaves(expected), strict=True):
        assert path == other
        assert torch.equal(leaf, right) if isinstance(leaf, Tensor) else leaf == right
    assert type(outputs[1]) is type(expected)


@pytest.mark.parametrize("kind", [Output, Slotted])
def test_what_a_skipped_module_returns(kind: Callable[[Tensor, str], Any]) -> None:
    class Upsampler(nn.Module):
        def __init__(self, up: nn.Module) -> None:
            super().__init__()
            self.up = up

        def forward(self, x: Tensor) -> Any:
            return kind(x, "low"), kind(self.up(x), "high")

    class Objects(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.up = Upsampler(self.up)

        def low(self, h: Tensor, t: Any) -> Tensor:
            low, high = self.up(self.body(self.down(h) + self.time(t, h)))
            assert (low.note, high.note) == ("low", "high")
            return high.sample

    region = proven(Objects(), noise(), torch.tensor([3.0, 3.0]))
    assert [call.path for call in region.skipped][-1] == "up"


def test_objects_are_opened_and_rebuilt_in_their_class() -> None:
    output = Output(torch.ones(2), "note")
    assert [path for path, _ in leaves({"out": output})] == ["out.sample", "out.note"]
    doubled = map_leaves(lambda leaf: leaf * 2, {"out": output})["out"]
    assert type(doubled) is Output
    assert (doubled.sample.tolist(), doubled.note) == ([2, 2], "notenote")
    assert (output.sample.tolist(), output.note) == ([1, 1], "note")
    for closed in (nn.Linear(2, 2), lambda: output, object(), torch.Generator()):
        assert list(leaves(closed)) == [("", closed)]


# -- TorchScript ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["stem", "body", "up", "head"])
def test_modules_of_torchscript_within_the_unet_are_served(path: str) -> None:
    """The UNet itself is Python; any part of it, skipped or not, may be TorchScript."""
    unet = small_unet.Tiny()
    plain = copy.deepcopy(unet)
    module = unet.get_submodule(path)
    setattr(unet, path, torch.jit.script(module if path == "up" else nn.Sequential(module, nn.Identity()).eval()))
    judge = Judge(unet, plain)
    with torch.no_grad(), ch.wrap(unet, clock=2):
        for run in range(2):
            judge.begin()
            for k, t in enumerate(torch.linspace(900, 200, 8)):
                judge.call(torch.randn(1, 2, 8, 8), t, torch.ones(1, 3), step=8 * run + k)
    assert judge.letters == "FAFAFAFA" * 2


# -- batches ------------------------------------------------------------------------------------------------------


def test_an_empty_batch() -> None:
    """Nothing of it is worth skipping; it returns what the UNet returns, and the wrapper goes on."""
    unet, x, t = Tiny(), noise()[:0], torch.zeros(0)
    with torch.no_grad():
        expected = unet(x, t)
        report = ch.flops_report(unet, x, t)
        assert (report.full_macs, report.region) == (0, None)
        with ch.wrap(unet) as cw, cw.trajectory():
            for _ in range(2):
                for k in range(4):
                    unet(noise(), torch.full((2,), 0.9 - k / 10))
                assert torch.equal(unet(x, t), expected)
            assert cw.stats.adaptor_passes == 4


# -- what the user counts ---------------------------------------------------------------------------------------


@torch.library.custom_op("clockwork_odd::gram", mutates_args=())
def gram(x: Tensor) -> Tensor:
    return x @ x.mT


@gram.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


@torch.library.custom_op("clockwork_odd::halves", mutates_args=())
def halves(x: Tensor, scale: float = 2.0) -> list[Tensor]:
    return [x[:, :4] * scale, x[:, 4:] * scale]


class Custom(Tiny):
    def low(self, h: Tensor, t: Any) -> Tensor:
        low = super().low(h, t)
        return torch.cat(halves(gram(low)), 1)


def by_gram(args: tuple[Any, ...], output: Any) -> int:
    assert args == ((2, 8, 16, 16),)
    assert output == (2, 8, 16, 16)
    return math.prod(output) * args[0][-1]


def by_halves(args: tuple[Any, ...], output: Any) -> int:
    assert args == ((2, 8, 16, 16), 2.0)
    assert output == ((2, 4, 16, 16), (2, 4, 16, 16))
    return 7


def test_a_handle_counts_what_the_library_cannot() -> None:
    plain, custom = ch.flops_report(Tiny(), noise(), 3), ch.flops_report(Custom(), noise(), 3)
    names = ["clockwork_odd::gram", "clockwork_odd::halves"]
    assert [item.operator for item in custom.uncounted] == names
    assert custom.full_macs == plain.full_macs
    for name, count in zip(names, (by_gram, by_halves), strict=True):
        ch.graph.handle(name, count)
    try:
        counted = ch.flops_report(Custom(), noise(), 3)
        assert counted.uncounted == ()
        assert counted.full_macs == plain.full_macs + 2 * 8 * 16 * 16 * 16 + 7
        with torch.no_grad(), ch.wrap(unet := Custom()) as cw:
            unet(noise(), 3)
            assert cw.stats.macs_run == counted.full_macs
    finally:
        for name in names:
            ch.graph.handle(name, None)
    assert [item.operator for item in ch.flops_report(Custom(), noise(), 3).uncounted] == names


def test_handles_hold_within_their_block_and_go_before_the_tables() -> None:
    traced = ch.trace(Tiny(), noise(), 3)
    convolutions = [n for n, node in enumerate(traced.nodes) if ch.graph.operator_name(node) == "conv2d"]
    with ch.graph.handles({"aten::conv2d": lambda args, output: 1}):
        assert [ch.graph.node_macs(traced.nodes[n]) for n in convolutions] == [1] * len(convolutions)
    assert all(ch.graph.node_macs(traced.nodes[n]) > 1 for n in convolutions)


@pytest.mark.parametrize("wrong", [2.5, -1, True, None])
def test_a_handle_returns_a_whole_number(wrong: Any) -> None:
    with ch.graph.handles({"conv2d": lambda args, output: wrong}), pytest.raises(ch.CountError, match="whole number"):
        _ = ch.trace(Tiny(), noise(), 3).macs


@pytest.mark.parametrize(("name", "count"), [("", len), (3, len), ("conv2d", 7)])
def test_a_handle_is_a_function_under_a_name(name: Any, count: Any) -> None:
    with pytest.raises(ch.ArgumentError, match="handle"):
        ch.graph.handle(name, count)


def test_macs_of_a_trace_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = ch.trace(Tiny(), noise(), 3)
    assert traced.macs == tuple(map(ch.graph.node_macs, traced.nodes))
    assert traced.full_macs == sum(traced.macs) == ch.flops_report(Tiny(), noise(), 3).full_macs
    assert traced.macs is traced.macs


def test_every_form_of_a_report_says_what_was_not_counted() -> None:
    report = ch.flops_report(Custom(), noise(), 3)
    said = "Lower bound; not counted: clockwork_odd::gram (1×), clockwork_odd::halves (1×)."
    for form in (str(report), report.to_markdown(), report.to_html(), report.to_json()):
        assert said in form.replace("\\u00d7", "×")
    plain = ch.flops_report(Tiny(), noise(), 3)
    assert not any("ower bound" in form for form in (str(plain), plain.to_html(), plain.to_json()))
    counted = ch.flops_report(
        Custom(), noise(), 3, handles={"clockwork_odd::gram": by_gram, "clockwork_odd::halves": by_halves}
    )
    assert "ower bound" not in str(counted)
    assert counted.full_macs == plain.full_macs + 2 * 8 * 16 * 16 * 16 + 7


@pytest.mark.parametrize("model", [nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), nn.Linear(32, 8)])
def test_models_without_convolutions(model: nn.Module) -> None:
    x = torch.randn(1, 64, 32)
    report = ch.flops_report(model.eval(), x)
    assert report.full_macs > 0
    assert report.region is None
    diagram = ch.diagram(model, x)
    assert sum(block.macs for block in diagram.blocks) == report.full_macs
    assert report.to_html()
    assert diagram.to_svg()


class Video(nn.Module):
    """The root folds frames into the batch at the region's edge: `reshape` when traced, `view` in a live call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv3d(16, 16, (3, 1, 1), 1, (1, 0, 0))
        self.down, self.body, self.up = nn.Conv2d(16, 64, 4, 2, 1), nn.Conv2d(64, 64, 3, 1, 1), Up()
        self.head = nn.Conv2d(32, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        b, c, f, h, w = x.shape
        z = self.stem(x.transpose(1, 2).reshape(b * f, c, h, w)) + t.sin()
        z = self.mix(z.reshape(b, f, 16, h, w).transpose(1, 2)).transpose(1, 2).reshape(b * f, 16, h, w)
        z = self.head(torch.cat([z, self.up(self.body(self.down(z)).relu())], 1))
        return z.reshape(b, f, c, h, w).transpose(1, 2)


class Up(nn.ConvTranspose2d):
    def __init__(self) -> None:
        super().__init__(64, 16, 4, 2, 1)


def test_a_region_found_and_one_of_a_live_call_are_the_same() -> None:
    unet, x, t = Video().eval(), torch.randn(1, 3, 4, 16, 16), torch.tensor(0.9)
    with torch.no_grad():
        region = ch.find_region(unet, x, t)
        with ch.wrap(unet) as cw, cw.trajectory():
            unet(x, t)
            assert cw.region is not None
            assert cw.region.fingerprint == region.fingerprint
        with ch.wrap(unet, region=region) as cw, cw.trajectory():
            for k in range(4):
                unet(torch.randn(1, 3, 4, 24, 24), torch.tensor(0.9 - k / 10))
            assert cw.stats.adaptor_passes == 2
