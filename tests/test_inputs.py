"""Which argument is the sample, which the time, and which trace serves which call."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clockwork_hooks as ch
from clockwork_hooks.graph.arguments import Arguments, Binder, find_sample, is_number, time_candidates
from tests import small_unet
from tests.bendable import Tiny, noise, outputs, proven
from tests.oracle import Judge
from tests.zoo.proof import same

X, T = torch.zeros(2, 3, 16, 16), torch.tensor([3.0, 3.0])


def bound(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Arguments:
    return Binder(forward)(args, kwargs)


# -- names --------------------------------------------------------------------------------------------------------


def test_arguments_get_their_parameters_names() -> None:
    def forward(sample: Any, timestep: Any, *rest: Any, flag: Any = None, **more: Any) -> None: ...

    arguments = bound(forward, X, 3, "a", "b", flag=True, added={"ids": (T, None)})
    assert list(arguments.values) == ["sample", "timestep", "rest[0]", "rest[1]", "flag", "added"]
    paths = [path for path, _ in arguments.leaves()]
    assert paths == ["sample", "timestep", "rest[0]", "rest[1]", "flag", "added.ids.0", "added.ids.1"]
    assert arguments.get("added.ids.0") is T
    assert arguments.get("added.ids.7") is None
    assert arguments.get("nowhere") is None


def test_arguments_of_a_forward_without_a_signature() -> None:
    assert list(bound(print, X, 3, sep="").values)[2] == "sep"
    assert list(bound(lambda *args: None, X, 3).values) == ["args[0]", "args[1]"]
    assert list(bound(lambda x: None, X, 3).values) == ["x", "argument[1]"]
    assert list(bound(SimpleNamespace(__signature__=None, __call__=None), X).values) == ["argument[0]"]  # type: ignore[arg-type]


def test_the_same_call_has_the_same_signature_and_others_have_others() -> None:
    def forward(x: Any, t: Any, y: Any = None, extra: Any = None) -> None: ...

    base = bound(forward, X, 3, T, {"a": X, "n": 1, "flag": True}).signature
    assert hash(base) == hash(bound(forward, X + 1, 4, T + 1, {"a": X + 2, "n": 5, "flag": True}).signature)
    assert base == bound(forward, X + 1, 4, T + 1, {"a": X + 2, "n": 5, "flag": True}).signature
    others = [
        bound(forward, X[:1], 3, T, {"a": X, "n": 1, "flag": True}),
        bound(forward, X.half(), 3, T, {"a": X, "n": 1, "flag": True}),
        bound(forward, X.to("meta"), 3, T, {"a": X, "n": 1, "flag": True}),
        bound(forward, X, T, T, {"a": X, "n": 1, "flag": True}),
        bound(forward, X, 3.0, T, {"a": X, "n": 1, "flag": True}),
        bound(forward, X, 3, None, {"a": X, "n": 1, "flag": True}),
        bound(forward, X, 3, T, {"a": X[:1], "n": 1, "flag": True}),
        bound(forward, X, 3, T, {"a": X, "n": 1, "flag": False}),
        bound(forward, X, 3, T, {"a": X, "n": 1}),
        bound(forward, X, 3, T),
    ]
    signatures = [other.signature for other in others]
    assert base not in signatures
    assert len(set(signatures)) == len(signatures)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, True),
        (3.0, True),
        (np.float32(3), True),
        (np.int64(3), True),
        (np.array(3), True),
        (True, False),
        (torch.tensor(3), False),
        ("3", False),
        (None, False),
        (np.zeros(3), False),
        ([3], False),
    ],
)
def test_numbers(value: Any, number: bool) -> None:
    assert is_number(value) is number


# -- sample and time ----------------------------------------------------------------------------------------------


def sample_and_times(**kwargs: Any) -> tuple[str | None, tuple[str, ...]]:
    arguments = bound(lambda **keywords: None, **kwargs)
    sample = find_sample(arguments)
    return sample, time_candidates(arguments, sample=sample)


@pytest.mark.parametrize(
    ("kwargs", "sample", "times"),
    [
        ({"x": X, "t": T}, "x", ("t",)),
        ({"mask": X, "sample": X, "timestep": 3}, "sample", ("timestep",)),
        ({"tokens": X.long(), "latent_image": X}, "latent_image", ()),
        ({"tokens": X.long(), "y": T}, "tokens", ("y",)),
        ({"h": X, "class_labels": T, "fps": T}, "h", ("class_labels", "fps")),
        ({"h": X, "class_labels": T, "sigma": T}, "h", ("sigma",)),
        ({"h": X, "labels": T, "c_noise_label": T}, "h", ("c_noise_label",)),
        ({"h": X, "flag": torch.tensor([True, False]), "when": T[:, None, None, None]}, "h", ("when",)),
        ({"h": X, "text": torch.zeros(2, 5, 8), "pooled": torch.zeros(2, 8)}, "h", ()),
        ({"h": X, "verbose": True, "mode": "full", "when": 3}, "h", ("when",)),
        ({"vector": torch.zeros(2, 8)}, None, ()),
        ({"image": X, "x_t": X, "t": T}, "x_t", ("t",)),
        ({"image": X, "noisy_mask": X, "t": T}, "noisy_mask", ("t",)),
        ({"noisy_image": X, "x": X, "t": T}, "x", ("t",)),
        ({"z": X, "x": X, "t": T}, "z", ("t",)),
    ],
)
def test_who_is_sample_and_time(kwargs: dict[str, Any], sample: str | None, times: tuple[str, ...]) -> None:
    assert sample_and_times(**kwargs) == (sample, times)


TIMES: dict[str, Callable[[float], Any]] = {
    "int": int,
    "float": float,
    "numpy": np.float32,
    "0-dim": torch.tensor,
    "(1,)": lambda t: torch.tensor([t]),
    "(B,)": lambda t: torch.full((2,), t),
    "(B, 1)": lambda t: torch.full((2, 1), t),
    "long": lambda t: torch.full((2,), int(t)),
}


def test_an_image_that_comes_before_the_sample_is_a_condition() -> None:
    """As where a mask is made for an image: the image stays, and the sample is another one in each step."""

    class Masks(Tiny):
        def forward(self, image: Any, x_t: Any, t: Any) -> Any:  # type: ignore[override]
            return super().forward(image + x_t, t)

    model, image, times = Masks(), noise(), torch.tensor([0.9, 0.8, 0.7, 0.6])
    with torch.no_grad(), ch.wrap(model) as cw:
        for t in times:
            model(image, torch.randn_like(image), t.expand(2))
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 2), cw.report()
        for t in times.clone():
            model(image, torch.randn_like(image), t.expand(2))
            model(torch.randn_like(image), torch.randn_like(image), t.expand(2))  # another image each time
        assert cw.stats.adaptor_passes == 4


@pytest.mark.parametrize("form", TIMES)
@pytest.mark.parametrize("how", ["positional", "keyword", "star"])
def test_a_time_of_any_form_ticks(form: str, how: str) -> None:
    class Star(Tiny):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    model = Star() if how == "star" else Tiny()
    make = TIMES[form]

    def call(t: float) -> Any:
        return model(noise(), t=make(t)) if how == "keyword" else model(noise(), make(t))

    times = (9.0, 8.0, 7.0, 6.0)
    expected = outputs(call, times)
    with ch.wrap(model) as cw, cw.trajectory():
        results = outputs(call, times)
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 2), cw.report()
    assert [same(a, b) for a, b in zip(results, expected, strict=True)] == [True, False, True, False]


class OddName(Tiny):
    """The time is called `noise_amount`; another input of its shape, `strength`, is no time."""

    def forward(self, x: Tensor, strength: Any, noise_amount: Any) -> Any:
        return super().forward(x, noise_amount) * strength.reshape(-1, 1, 1, 1)


def test_a_time_under_an_odd_name_is_what_feeds_sine_and_cosine() -> None:
    traced = ch.trace(OddName(), noise(), T, torch.tensor([7.0, 7.0]))
    assert (traced.times, traced.time, traced.context) == (("noise_amount",), "noise_amount", ("strength",))


def test_sine_of_the_sample_s_own_making_tells_nothing() -> None:
    """`late` meets the sample before any sine."""

    class Late(OddName):
        def forward(self, x: Tensor, late: Any, noise_amount: Any) -> Any:
            return torch.sin(super().forward(x, torch.ones(2), noise_amount) + late.reshape(-1, 1, 1, 1))

    assert ch.trace(Late(), noise(), T, torch.tensor([7.0, 7.0])).time == "noise_amount"


def test_two_numbers_without_any_wave_are_ambiguous_too() -> None:
    class Linear(OddName):
        def time(self, t: Any, like: Tensor) -> Tensor:
            return self.embed(t.reshape(-1, 1).expand(-1, 8))[:, :, None, None]

    with pytest.raises(ch.AmbiguousInputError, match="strength, noise_amount"):
        _ = ch.trace(Linear(), noise(), T, torch.tensor([7.0, 7.0])).time


class Ambiguous(Tiny):
    """Two embedded numbers a row, and no name that tells."""

    def low(self, h: Tensor, t: Any) -> Tensor:
        return self.up(self.body(self.down(h) + self.time(t[0], h) + self.time(t[1], h)))

    def forward(self, x: Tensor, fps: Any, bucket: Any) -> Any:
        return super().forward(x, (fps, bucket))


def test_an_ambiguous_time_is_asked_for() -> None:
    model, one, two = Ambiguous(), T, torch.tensor([7.0, 7.0])
    traced = ch.trace(model, noise(), one, two)
    assert traced.times == ("fps", "bucket")
    with pytest.raises(ch.AmbiguousInputError, match="fps, bucket") as caught:
        _ = traced.time
    assert 'name it: time="fps"' in str(caught.value)
    before = outputs(lambda t: model(noise(), one, t), (two,))
    with ch.wrap(model) as cw, cw.trajectory(), pytest.raises(ch.AmbiguousInputError):
        model(noise(), one, two)
    assert same(outputs(lambda t: model(noise(), one, t), (two,)), before)  # left unwrapped, and working
    with ch.wrap(model, time="bucket") as cw, cw.trajectory():
        outputs(lambda t: model(noise(), one, torch.full((2,), t)), (9.0, 8.0, 7.0, 6.0))
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (2, 2), cw.report()
    with ch.wrap(model, time="nowhere") as cw, cw.trajectory(), pytest.raises(ch.ArgumentError, match="fps, bucket"):
        model(noise(), one, two)
    region = ch.find_region(model, noise(), one, two)
    assert region.times == ("fps", "bucket")
    with ch.wrap(model, region=region) as cw, cw.trajectory(), pytest.raises(ch.AmbiguousInputError):
        model(noise(), one, two)
    with ch.wrap(model, region=region, time="bucket") as cw, cw.trajectory():
        outputs(lambda t: model(noise(), one, torch.full((2,), t)), (9.0, 8.0))
        assert cw.stats.adaptor_passes == 1


class Labelled(Tiny):
    """A time in a form that nobody looks for, and a class label."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(20, 8)

    def forward(self, x: Tensor, frames: Any, y: Any) -> Any:
        return super().forward(x, frames.mean(1)) + self.classes(y).mean()


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
def test_a_class_label_is_no_time() -> None:
    """With a time for each frame, guidance in two calls would look like two steps: the label falls from 10 to 3."""
    model, labels = Labelled(), [torch.full((2,), k) for k in (10, 3)]
    assert ch.trace(model, noise(), torch.ones(2, 4), labels[0]).times == ()
    judge = Judge(model, path="up")
    with ch.wrap(model) as cw, cw.trajectory(), torch.no_grad():
        for step, t in enumerate((9.0, 8.0, 7.0, 6.0), 1):
            for branch, label in enumerate(labels):
                judge.call(noise(), torch.full((2, 4), t), label, step=step, branch=branch)
        assert judge.letters == "F" * 8
        assert cw.stats.reasons == {"no time input: declare cw.step()": 8}
        judge.letters = ""
        for step, t in enumerate((9.0, 8.0, 7.0, 6.0), 1):
            cw.step()
            for branch, label in enumerate(labels):
                with cw.branch(str(branch)):
                    judge.call(noise(), torch.full((2, 4), t), label, step=step, branch=branch)
        assert judge.letters == "FFAAFFAA"


@pytest.mark.parametrize("name", ["nothing", "name", "time="])
def test_a_time_by_embedding_is_told_by_its_name(name: str) -> None:
    """An integer that is looked up in a table may be a class label as well."""

    class Steps(Labelled):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            (k,) = (*args, *kwargs.values())
            return super().forward(x, torch.ones(2, 4), k)

    model = Steps()
    with ch.wrap(model, time="k" if name == "time=" else None) as cw, cw.trajectory(), torch.no_grad():
        for k in (4, 3, 2, 1):
            model(noise(), **{"timestep" if name == "name" else "k": torch.full((2,), k)})
        assert cw.stats.adaptor_passes == (0 if name == "nothing" else 2)


def test_a_unet_without_time_runs_full_until_steps_are_declared() -> None:
    class Timeless(Tiny):
        def low(self, h: Tensor, t: Any) -> Tensor:
            return self.up(self.body(self.down(h)))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x, None)

    model = Timeless()
    traced = ch.trace(model, noise())
    assert (traced.time, traced.times, traced.context) == (None, (), ())
    proven(model, noise())
    with ch.wrap(model) as cw, torch.no_grad():
        for _ in range(3):
            model(noise())
        assert cw.stats.adaptor_passes == 0
        for _ in range(4):
            with cw.step():
                model(noise())
        assert cw.stats.adaptor_passes == 2


def test_every_sample_free_input_of_a_region_is_a_side_of_its_kind() -> None:
    class Sided(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Linear(6, 32)
            self.table = [torch.ones(1, 32, 1, 1)]

        def forward(self, x: Tensor, t: Any, text: Tensor, late: Tensor) -> Any:
            h = self.stem(x)
            words = self.text(text).mean(1)[:, :, None, None]
            low = self.up(self.body(self.down(h) * words * self.table[0] + self.time(t, h)))
            return self.join(h, low) + late

    region = proven(Sided(), noise(), T, torch.ones(2, 5, 6), X)
    assert {(side.kind, side.inputs) for side in region.sides} == {("time", ("t",)), ("context", ("text",))}


# -- an empty batch -----------------------------------------------------------------------------------------------


def test_an_empty_batch_is_a_plain_full_pass_and_nothing_is_learned_of_it() -> None:
    unet, empty = Tiny().eval(), noise()[:0]
    expected = unet(empty, T[:0])
    with ch.wrap(unet) as cw:
        for _ in range(2):
            assert torch.equal(unet(empty, T[:0]), expected)
        assert dict(cw.stats.reasons) == {"the batch is empty": 2}
        assert cw.regions == ()
        for step in range(4):
            unet(noise(), T - step / 4)
        assert len(cw.regions) == 1
        assert cw.stats.reasons["first step"] == 1


def scaled(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(self: Any, x: Tensor, scale: Any, t: Any, c: Any = None) -> Any:
        return forward(self, x * scale, t, c)

    return call


def turned(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(self: Any, t: Any, x: Tensor, *rest: Any) -> Any:
        return forward(self, x, t, *rest)

    return call


def handed_on(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        return forward(self, *arguments, **options)

    return call


@torch.no_grad()
@pytest.mark.parametrize("decorate", [scaled, turned, handed_on])
def test_a_decorated_forward_is_called_by_its_own_parameters(decorate: Any) -> None:
    """`functools.wraps` shows those of the function inside: the time went by another name, and nothing was saved."""

    class UNet(small_unet.Tiny):
        forward = decorate(small_unet.Tiny.forward)

    unet, x, c = UNet(), torch.randn(1, 2, 8, 8), torch.randn(1, 3)
    calls = {scaled: lambda t: (x, 0.5, t, c), turned: lambda t: (t, x, c), handed_on: lambda t: (x, t, c)}
    with ch.wrap(unet, schedule=lambda step: True) as cw:
        for t in torch.linspace(900, 200, 8):
            unet(*calls[decorate](t))
        assert cw.stats.adaptor_passes == 7
        assert cw.region is not None
        assert cw.region.sample == "x"
        assert cw.region.times == ("t",)


class TwoConditions(small_unet.Tiny):
    def forward(self, x: Tensor, t: Any, c: Tensor, d: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, c + 2 * d)


def test_a_tensor_that_is_two_inputs_in_the_first_call_is_read_as_both() -> None:
    """Which of the two is read cannot be seen: none is taken for one that nobody reads."""
    same = torch.ones(2, 3)
    with torch.no_grad(), ch.wrap(TwoConditions(), clock=2) as cw:
        cw.unet(torch.zeros(2, 2, 16, 16), 900, same, same)
        cw.stats.clear()
        with cw.trajectory():
            for t in (900, 700, 500, 300):
                cw.unet(torch.zeros(2, 2, 16, 16), t, torch.full((2, 3), t / 100), same)
        assert cw.stats.adaptor_passes == 0
        assert cw.stats.reasons["conditions are new in this step"] == 2


def test_the_sample_may_come_twice() -> None:
    class Beside(small_unet.Tiny):
        def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y / 2, t)

    x = torch.ones(2, 2, 16, 16)
    with torch.no_grad(), ch.wrap(Beside(), clock=2) as cw, cw.trajectory(), cw.branch("one"):
        for t in (900, 700, 500, 300):
            cw.unet(x, t, x)
        assert cw.region is not None
