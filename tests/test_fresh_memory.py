"""Code between modules that writes what is skipped to memory of its own: such UNets have their adaptor passes.

Each output is the plain UNet's, or its with the exit of the step before; a plain UNet puts its tensors together by
operators that write to nothing.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import dlpack
from torch.utils.checkpoint import checkpoint

import clockwork_hooks as ch
from tests.small_unet import Tiny, reference
from tests.tape import FakeCuda
from tests.test_compile import cuda  # noqa: F401  (a fixture)
from tests.test_skipped_values import TIMES, USED, inputs

Join = Callable[["Pieced", Tensor], Tensor]
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


class Pieced(Tiny):
    """`join` is given the output of a module within the region; what it returns goes on within."""

    kept: Any = None

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.join = join
        self.calls = 0
        self.register_buffer("own", torch.zeros(2, 16, 4, 4))
        self.own: Tensor

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        self.now = t
        time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1).expand(len(x), 1) / 100
        h = self.stem(x) + self.emb(time).sin()[:, :, None, None]
        self.h = h.detach()
        z = self.up(self.body(self.act(self.join(self, self.down(h)))))
        return self.last(self.head(torch.cat([h, z], 1)))

    def last(self, out: Tensor) -> Tensor:
        """What comes after the region."""
        return out


def joined(unet: Pieced, z: Tensor) -> Tensor:
    """What all ways below come to."""
    return torch.cat([z[:, :8], 2 * z[:, 8:]], 1)


# -- ways to write -----------------------------------------------------------------------------------------------------


def slices(unet: Pieced, z: Tensor) -> Tensor:
    y = z.new_zeros(z.shape)
    y[:, :8] = z[:, :8]
    y[:, 8:] = 2 * z[:, 8:]
    return y


def of_the_real_input(unet: Pieced, z: Tensor) -> Tensor:
    y = unet.h.new_empty(len(z), 16, 4, 4)
    y[:, 8:], y[:, :8] = 2 * z[:, 8:], z[:, :8]
    return y


@torch.no_grad()
def by_out(unet: Pieced, z: Tensor) -> Tensor:
    return torch.cat([z[:, :8], 2 * z[:, 8:]], 1, out=torch.empty(z.shape))


@torch.no_grad()
def product_by_out(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.empty(z.shape)
    torch.mul(z[:, 8:], 2, out=y[:, 8:])
    y.narrow(1, 0, 8).copy_(z[:, :8])
    return y


def indices(unet: Pieced, z: Tensor) -> Tensor:
    y, at = torch.zeros_like(z), torch.arange(8)
    y[:, at] = z[:, at]
    return y.index_put_((torch.arange(2)[:, None], 8 + at), 2 * z[:, 8:])


def scattered(unet: Pieced, z: Tensor) -> Tensor:
    """Token merging writes so."""
    tokens = z.flatten(2).transpose(1, 2)
    at = torch.arange(15, -1, -1)[None, None].expand(tokens.shape)
    y = torch.zeros(len(z), 16, 16, device=z.device, dtype=z.dtype)
    y.scatter_(2, at, tokens.flip(2))
    return joined(unet, y.transpose(1, 2).reshape(z.shape))


def masked(unet: Pieced, z: Tensor) -> Tensor:
    mask = torch.ones_like(z, dtype=torch.bool)
    return joined(unet, torch.full_like(z, 3.0).masked_scatter_(mask, z))


def added_in_place(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.zeros(2, 16, 16)
    y.view(2, 16, 4, 4)[:, :8] += z[:, :8]
    y.unflatten(2, (4, 4))[0].narrow(0, 8, 8).add_(z[0, 8:], alpha=2)
    y[1, 8:].addcmul_(z[1, 8:].flatten(1), torch.tensor(2.0))
    return y.reshape(z.shape)


def index_copied(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.zeros(z.shape).index_copy_(1, torch.arange(8), z[:, :8])
    return y.index_add_(1, torch.arange(8, 16), z[:, 8:], alpha=2)


def many_at_once(unet: Pieced, z: Tensor) -> Tensor:
    y = [torch.empty(2, 8, 4, 4), torch.empty(2, 8, 4, 4)]
    torch._foreach_copy_(y, [z[:, :8], z[:, 8:]])
    torch._foreach_mul_(y, [1, 2])
    return torch.cat(y, 1)


def channels_last(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.empty(z.shape, memory_format=torch.channels_last)
    y[:, :8], y[:, 8:] = z[:, :8], z[:, 8:] * 2
    return y.contiguous()


def cloned(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.ones(z.shape).clone()
    y.data[:, :8] = z[:, :8]
    y.detach()[:, 8:] = 2 * z[:, 8:]
    return y


def padded(unet: Pieced, z: Tensor) -> Tensor:
    y = F.pad(unet.own[:, :8] + 0, (0, 0, 0, 0, 0, 8))
    y[:] = joined(unet, z)
    return y


def views_from_before(unet: Pieced, z: Tensor) -> Tensor:
    y = z.new_zeros(2, 16, 4, 4)
    first, second = y[:, :8], y[:, 8:]
    y.copy_(z)
    return torch.cat([first, second * 2], 1)


def overwritten(unet: Pieced, z: Tensor) -> Tensor:
    """What was real is a placeholder's, and real again: that it is so nobody has to know."""
    y = z.new_zeros(z.shape)
    y.copy_(z)
    y.fill_(1.0)
    return joined(unet, z * y)


def other_bits(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.zeros(z.shape, dtype=torch.int32)
    y.view(torch.float32).copy_(z)
    return joined(unet, y.view(torch.float32))


class Copies(torch.autograd.Function):
    """It fills memory that it has made."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        y = torch.empty_like(z)
        y[:, :8].copy_(z[:, :8])
        y[:, 8:].copy_(2 * z[:, 8:])
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.cat([g[:, :8], 2 * g[:, 8:]], 1)


def inverse_order(unet: Pieced, z: Tensor) -> Tensor:
    """Entries that nobody has written to would be no indices."""
    tokens = z.flatten(1)
    rank = (tokens[:, :, None] > tokens[:, None, :]).sum(2)
    inverse = torch.full(rank.shape, 10**9)
    inverse.scatter_(1, rank, torch.arange(rank.shape[1]).expand(rank.shape))
    return joined(unet, tokens.gather(1, inverse).gather(1, rank).reshape(z.shape))


def by_function(unet: Pieced, z: Tensor) -> Tensor:
    return Copies.apply(z)


def checkpointed(unet: Pieced, z: Tensor) -> Tensor:
    return checkpoint(slices, unet, z, use_reentrant=False)


def read_while_real(unet: Pieced, z: Tensor) -> Tensor:
    """Until then it is a tensor like any other."""
    y = z.new_ones(z.shape)
    assert float(y.sum()) == z.numel()
    assert "1." in f"{y[0, 0, 0]}" or torch.is_grad_enabled()
    z = z * y.mean().item()
    w = torch.zeros_like(y)
    w[:, :8], w[:, 8:] = y[:, 8:] * z[:, :8], z[:, 8:] * 2
    return w


WAYS = [slices, of_the_real_input, by_out, product_by_out, indices, scattered, masked, added_in_place, index_copied]
WAYS += [many_at_once, channels_last, cloned, padded, views_from_before, overwritten, other_bits, by_function]
WAYS += [checkpointed, read_while_real, inverse_order]


# -- what costs a full pass --------------------------------------------------------------------------------------------

WORLD: dict[str, Any] = {}


def adds(read: Callable[[Pieced, Tensor, Tensor], Any]) -> Join:
    """`read` is given memory and what is written to it; the number that it returns is added."""

    def join(unet: Pieced, z: Tensor) -> Tensor:
        y = torch.zeros(z.shape)
        return joined(unet, z) + read(unet, y, z.detach())

    return join


def after(read: Callable[[Tensor], Any]) -> Join:
    """Reads what was written."""
    return adds(lambda unet, y, z: read(y.copy_(z)))


def before(begin: Callable[[Tensor], Any], end: Callable[[Any], Any]) -> Join:
    """Knows the memory before anything is written to it, and reads it by another way afterwards."""

    def read(unet: Pieced, y: Tensor, z: Tensor) -> Any:
        handle = begin(y)
        y.copy_(z)
        return end(handle)

    return adds(read)


def in_thread(read: Callable[[], float]) -> float:
    out: list[float] = []
    thread = threading.Thread(target=lambda: out.append(read()))
    thread.start()
    thread.join()
    return out[0]


def keeps(swap: Callable[[Pieced, Tensor], Any]) -> Join:
    """What was kept by the call before is added."""

    def read(unet: Pieced, y: Tensor, z: Tensor) -> Any:
        y.copy_(z)
        then = swap(unet, y)
        return 0.0 if then is None else then.mean()

    return adds(read)


def on_self(unet: Pieced, y: Tensor) -> Any:
    then, unet.kept = unet.kept, y
    return then


def in_the_world(unet: Pieced, y: Tensor) -> Any:
    then, WORLD[str(id(unet))] = WORLD.get(str(id(unet))), y
    return then


def exchanged(unet: Pieced, y: Tensor, z: Tensor) -> Any:
    """What is written to one of them is in the other."""
    w = unet.own * 0
    y.data = w
    y.copy_(z)
    return w.mean().item()


def exchanged_back(unet: Pieced, y: Tensor, z: Tensor) -> Any:
    w = torch.ones(1)
    w.data = y
    y.copy_(z)
    return w.mean().item()


def by_data(unet: Pieced, y: Tensor) -> Any:
    then = unet.own.clone()
    unet.own.data = y
    return then


@torch.no_grad()
def resized(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.empty(0)
    torch.cat([z], out=y)
    return joined(unet, z) + len(y)


def reshaped(unet: Pieced, z: Tensor) -> Tensor:
    y = torch.zeros(z.shape)
    y.unsqueeze_(0)
    y[0] = z
    return joined(unet, z) + y.ndim


def set_to(unet: Pieced, z: Tensor) -> Tensor:
    y, w = torch.empty(z.shape), torch.zeros_like(z)
    y.set_(w)
    w.copy_(z.detach())
    return joined(unet, z) + y.mean().item()


def to_the_buffer(unet: Pieced, z: Tensor) -> Tensor:
    then = unet.own.mean()
    unet.own.copy_(z.detach())
    return joined(unet, z) + then


def pointed(y: Tensor) -> float:
    return ctypes.c_float.from_address(torch._C.TensorBase.data_ptr(y)).value


BREAKERS: dict[str, Join] = {
    "item": after(lambda y: y.mean().item()),
    "view": after(lambda y: 1.0 if y[:, :1].sum() > 0 else 2.0),
    "numpy": after(lambda y: float(y.numpy().mean())),
    "pointer in C": after(pointed),
    "dlpack": after(lambda y: dlpack.from_dlpack(dlpack.to_dlpack(y)).mean()),
    "deepcopy": after(lambda y: copy.deepcopy(y).mean().item()),
    "in a thread": after(lambda y: in_thread(lambda: y.mean().item())),
    "numpy from before": before(lambda y: y.numpy(), lambda array: float(array.mean())),
    "storage from before": before(lambda y: y.untyped_storage(), lambda storage: float(sum(storage[:8]))),
    "pointer from before": before(lambda y: y.data_ptr(), lambda at: ctypes.c_float.from_address(at).value),
    "sparse from before": before(lambda y: y.add_(1).to_sparse(), lambda sparse: sparse.to_dense().mean().item() + 1.0),
    "written in a thread": adds(lambda unet, y, z: in_thread(lambda: float(torch.zeros(z.shape).copy_(z).mean()))),
    "kept on self": keeps(on_self),
    "kept in the world": keeps(in_the_world),
    "kept by data": keeps(by_data),
    "resized": resized,
    "reshaped": reshaped,
    "exchanged": adds(exchanged),
    "exchanged back": adds(exchanged_back),
    "set": set_to,
    "a buffer": to_the_buffer,
    "a module's output": adds(lambda unet, y, z: unet.side(y[:, 0, 0, :3]).detach().copy_(z[:, :, 0, 0]).mean().item()),
}
KEPT = ["kept on self", "kept in the world", "kept by data"]


# -- the tests ---------------------------------------------------------------------------------------------------------


def judged(join: Join, mode: Any = torch.no_grad, plain: Join = joined, clock: int = 2, n: int = 2) -> tuple[str, Any]:
    """Some trajectories; each output is the plain UNet's, or its with the exit of the step before: "F" or "A" each."""
    WORLD.clear()
    unet, other, (x, c), letters = Pieced(join), Pieced(plain), inputs(), ""
    with mode(), ch.wrap(unet, clock=clock) as cw:
        for _ in range(n):
            before = None
            with cw.trajectory(steps=len(TIMES)):
                for t in TIMES:
                    got = unet(x, t, c)
                    full, exit = reference(other, x, t, c)
                    assert type(got) is Tensor
                    if torch.equal(got, full):
                        letters += "F"
                    else:
                        exit = before
                        assert torch.equal(got, reference(other, x, t, c, exit=before)[0]), t
                        letters += "A"
                    before = exit
    return letters, cw


def late(join: Join) -> Join:
    """In the last steps only, so that the first adaptor passes prove nothing."""
    return lambda unet, z: join(unet, z) if unet.now < 450 else joined(unet, z)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_such_unets_have_their_adaptor_passes(way: Join, mode: Any) -> None:
    """The first one fails, and from then on passes are followed."""
    letters, cw = judged(way, mode)
    assert letters == "FFFAFAFA" + "FAFAFAFA"
    assert cw.stats.reasons[USED] == 1
    assert judged(way, mode, clock=4)[0] == "FFAAFAAA" + "FAAAFAAA"


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_at_later_steps_only(way: Join) -> None:
    letters, _ = judged(late(way))
    assert letters == "FAFAFFFA" + "FAFAFAFA"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BREAKERS)
def test_nothing_is_made_of_what_is_written(name: str, mode: Any) -> None:
    """All passes are full from the first on that finds it, and the user is told."""
    if name == "kept in the world" and mode is torch.enable_grad:
        return  # autograd may hold it: the test below
    with pytest.warns(ch.NoEffectWarning, match="uses what they compute"):
        letters, cw = judged(BREAKERS[name], mode, BREAKERS[name])
    assert letters == 16 * "F"
    assert cw.stats.adaptor_passes == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BREAKERS)
def test_nothing_is_made_of_it_at_later_steps(name: str, mode: Any) -> None:
    """Full passes; where something was kept that nobody can put back, an error."""
    try:
        letters, _ = judged(late(BREAKERS[name]), mode, late(BREAKERS[name]))
    except ch.WrapError as error:
        assert name in KEPT
        assert "must not keep the output of a skipped module for its next call" in str(error)  # noqa: PT017
    else:
        assert letters in (2 * "FAFAFFFF", "FAFAFFFF" + 8 * "F")


def test_under_autograd_modules_are_asked() -> None:
    """What else holds a tensor may be the graph; what was kept elsewhere is noticed where it is used: an error."""
    with pytest.raises(ch.WrapError, match="must not keep the output of a skipped module for its next call"):
        judged(BREAKERS["kept in the world"], torch.enable_grad, BREAKERS["kept in the world"])


class Ends(Pieced):
    """What it returns was put together piece by piece, and is real."""

    def last(self, out: Tensor) -> Tensor:
        y = torch.zeros_like(out)
        y[:, :1], y[:, 1:] = out[:, :1], out[:, 1:] * 2
        return y


@pytest.mark.parametrize("mode", MODES)
def test_what_is_real_leaves_the_pass_as_it_is(mode: Any) -> None:
    """The output, an exit, and the entry that the adaptor is given, are in memory that the pass has made."""
    given: list[Tensor] = []

    def adaptor(entry: Tensor, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        given.append(entry)
        return exit_cached + entry.mean() * entry.detach().numpy().max()

    class Begins(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = x.new_empty(len(x), 8, *x.shape[2:])
            y[:, ::2] = super().forward(x)[:, ::2]
            y[:, 1::2] = super().forward(x)[:, 1::2]
            return y

    outputs = []
    for join in (slices, joined):
        unet, (x, _) = Ends(join), inputs()
        stem = unet.stem
        unet.stem = Begins(2, 8, 3, padding=1)
        unet.stem.load_state_dict(stem.state_dict())
        with mode(), ch.wrap(unet, adaptor) as cw:  # type: ignore[arg-type]
            for _ in range(2):
                with cw.trajectory(steps=4):
                    outputs.append([unet(x, t) for t in TIMES[:4]])
    for one, other in zip(outputs[1], outputs[3], strict=True):
        assert type(one) is type(other) is Tensor
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad
        one.detach().numpy()
    assert all(type(entry) is Tensor for entry in given)
    assert cw.stats.adaptor_passes == 4


def test_what_is_returned_may_be_anothers_data() -> None:
    """It is what it was exchanged for."""

    class Exchanges(Pieced):
        def last(self, out: Tensor) -> Tensor:
            y = torch.zeros(1)
            y.data = out
            return y if self.now == TIMES[3] else out

    unet, plain, (x, c) = Exchanges(slices), Exchanges(joined), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=4):
        for t in TIMES[:4]:
            assert torch.equal(unet(x, t, c), plain(x, t, c))


def test_memory_of_the_adaptor_is_its_own() -> None:
    """It may keep what it makes."""
    kept: list[Tensor] = []

    def adaptor(entry: Tensor, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        kept.append(torch.zeros_like(exit_cached))
        return exit_cached + kept[0]

    unet, (x, c) = Pieced(slices), inputs()
    with torch.no_grad(), ch.wrap(unet, adaptor) as cw, cw.trajectory(steps=8):  # type: ignore[arg-type]
        for t in TIMES:
            unet(x, t, c)
    assert cw.stats.adaptor_passes == 3
    assert all(type(one) is Tensor for one in kept)


def test_gradients_are_those_of_the_same_pass() -> None:
    """Of what was put together, too."""
    grads = []
    for join in (slices, joined):
        unet, (x, c) = Ends(join), inputs()
        with ch.wrap(unet) as cw:
            for _ in range(2):
                with cw.trajectory(steps=4):
                    for t in TIMES[:4]:
                        out = unet(x, t, c)
        assert cw.stats.reasons[USED] == (join is slices)
        out.square().sum().backward()
        grads.append([weight.grad for weight in unet.parameters() if weight.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 2
    assert all(map(torch.equal, *grads))


def test_memory_that_is_gone_is_no_other() -> None:
    """What was written to is let go; what comes in its place is real, and is read."""

    def again_and_again(unet: Pieced, z: Tensor) -> Tensor:
        for k in range(20):
            torch.zeros(z.shape).copy_(z)
            y = torch.full(z.shape, float(k))
            assert y.mean().item() == k
            assert torch.zeros(z.shape).add_(y).numpy().mean() == k
            gc.collect(0)
        return slices(unet, z)

    assert judged(again_and_again)[0] == "FFFAFAFA" + "FAFAFAFA"


def test_autocast() -> None:
    mode: Any = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with torch.no_grad():
        assert judged(slices, mode)[0] == "FFFAFAFA" + "FAFAFAFA"
        assert judged(scattered, mode)[0] == "FFFAFAFA" + "FAFAFAFA"


class TwoLevels(nn.Module):
    """One region inside the other, and both put tensors together."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.join = join
        self.stem, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.down, self.up = nn.Conv2d(8, 16, 4, 2, 1), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.deeper, self.back = nn.Conv2d(16, 16, 4, 2, 1), nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.body, self.merge = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        h = self.stem(x) + torch.as_tensor(t) / 1000
        one = self.down(h)
        two = self.deeper(one)
        inner = self.back(self.join(two, self.body(two)))
        out: Tensor = self.head(torch.cat([h, self.up(self.merge(self.join(one, inner)))], 1))
        return out


def into_one(a: Tensor, b: Tensor) -> Tensor:
    y = a.new_empty(len(a), 32, *a.shape[2:])
    y[:, :16], y[:, 16:] = a, b
    return y


@pytest.mark.filterwarnings("ignore:6 denoising steps without")
def test_regions_one_inside_the_other() -> None:
    """Each region's first adaptor pass finds it, and the others are what they are with `torch.cat`."""
    outputs, stats = [], []
    for join in (into_one, lambda a, b: torch.cat([a, b], 1)):
        unet, (x, _) = TwoLevels(join), inputs()
        regions = ch.find_regions(unet, x, TIMES[0])
        with torch.no_grad(), ch.wrap(unet, clocks={regions[0]: 2, regions[-1]: 4}) as cw:
            for _ in range(2):
                with cw.trajectory(steps=8):
                    outputs.append([unet(x, t) for t in TIMES])
        stats.append(cw.stats)
    assert all(map(torch.equal, outputs[1], outputs[3]))
    assert stats[0].adaptor_passes == stats[1].adaptor_passes - 2
    assert stats[0].reasons[USED] == 2


@pytest.mark.filterwarnings("ignore:6 denoising steps without")
def test_compiled_passes() -> None:
    """A followed pass proves them; they have no placeholders."""
    torch._dynamo.reset()
    unet, plain, (x, c) = Pieced(slices), Pieced(joined), inputs()
    unet.calls = 0
    with torch.no_grad(), ch.wrap(unet) as cw, ch.wrap(plain) as other:
        cw.compile(backend="eager")
        for run in range(2):
            with cw.trajectory(steps=8), other.trajectory(steps=8):
                for t in TIMES:
                    got, expected = unet(x, torch.tensor(t), c), plain(x, torch.tensor(t), c)
                    assert torch.equal(got, expected) or not run
        assert cw.stats.reasons[USED] == 1
        assert cw.stats.adaptor_passes == 7
    torch._dynamo.reset()


def test_captured_passes(cuda: FakeCuda) -> None:  # noqa: F811
    """Likewise; a pass that is captured follows, too."""
    unet, plain, (x, c) = Pieced(slices), Pieced(joined), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, ch.wrap(plain) as other:
        cw.compile(mode="cudagraphs")
        for run in range(3):
            with cw.trajectory(steps=8), other.trajectory(steps=8):
                for t in TIMES:
                    got, expected = unet(x, torch.tensor(t), c), plain(x, torch.tensor(t), c)
                    assert torch.equal(got, expected) or not run
        assert cw.stats.reasons[USED] == 1
        assert cw.stats.adaptor_passes == 11
    assert cuda.captures


def test_another_size() -> None:
    """What was learned of one size holds for others: there no pass fails."""
    unet, plain = Pieced(of_any_size), Pieced(joined)
    with torch.no_grad(), ch.wrap(unet) as cw, ch.wrap(plain) as other:
        for size in (8, 16, 24):
            x, c = torch.randn(2, 2, size, size), torch.randn(2, 3)
            with cw.trajectory(steps=8), other.trajectory(steps=8):
                for k, t in enumerate(TIMES):
                    assert torch.equal(unet(x, t, c), plain(x, t, c)) or (k, size) == (1, 8)
        assert cw.stats.reasons[USED] == 1


def of_any_size(unet: Pieced, z: Tensor) -> Tensor:
    return slices(unet, z)


def test_an_adaptive_schedule() -> None:
    """A pass that becomes full in its middle has made memory before."""
    outputs, reasons = [], []
    for join in (slices, joined):
        unet, (x, c) = Ends(join), inputs()
        with torch.no_grad(), ch.wrap(unet, schedule=ch.Schedule.adaptive(1.0)) as cw:
            for run in range(2):
                with cw.trajectory(steps=8):
                    outputs.append([unet(x * (1 + run * k**2 / 8), t, c) for k, t in enumerate(TIMES)])
        reasons.append(cw.stats.reasons)
    assert all(map(torch.equal, outputs[1], outputs[3]))
    assert cw.stats.adaptor_passes > 2
    assert cw.stats.full_passes > 4


def test_threads() -> None:
    """Each follows its own pass."""
    unet, plain, (x, c), errors = Pieced(slices), Pieced(joined), inputs(), []
    with ch.wrap(unet) as cw, ch.wrap(plain) as other, torch.no_grad():
        for one, wrapper in ((unet, cw), (plain, other)):
            with wrapper.trajectory(steps=8):
                for t in TIMES[:4]:
                    one(x, t, c)

        def run(seed: int) -> None:
            own = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad(), cw.trajectory(steps=8), other.trajectory(steps=8):
                errors.extend(t for t in TIMES if not torch.equal(unet(own, t, c), plain(own, t, c)))

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert cw.stats.reasons[USED] == 1


def test_data_that_is_exchanged_in_a_followed_pass() -> None:
    """To read what has no memory would crash the process."""

    def exchanged(unet: Pieced, z: Tensor) -> Tensor:
        unet.own.data = slices(unet, z).detach()
        return joined(unet, z) + unet.own.mean()

    def written_then_exchanged(unet: Pieced, z: Tensor) -> Tensor:
        return slices(unet, z) if unet.now > 450 else exchanged(unet, z)

    def plain(unet: Pieced, z: Tensor) -> Tensor:
        return joined(unet, z) + (joined(unet, z).mean() if unet.now < 450 else 0)

    assert judged(written_then_exchanged, plain=plain)[0] == "FFFAFFFF" + "FAFAFFFF"


@pytest.mark.parametrize("way", [slices, scattered, cloned])
def test_without_a_private_name(way: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._C._set_throw_on_mutable_data_ptr")
    assert judged(way)[0] == "FFFAFAFA" + "FAFAFAFA"


def test_who_collects_what_runs_has_full_passes() -> None:
    """Copies of real tensors that a user's hook keeps are in memory that is followed: nothing stale, and no error."""
    seen: list[Tensor] = []
    unet, plain, (x, c) = Pieced(slices), Pieced(joined), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw:
        unet.stem.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        with cw.trajectory(steps=8), pytest.warns(ch.NoEffectWarning, match="uses what they compute"):
            assert all(torch.equal(unet(x, t, c), plain(x, t, c)) for t in TIMES)
    assert all(type(one) is Tensor and one.numpy().any() for one in seen)
