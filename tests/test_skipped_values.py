"""Code outside the skipped modules that uses what they compute: no operator of the recorded call shows it, or not yet.

Such a UNet returns what the plain one does, and nothing else.
"""

from __future__ import annotations

import copy
import ctypes
import io
import math
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import dlpack

import clockwork_hooks as ch
from tests.small_unet import Tiny, reference

TIMES = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0)
USED = "code outside the skipped modules uses what they compute"

Twist = Callable[["Twisted", Tensor, Tensor], Tensor]


class Twisted(Tiny):
    """`twist` is given what the UNet would return, and the output of a module within the region."""

    last: Any = None

    def __init__(self, twist: Twist) -> None:
        super().__init__()
        self.twist = twist
        self.held: list[Tensor] = []
        self.table: dict[str, Tensor] = {}
        self.calls = 0
        self.get, self.put = closure()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("swapped", torch.zeros(()))
        self.mean: Tensor
        self.swapped: Tensor

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        """As Tiny's."""
        self.calls += 1
        self.now = t
        time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1).expand(len(x), 1) / 100
        h = self.stem(x) + self.emb(time).sin()[:, :, None, None]
        low = self.body(self.act(self.down(h)))
        z = self.up(low)
        return self.twist(self, self.head(torch.cat([h, z], 1)), low)


def closure() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """A variable that only two functions know."""
    value: Any = None

    def get() -> Any:
        return value

    def put(new: Any) -> None:
        nonlocal value
        value = new

    return get, put


# -- read in the same call ---------------------------------------------------------------------------------------------


def printed(low: Tensor) -> float:
    """The number comes of the text."""
    out = io.StringIO()
    print(low.mean(), file=out)
    return float(out.getvalue().split("(")[1].split(",")[0].split(")")[0])


@torch.library.custom_op("clockwork_tests::with_mean", mutates_args=())
def with_mean(low: Tensor) -> tuple[Tensor, float]:
    """An operator that returns a tensor and a number."""
    return low.clone(), float(low.mean())


def in_thread(read: Callable[[], float]) -> float:
    """What a thread of the UNet's own has read."""
    out: list[float] = []
    thread = threading.Thread(target=lambda: out.append(read()))
    thread.start()
    thread.join()
    return out[0]


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda low: low.mean().item(),
    "float": lambda low: float(low.mean()),
    "int": lambda low: int(1000 * low.mean()),
    "bool": lambda low: 2.0 if low.mean() > -0.01 else 1.0,
    "branch": lambda low: 1.0 if (low.abs() > 0.1).any() else 0.0,
    "tolist": lambda low: low.flatten()[:2].tolist()[1],
    "numpy": lambda low: float(low.numpy().mean()),
    "asarray": lambda low: float(np.asarray(low).mean()),
    "from_dlpack": lambda low: float(np.from_dlpack(low).mean()),
    "to_dlpack": lambda low: dlpack.from_dlpack(dlpack.to_dlpack(low)).mean(),
    "expanded": lambda low: dlpack.from_dlpack(dlpack.to_dlpack(low[:1, :1, :1, :1].expand(2, 2, 8, 8))),
    "format": lambda low: float(f"{low.mean():.4f}"),
    "print": printed,
    "math": lambda low: math.sqrt(low.square().mean()),
    "index": lambda low: (1.0, 2.0)[(low[0, 0, 0, 0] > -9).long()],
    "nonzero": lambda low: len(low[low > 0]),
    "equal": lambda low: 1.0 if torch.equal(low, torch.zeros_like(low)) else 2.0,
    "allclose": lambda low: 1.0 if torch.allclose(low, torch.zeros_like(low)) else 2.0,
    "contains": lambda low: 1.0 if 0.0 in low else 2.0,
    "pointer": lambda low: ctypes.c_float.from_address(low.data_ptr()).value,
    "pointer in C": lambda low: ctypes.c_float.from_address(torch._C.TensorBase.data_ptr(low)).value,
    "storage": lambda low: low.untyped_storage()[3],
    "deepcopy": lambda low: copy.deepcopy(low).mean(),
    "pickle": lambda low: pickle.loads(pickle.dumps(low)).mean(),
    "new tensor": lambda low: torch.tensor([low.mean(), 1.0]).sum(),
    "item of data": lambda low: low.data.mean().item(),
    "an error": lambda low: [1.0][int(low.abs().mean() < 1e-9)],
    "a loop": lambda low: sum(1 for _ in iter(lambda: low.abs().max() > 1e-6, True)),
    "caught": lambda low: caught(lambda: low.mean().item()),
    "caught in a thread": lambda low: in_thread(lambda: caught(lambda: low.mean().item())),
    "beside a tensor": lambda low: with_mean(low)[1],
    "how many": lambda low: low.relu().to_sparse().values().shape[0],
    "split there": lambda low: torch.arange(9.0).tensor_split(low.abs().sum().long().view(1) % 7 + 1)[0].shape[0],
    "so many classes": lambda low: F.one_hot(low.abs().sum((0, 2, 3)).long()).shape[1],
    "so many times": lambda low: torch.ones(3).repeat_interleave(low.abs().sum((0, 2, 3)).long()[:3] + 1).shape[0],
    "another shape": lambda low: low.unsqueeze_(0).ndim,
}


def caught(read: Callable[[], float]) -> float:
    """Whoever reads it has another number ready."""
    try:
        return read()
    except Exception:
        return 7.0


# -- kept for the next call --------------------------------------------------------------------------------------------


def swap(holder: dict[str, Any], name: str, value: Any) -> Any:
    """The value that was there."""
    before, holder[name] = holder.get(name), value
    return 0.0 if before is None else before


def on_self(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """An attribute."""
    return out + torch.as_tensor(swap(vars(unet), "last", low)).mean()


def part_on_self(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """An attribute that holds what was made of it."""
    return out + swap(vars(unet), "last", low.mean() * 2)


def in_list(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """A list."""
    unet.held.append(low)
    return out + (unet.held.pop(0).mean() if len(unet.held) > 1 else 0)


def in_dict(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """A dictionary."""
    return out + torch.as_tensor(swap(unet.table, "low", low)).mean()


def in_closure(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """What only a function knows."""
    before = unet.get()
    unet.put(low)
    return out if before is None else out + before.mean()


def in_cycle(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """A list that holds itself."""
    before, unet.held = unet.held, [low]
    unet.held.append(unet.held)  # type: ignore[arg-type]
    return out + before[0].mean() if before else out


def buffer(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """A buffer is another tensor each time."""
    out = out + unet.swapped
    unet.swapped = low.mean()
    return out


def statistics(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Running statistics are written to in place."""
    out = out + unet.mean
    unet.mean.mul_(0.9).add_(low.mean(), alpha=0.1)
    return out


def normed(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """A norm keeps running statistics, and its schema does not say so."""
    mean, variance = unet.swapped + torch.zeros(low.shape[1]), torch.ones(low.shape[1])
    torch.nn.functional.batch_norm(low.detach(), mean, variance, training=True)
    return out + mean.sum()


def counted(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """How often it was called matters too: a pass that is run again is no second call."""
    return out + unet.calls + low.mean().item()


def by_data(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """The memory of a tensor is exchanged."""
    out = out + unet.mean
    unet.mean.data = low.mean()
    return out


KEPT = (on_self, part_on_self, in_list, in_dict, in_closure, in_cycle, buffer, statistics, counted, by_data)


def adding(read: Callable[[Tensor], Any]) -> Twist:
    return lambda unet, out, low: out + read(low.detach())


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 8, 8, generator=generator), torch.randn(2, 3, generator=generator)


def judged(twist: Twist, mode: Any = torch.no_grad, **options: Any) -> ch.ClockworkWrapper:
    """Two trajectories that return the plain UNet's outputs."""
    unet, plain, (x, c) = Twisted(twist), Twisted(twist), inputs()
    cw = ch.wrap(unet, **options)
    with mode():
        for _ in range(2):
            with cw.trajectory(steps=len(TIMES)):
                for t in TIMES:
                    assert torch.equal(unet(x, t, c), plain(x, t, c)), t
    return cw


@pytest.mark.parametrize("twist", [*map(adding, READS.values()), *KEPT], ids=[*READS, *(one.__name__ for one in KEPT)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_is_made_of_what_is_skipped(twist: Any, mode: Any) -> None:
    """One adaptor pass finds it and is run again; from then on all are full, and the user is told."""
    if twist is in_closure and mode is torch.enable_grad:
        return  # the test below
    with pytest.warns(ch.NoEffectWarning, match="uses what they compute"):
        cw = judged(twist, mode)
    assert cw.stats.adaptor_passes == 0
    assert cw.stats.reasons[USED] == 15
    assert cw.stats.macs_run < 1.1 * cw.stats.macs_plain


def own_noise(unet: Twisted) -> Any:
    return torch.randn((), generator=unet.table["generator"])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "draw", [lambda unet: torch.randn(()), own_noise, lambda unet: random.random(), lambda unet: np.random.rand()]
)
def test_noise_that_the_unet_draws_is_drawn_once(draw: Callable[[Twisted], Any]) -> None:
    """A pass that is run again draws the numbers of the plain UNet, and so does all that comes after it."""

    def noisy(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
        noise = draw(unet)
        low.detach().mean().item()
        return out + noise  # type: ignore[no-any-return]

    def outputs(unet: Twisted) -> list[Tensor]:
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        unet.table = {"generator": torch.Generator().manual_seed(4)}  # type: ignore[dict-item]
        return [unet(x, t, c) for t in torch.tensor(TIMES)]

    unet, (x, c) = Twisted(noisy), inputs()
    with torch.no_grad():
        plain = outputs(unet)
        with pytest.warns(ch.NoEffectWarning), ch.wrap(unet) as cw:
            assert all(map(torch.equal, outputs(unet), plain))
        assert cw.stats.reasons[USED] == 7


def test_under_autograd_modules_are_asked() -> None:
    """What holds a tensor there may be the graph. What a function keeps is noticed where it is used: an error."""
    unet, (x, c) = Twisted(in_closure), inputs()
    with ch.wrap(unet) as cw, cw.trajectory(steps=4):
        unet(x, TIMES[0], c), unet(x, TIMES[1], c)
        with pytest.raises(ch.WrapError, match="must not keep the output of a skipped module for its next call"):
            unet(x, TIMES[2], c)


# -- at some step only, and by others ----------------------------------------------------------------------------------


def late(twist: Twist) -> Twist:
    """In the last steps only, so that the first adaptor passes prove nothing."""

    def twisted(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
        return twist(unet, out, low) if unet.now < 450 else out

    return twisted


def added(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Operators alone; those of the recorded call were others."""
    return out + low.mean()


def written(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Into memory that is real."""
    return torch.empty(low.shape).copy_(low).mean() + out


def either(twist: Twist, mode: Any = torch.no_grad, clock: int = 2) -> str:
    """Three trajectories; each output is the plain UNet's, or its with the exit of the step before: "F" or "A" each."""
    unet, plain, (x, c), letters = Twisted(twist), Twisted(twist), inputs(), ""
    with mode(), ch.wrap(unet, clock=clock) as cw:
        for _ in range(3):
            before = None
            with cw.trajectory(steps=len(TIMES)):
                for t in TIMES:
                    got = unet(x, t, c)
                    full, exit = reference(plain, x, t, c)
                    if torch.equal(got, full):
                        letters += "F"
                    else:
                        exit = before
                        assert torch.equal(got, reference(plain, x, t, c, exit=before)[0]), t
                        letters += "A"
                    before = exit
    return letters


@pytest.mark.parametrize(
    "twist",
    [*map(adding, READS.values()), added, written, normed, part_on_self],
    ids=[*READS, "added", "written", "normed", "kept in part"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_is_used_at_later_steps_only(twist: Any, mode: Any) -> None:
    """The steps that use it are full, run again; the others are served."""
    assert either(late(twist), mode) == 3 * "FAFAFFFF"


@pytest.mark.parametrize("twist", [on_self, in_list, in_closure])
def test_what_is_kept_at_later_steps_only(twist: Any) -> None:
    """Where it comes into an output, what was there before is gone: an error, and nothing stale."""
    unet, plain, (x, c) = Twisted(late(twist)), Twisted(late(twist)), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=len(TIMES)):
        for k, t in enumerate(TIMES[:5]):
            assert torch.equal(unet(x, t, c), plain(x, t, c)) or k in (1, 3)
        with pytest.raises(ch.WrapError, match="must not keep the output of a skipped module for its next call"):  # noqa: PT012
            unet(x, TIMES[5], c)
            unet(x, TIMES[6], c)


class Exchanged(Twisted):
    """It counts nothing, so that no adaptor pass but the first is put back."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x) + torch.as_tensor(t) / 1000
        low = self.body(self.act(self.down(h)))
        out = self.head(torch.cat([h, self.up(low)], 1))
        return by_data(self, out, low) if t < 450 else out


def test_memory_that_is_exchanged_at_later_steps_only() -> None:
    """What was there before is gone with the first such step, and reading what is there now would crash the process."""
    unet, (x, c) = Exchanged(by_data), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=len(TIMES)):
        for t in TIMES[:5]:
            unet(x, t, c)
        with pytest.raises(ch.WrapError, match="must not keep the output of a skipped module for its next call"):
            unet(x, TIMES[5], c)


def read_and_caught(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """It is kept, and the next call reads it where every error is caught."""
    before = swap(unet.table, "low", low)
    return out + caught(lambda: float(torch.as_tensor(before).mean()))


def test_what_is_kept_at_later_steps_only_and_read_in_secret() -> None:
    unet, plain, (x, c) = Twisted(late(read_and_caught)), Twisted(late(read_and_caught)), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=len(TIMES)):
        for k, t in enumerate(TIMES[:6]):
            assert torch.equal(unet(x, t, c), plain(x, t, c)) or k in (1, 3, 5)
        with pytest.raises(ch.WrapError, match="must not keep the output of a skipped module for its next call"):
            unet(x, TIMES[6], c)


def test_a_later_pass_that_is_run_again_is_counted_once() -> None:
    """The first adaptor pass has shown that the modules change in a call: so copies are made before later ones too."""
    unet, plain, (x, c) = Twisted(late(counted)), Twisted(late(counted)), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=len(TIMES)):
        for t in TIMES:
            assert torch.equal(unet(x, t, c), plain(x, t, c)) or t >= 450
    assert unet.calls == plain.calls


@pytest.mark.filterwarnings("ignore:6 denoising steps without")
def test_one_that_always_uses_it_from_some_step_on_is_full() -> None:
    """Adaptor passes that are run again cost more than full ones: after eight, one after another, there are no more."""
    unet, plain, (x, c), calls = Twisted(late(added)), Twisted(late(added)), inputs(), 60
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=calls):
        for k in range(calls):
            t = 600.0 - 5 * k
            got, full = unet(x, t, c), plain(x, t, c)
            assert torch.equal(got, full) or t >= 450
    assert cw.stats.adaptor_passes == 15
    assert cw.stats.macs_run < cw.stats.macs_plain


def test_a_hook_that_reads() -> None:
    """A user's hook on a module that runs in every pass, and is given what is skipped."""

    class Probe(nn.Module):
        def forward(self, out: Tensor, low: Tensor) -> Tensor:
            """Nothing is made of the second one here."""
            return out + 0

    seen: list[float] = []
    unet, plain, (x, c) = Twisted(added), Twisted(added), inputs()
    for one in (unet, plain):
        one.probe = Probe()
        one.twist = lambda own, out, low: own.probe(out, low)
    cw = ch.wrap(unet)
    unet.probe.register_forward_hook(lambda module, args, output: seen.append(args[1].mean().item()))
    with torch.no_grad(), cw.trajectory(steps=4):
        for t in TIMES[:4]:
            assert torch.equal(unet(x, t, c), plain(x, t, c))
    assert len(seen) == 4
    assert len(set(seen)) == 4
    assert cw.stats.reasons[USED] == 1
    assert cw.stats.adaptor_passes == 0


# -- other passes ------------------------------------------------------------------------------------------------------


class TwoLevels(nn.Module):
    """One region inside the other; code between the modules reads a value of the outer one, or of the inner."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads = reads
        self.stem, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.down, self.up = nn.Conv2d(8, 16, 4, 2, 1), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.deeper, self.back = nn.Conv2d(16, 32, 4, 2, 1), nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.body, self.merge = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        """The time matters above."""
        h = self.stem(x) + torch.as_tensor(t) / 1000
        one = self.down(h)
        inner = self.body(self.deeper(one))
        outer = self.merge(torch.cat([one, self.back(inner)], 1))
        out: Tensor = self.head(torch.cat([h, self.up(outer)], 1))
        return out + {"inner": inner, "outer": outer, "nothing": out}[self.reads].mean().item()


@pytest.mark.filterwarnings("ignore:6 denoising steps without")
@pytest.mark.parametrize(("reads", "served"), [("inner", 0), ("outer", 0), ("nothing", 6)])
def test_regions_one_inside_the_other(reads: str, served: int) -> None:
    """Each region's first adaptor pass is proved."""
    unet, plain, (x, _) = TwoLevels(reads), TwoLevels(reads), inputs()
    regions = ch.find_regions(unet, x, TIMES[0])
    with torch.no_grad(), ch.wrap(unet, clocks={regions[0]: 2, regions[-1]: 4}) as cw, cw.trajectory(steps=8):
        for t in TIMES:
            assert torch.equal(unet(x, t), plain(x, t)) or served
        assert cw.stats.adaptor_passes == served


@pytest.mark.filterwarnings("ignore:6 denoising steps without")
@pytest.mark.parametrize("twist", [on_self, part_on_self])
def test_compiled_passes(twist: Any) -> None:
    """The first adaptor pass runs as it is, and shows it."""
    torch._dynamo.reset()
    unet, plain, (x, c) = Twisted(twist), Twisted(twist), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=8):
        cw.compile(backend="eager")
        for t in TIMES:
            assert torch.equal(unet(x, torch.tensor(t), c), plain(x, torch.tensor(t), c))
        assert cw.stats.adaptor_passes == 0
    torch._dynamo.reset()


def marked(graph: Any, inputs: Any) -> Callable[..., Any]:
    """A backend that shows in the output that its graph has run."""
    return lambda *args: [one + 64 if one.shape[1:2] == (2,) else one for one in graph(*args)]


class Saturating(Twisted):
    """Its Python does something else from the fourth call on, and the same ever after."""

    stage = 1

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        h = self.stem(x) + torch.as_tensor(t) / 1000
        low = self.body(self.act(self.down(h)))
        out = self.head(torch.cat([h, self.up(low)], 1))
        out = self.twist(self, out, low) if self.stage >= 4 else out
        self.stage = min(4, self.stage + 1)
        return out


def mentioned(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Something else is done, and nothing is used."""
    return out * 2


@pytest.mark.filterwarnings("ignore:6 denoising steps without")
@pytest.mark.parametrize(
    ("twist", "served", "stance"),
    [
        (added, "FAFFFFFF", "default"),
        (added, "FAFFFFFF", "force_eager"),
        (on_self, "FAFFFFFF", "default"),
        (part_on_self, "FAFFFFFF", "default"),
        (mentioned, "FAFAFAFA", "default"),
        (mentioned, "FAFAFAFA", "force_eager"),
    ],
)
def test_compiled_passes_of_a_unet_that_changes(twist: Twist, served: str, stance: Any) -> None:
    """Each graph is proved before it runs: by a pass that runs as it is, in the state that the graph is for."""
    torch._dynamo.reset()
    unet, plain, (x, c), letters = Saturating(twist), Saturating(twist), inputs(), ""
    graphs = 0
    with torch.no_grad(), ch.wrap(unet) as cw, torch.compiler.set_stance(stance):
        cw.compile(backend=marked)
        for run in range(3):
            before = None
            with cw.trajectory(steps=8):
                for t in TIMES:
                    got, state = unet(x, torch.tensor(t), c), dict(vars(plain))
                    graphs += bool((got > 32).all()) and run == 2
                    got = torch.where(got > 32, got - 64, got)
                    full, exit = reference(plain, x, torch.tensor(t), c)
                    if torch.allclose(got, full, atol=1e-4):
                        letters += "F"
                    else:
                        vars(plain).clear()
                        vars(plain).update(state)
                        exit = before
                        assert torch.allclose(
                            got, reference(plain, x, torch.tensor(t), c, exit=before)[0], atol=1e-4
                        ), t
                        letters += "A"
                    before = exit
    assert letters[:8] == served
    assert set(letters[8:]) == set(served[4:])
    if twist is mentioned:
        assert graphs == (8 if stance == "default" else 0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:6 denoising steps without")
def test_another_size() -> None:
    """Of those, too, the first adaptor pass shows it."""
    twist: Twist = lambda unet, out, low: out + low.mean().item() if out.shape[-1] > 8 else out  # noqa: E731
    unet, plain = Twisted(twist), Twisted(twist)
    with torch.no_grad(), ch.wrap(unet) as cw:
        for size, served in ((8, 4), (16, 4), (8, 8)):
            x, c = torch.randn(2, 2, size, size), torch.randn(2, 3)
            with cw.trajectory(steps=8):
                for t in TIMES:
                    assert torch.equal(unet(x, t, c), plain(x, t, c)) or size == 8
            assert cw.stats.adaptor_passes == served


# -- no false alarm ----------------------------------------------------------------------------------------------------


def shape(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Shapes are known."""
    return out + torch.ones_like(low).mean() + low.shape[1] + len(low) + low.new_zeros(1)


def checked(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """What runs in every pass is looked at."""
    if torch.isnan(out).any():
        raise ValueError
    unet.last = out.mean().item()
    return out


def computed(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Something is made of it, and dropped."""
    unused = torch.cat([low.float(), low * 2], 1).flatten(1).softmax(1) + out.mean()
    return out + unused.shape[1]


def recursive(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """A function that calls itself holds its variables until they are collected."""

    def count(k: int) -> int:
        return 0 if k > low.shape[0] else 1 + count(k + 1)

    return out + count(0)


def dropped(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """It is held for this call only."""
    unet.held.append(low)
    unet.held.clear()
    return out


def selected(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Which rows are taken says a mask that is no part of it."""
    rows = torch.ones(len(low), dtype=torch.bool)
    return out + low[rows].shape[0] + low.masked_select(rows[:, None, None, None]).ndim


def in_evaluation(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """A norm reads its running statistics, and writes none."""
    torch.nn.functional.batch_norm(low, torch.zeros(low.shape[1]), torch.ones(low.shape[1]))
    return out


@torch.jit.script
def scripted_size(low: Tensor) -> int:
    return low.size(0) + low.dim() + low.numel() if low.is_floating_point() else 0


def scripted(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """TorchScript asks for sizes in its own way."""
    return out + scripted_size(low)


def changed(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """What is made of it is written to, and seen as another shape, also one that lies elsewhere in its memory."""
    made = torch.cat([low, low * 2], 1)
    made.mul_(2)[:, 1:2] = 0
    part = made[:, 2:].transpose(1, 2)
    part.add_(1)
    unet.table["shape"] = out.new_zeros(part.as_strided((2, 3), (3, 1), 5).shape + part.contiguous().view(-1).shape[:0])
    return out + sum(one.shape[1] for one in made.chunk(2, 1)) + part.stride(2) + part.storage_offset()


@pytest.mark.parametrize(
    "twist", [shape, checked, computed, recursive, dropped, selected, scripted, in_evaluation, changed]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_needs_no_value_is_served(twist: Any, mode: Any) -> None:
    assert either(twist, mode) == 3 * "FAFAFAFA"
    assert either(twist, mode, clock=4) == 3 * "FAAAFAAA"


def test_what_is_made_of_it_is_computed_once() -> None:
    """From the second time on its form is known, and nobody reads more: no kernel runs."""
    kernels = []

    def glue(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
            torch.cat([low, out.new_ones(2, 3, *low.shape[2:])], 1).flatten(1).softmax(1)
        names = [row.key for row in seen.key_averages() for _ in range(row.count)]
        kernels.append((names.count("aten::cat"), names.count("aten::_softmax")))
        return out

    unet, (x, c) = Twisted(glue), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=len(TIMES)):
        for t in TIMES:
            unet(x, t, c)
    assert cw.stats.adaptor_passes == 4
    # an operator of a placeholder is seen, and so is that of zeros where it is computed: in the first adaptor pass
    assert min(kernels[1]) >= 2
    assert kernels[2:] == [(1, 1)] * 6


def in_place(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Zeros that share one number cannot be written to."""
    low.add_(1)
    return out


def as_complex(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """Nor be seen as complex numbers."""
    return out + torch.view_as_complex(low.reshape(-1, 2)).ndim


def caught_error(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
    """The UNet goes on in another way."""
    try:
        return as_complex(unet, out, low)
    except RuntimeError:
        return out * 2


@pytest.mark.parametrize("twist", [in_place, as_complex, caught_error])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_error_of_what_stands_in_is_nobodys(twist: Any, mode: Any) -> None:
    """An operator refuses it that takes the real one: the pass is full."""
    assert either(late(twist), mode) == 3 * "FAFAFFFF"


def test_an_error_of_the_unet_is_its_own() -> None:
    """It comes again in the full pass, and is raised."""

    def fails(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
        if unet.now == TIMES[3]:
            raise KeyError("of its own")
        return out

    unet, (x, c) = Twisted(fails), inputs()
    cw = ch.wrap(unet)
    with torch.no_grad(), cw.trajectory(steps=8):
        for t in TIMES[:3]:
            unet(x, t, c)
        with pytest.raises(KeyError, match="of its own"):
            unet(x, TIMES[3], c)
        unet(x, TIMES[4], c), unet(x, TIMES[5], c)
    assert cw.stats.adaptor_passes == 2


def test_an_error_that_comes_once_is_raised() -> None:
    """Somebody ends the run by it, and takes that back: no full pass hides it."""

    class Interrupted(Exception):
        pass

    def interrupted(unet: Twisted, out: Tensor, low: Tensor) -> Tensor:
        if unet.now == TIMES[3] and unet.last is None:
            unet.last = True
            raise Interrupted
        return out

    unet, (x, c) = Twisted(interrupted), inputs()
    with torch.no_grad(), ch.wrap(unet) as cw, cw.trajectory(steps=8):
        for t in TIMES[:3]:
            unet(x, t, c)
        with pytest.raises(Interrupted):
            unet(x, TIMES[3], c)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_adaptor_writes_to_nothing_of_the_unets(mode: Any, compiled: bool) -> None:
    """What flows into the region flows past it, too."""

    def clamps(entry: Tensor, exit_cached: Tensor, *, time: Any = None, text: Any = None) -> Tensor:
        return exit_cached + entry.relu_().mean()

    unet, (x, c) = Twisted(lambda unet, out, low: out), inputs()
    with mode(), ch.wrap(unet, clamps) as cw, cw.trajectory(steps=len(TIMES)):
        if compiled:
            cw.compile(backend="eager")
        unet(x, TIMES[0], c)
        with pytest.raises(ch.AdaptorError, match="written to: entry"):
            unet(x, TIMES[1], c)


def test_an_error_of_the_adaptor_is_its_own() -> None:
    """No full pass hides it."""

    def fails(entry: Tensor, exit_cached: Tensor, *, time: Any, text: Any) -> Tensor:
        raise KeyError("the adaptor's")

    unet, (x, c) = Twisted(checked), inputs()
    with torch.no_grad(), ch.wrap(unet, fails) as cw, cw.trajectory(steps=8):  # type: ignore[arg-type]
        unet(x, TIMES[0], c)
        with pytest.raises(KeyError, match="the adaptor's"):
            unet(x, TIMES[1], c)
