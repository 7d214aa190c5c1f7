"""Arguments that tell nothing: the time in another form, what no operator reads, what the user ignores or names."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.clock.times import TimeForms
from clockwork_hooks.errors import ArgumentError, NoEffectWarning
from tests.oracle import Judge
from tests.small_unet import Tiny
from tests.snapshot import snapshot

TIMES = torch.linspace(900, 100, 9)


class Steered(Tiny):
    """Takes options as ComfyUI's UNet does: they steer branches in the region and outside of it.

    Of the options: `number` is multiplied into the region and into the head and decides which way the region goes,
    `tensor` is read in the region from the time 400 on, in no earlier call.
    """

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, options: Any = None, **more: Any) -> Tensor:
        options = options or {}
        options["block"] = ("input", len(options))  # as ComfyUI's does: it writes to what it was given
        number, tensor = options.get("number", 0.0), options.get("tensor")
        h = self.stem(x) + self.emb(torch.as_tensor(t).reshape(-1, 1) / 100).sin()[:, :, None, None]
        z = self.down(h)
        if c is not None:
            z = z + self.side(c)[:, :, None, None]
        if number > 0.55:
            z = z * 1.5
        if tensor is not None and t < 400:
            z = z + tensor.mean()
        z = self.up(self.body(self.act(z)) * (1 + number))
        return self.head(torch.cat([h, z], 1) * (1 + number if number < 0.35 else 1))


def with_time(step: int, branch: int, call: int) -> float:
    return (step + 1) / 10


def constant(step: int, branch: int, call: int) -> float:
    return 0.25


def by_branch(step: int, branch: int, call: int) -> float:
    return 0.2 + branch / 2


def one_jump(step: int, branch: int, call: int) -> float:
    return 0.3 if step < 6 else 0.8


def anyhow(step: int, branch: int, call: int) -> float:
    return (call * 0.61803398875) % 1


VALUES: dict[str, Callable[[int, int, int], float]] = {
    one.__name__: one for one in (with_time, constant, by_branch, one_jump, anyhow)
}
NO_CONDITION = ("with_time", "constant")


def run(
    number: str | None, tensor: str | None, *, branches: int, embeddings: bool, order: list[bool], own: bool
) -> tuple[str, ch.ClockworkWrapper]:
    """A trajectory of eight steps that always asks for the adaptor, checked call by call."""
    unet = Steered()
    judge, random = Judge(unet), torch.Generator().manual_seed(0)
    conditions = [torch.randn(1, 3, generator=random) for _ in range(branches)] if embeddings else [None] * branches
    exits: dict[str, Any] = {}
    before: dict[tuple[int, str], float] = {}
    calls, times = 0, TIMES.clone()
    with torch.no_grad(), ch.wrap(unet, schedule=lambda step: True) as cw:
        for step in range(len(times) - 1):
            turn = range(branches) if not order[step] else reversed(range(branches))
            for branch in turn:
                calls += 1
                inputs = {
                    "number": VALUES[number](step, branch, calls) if number else None,
                    "tensor": VALUES[tensor](step, branch, calls) if tensor else None,
                }
                inputs = {name: value for name, value in inputs.items() if value is not None}
                matters = {"number": number != "with_time", "tensor": tensor != "with_time" and times[step] < 400}
                if any(matters[name] and before.get((branch, name), inputs[name]) != inputs[name] for name in inputs):
                    judge.forget(branch)
                before |= {(branch, name): value for name, value in inputs.items()}
                options = exits if own else {}
                options.pop("block", None)
                options.update(inputs)
                if "tensor" in inputs:
                    options["tensor"] = torch.full((2,), inputs["tensor"])
                judge.call(
                    torch.randn(1, 2, 8, 8, generator=random),
                    times[step],
                    conditions[branch],
                    options,
                    step=step,
                    branch=branch,
                )
                options.pop("block", None)
    return judge.letters, cw


PATTERNS = st.sampled_from([None, *VALUES])


@settings(max_examples=int(os.environ.get("CLOCKWORK_EXAMPLES", 60)))
@given(PATTERNS, PATTERNS, st.integers(1, 2), st.booleans(), st.lists(st.booleans(), min_size=8, max_size=8))
@pytest.mark.filterwarnings("ignore::clockwork_hooks.errors.NoEffectWarning")
def test_options_steer_branches_in_the_region_and_outside(
    number: str | None, tensor: str | None, branches: int, own: bool, order: list[bool]
) -> None:
    letters, _ = run(number, tensor, branches=branches, embeddings=True, order=order, own=own)
    event(f"adaptor passes: {letters.count('A')}")


@pytest.mark.parametrize(
    ("number", "tensor", "passes"),
    [
        (None, "with_time", "FAAAAAAA"),  # sigmas: no operator has read them
        ("with_time", None, "FFFAAAAA"),  # a percentage: believed after three equal strides
        ("with_time", "with_time", "FFFAAAAA"),
        ("constant", "constant", "FAAAAAAA"),
        (None, "one_jump", "FAAAAAFA"),
        ("one_jump", None, "FAAAAAFA"),
        ("anyhow", None, "FFFFFFFF"),
    ],
)
@pytest.mark.filterwarnings("ignore::clockwork_hooks.errors.NoEffectWarning")
def test_what_goes_with_the_time_is_no_condition(number: str | None, tensor: str | None, passes: str) -> None:
    assert run(number, tensor, branches=1, embeddings=True, order=[False] * 8, own=False)[0] == passes


class Reads(Tiny):
    """Its region computes with another argument, as attention that is handed the time again."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, options: Any = None, **more: Any) -> Tensor:
        h = self.stem(x) + self.emb(torch.as_tensor(t).reshape(-1, 1) / 1000).sin()[:, :, None, None]
        z = self.up(self.body(self.act(self.down(h) * (1 + options["timestep"] / 1000))))
        return self.head(torch.cat([h, z], 1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["item of a list", "tensor", "other"])
def test_the_time_itself_handed_over_again_is_no_condition(kind: str) -> None:
    """Integers, as diffusers' are. Another time in its place is a condition."""
    unet, times = Reads(), torch.arange(800, 0, -100)
    judge = Judge(unet)
    with ch.wrap(unet, clock=2) as cw, cw.trajectory():
        for step, item in enumerate(times):
            t = item if kind == "item of a list" else item.clone()
            again = times[0] if kind == "other" and step == 5 else t
            if step in (5, 6) and kind == "other":
                judge.forget(0)
            judge.call(torch.randn(1, 2, 8, 8), t, None, {"timestep": again}, step=step)
    assert judge.letters == ("FAFAFFFA" if kind == "other" else "FAFAFAFA"), cw.report()


@pytest.mark.parametrize("pattern", ["by_branch", "anyhow"])
@pytest.mark.filterwarnings("ignore::clockwork_hooks.errors.NoEffectWarning")
def test_what_alone_tells_the_branches_is_a_condition(pattern: str) -> None:
    """Without an embedding, in an order that changes: the judge would see one branch's feature in the other."""
    for number, tensor in ((pattern, None), (None, pattern)):
        order = [False, True, True, False, True, False, False, True]
        letters, _ = run(number, tensor, branches=2, embeddings=False, order=order, own=False)
        assert letters.count("A") == (14 if pattern == "by_branch" else 0), letters


def test_a_form_that_departs_from_the_time_is_a_condition_again() -> None:
    forms, values = TimeForms(), [0, 1, 2, 3, 4, 4, 6]
    assert [0 in forms.among(900.0 - k, ["n"], [value]) for k, value in enumerate(values)] == [
        *(False, False, False, True, True),
        *(False, False),
    ]
    forms.begin()
    assert [0 in forms.among(9.0, ["u"], [torch.ones(2) * k], ["u"]) for k in range(3)] == [False] * 3
    forms.begin()
    unread = [0 in forms.among(9.0 - k // 2, ["u"], [torch.full((2, 3), k // 2)], ["u"]) for k in range(6)]
    assert unread == [False, False, True, True, True, True]
    forms.begin()  # it is no number
    assert not any(forms.among(9.0 - k, ["u"], [torch.tensor([1.0, k])], ["u"]) for k in range(6))


# -- what the user says ---------------------------------------------------------------------------------------------


def loop(cw: Any, make: Callable[[int], dict[str, Any]]) -> str:
    letters, x, times = "", torch.zeros(1, 2, 8, 8), TIMES.clone()
    with torch.no_grad():
        for k in range(8):
            was = cw.stats.adaptor_passes
            cw(x, times[k], **make(k))
            letters += "FA"[cw.stats.adaptor_passes - was]
    return letters


def test_a_text_that_changes_in_each_step_is_named_and_ignored() -> None:
    def make(k: int) -> dict[str, Any]:
        return {"options": {"uuids": [f"{k}"], "tensor": torch.ones(k + 1)}}

    with ch.wrap(Steered()) as cw, pytest.warns(NoEffectWarning, match=r'ignore=\("options.uuids.0"'):
        assert loop(cw, lambda k: {"options": {"uuids": [f"{k} {object()}".__hash__() * 0.5]}}) == "FFFFFFFF"
    with ch.wrap(Steered(), ignore=("options.uuids", "options.tensor")) as cw:
        assert loop(cw, make) == "FAFAFAFA"
        assert cw.stats.reasons == {"first step": 1, "scheduled": 3}


class Noting(Tiny):
    """A client hands over a dictionary in which it takes notes: it holds more at every call."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        notes = more["options"]["notes"]
        notes[str(len(notes))] = x.mean()
        return super().forward(x, t, c)


@pytest.mark.parametrize("path", ["options", "options.notes"])
def test_what_is_ignored_may_hold_more_at_every_call(path: str) -> None:
    unet, notes, x = Noting(), {"7": torch.ones(1)}, torch.randn(1, 2, 16, 16)
    with ch.wrap(unet, ignore=path) as cw, torch.no_grad():
        for t in torch.linspace(900, 0, 6):
            unet(x, t, options={"notes": notes})
        assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (3, 3), cw.report()
        assert set(cw.stats.reasons) == {"first step", "scheduled"}


def test_ignored_by_the_name_of_a_parameter() -> None:
    with ch.wrap(Tiny(), ignore="c") as cw, torch.no_grad():
        for k, t in enumerate(TIMES.clone()[:8]):
            cw(torch.zeros(1, 2, 8, 8), t, torch.full((1, 3), k % 3 / 2))
    assert (cw.stats.full_passes, cw.stats.adaptor_passes) == (4, 4)


@torch.no_grad()
def test_a_path_to_ignore_that_is_not_there_is_told() -> None:
    with ch.wrap(Tiny(), ignore=("options.uuid",)) as cw, pytest.warns(NoEffectWarning) as warned:
        loop(cw, lambda k: {"options": {"uuids": (k * 0.37) % 1}})
    assert "options.uuids\n  ignore= names what is not among the arguments: options.uuid\n" in str(warned[0].message)


@pytest.mark.parametrize("path", ["x", "t"])
def test_sample_and_time_cannot_be_ignored(path: str) -> None:
    unet = Tiny()
    cw = ch.wrap(unet, ignore=(path,))
    with pytest.raises(ArgumentError, match="leave it out of ignore="):
        cw(torch.zeros(1, 2, 8, 8), 900.0)
    assert "forward" not in vars(unet)


@pytest.mark.parametrize(("options", "error"), [({"ignore": (1,)}, "dotted paths"), ({"branch": "a"}, "branch= is")])
def test_options_that_are_none(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ArgumentError, match=error):
        ch.wrap(Tiny(), **options)


@torch.no_grad()
def test_a_key_names_the_branch() -> None:
    """The embeddings are made anew with other values in each step, and the order changes."""
    unet, random = Tiny(), torch.Generator().manual_seed(0)
    judge = Judge(unet)
    with ch.wrap(unet, schedule=lambda step: True, branch=lambda args: args["kind"]):
        for step, t in enumerate(TIMES.clone()[:8]):
            for branch in ("cond", "uncond")[:: -1 if step % 3 else 1]:
                c = torch.randn(1, 3, generator=random)
                judge.call(torch.zeros(1, 2, 8, 8), t, c, kind=branch, step=step, branch=branch)
    assert judge.letters == "FF" + "A" * 14


@pytest.mark.parametrize("key", [[1], torch.zeros(1), ("cond", torch.zeros(2))], ids=["list", "tensor", "of tensors"])
def test_a_key_has_to_be_hashable(key: Any) -> None:
    """A tensor can be, but it is equal to itself whatever was written to it since the step before."""
    with ch.wrap(Tiny(), branch=lambda args: key) as cw, pytest.raises(ArgumentError, match="can be hashed"):
        cw(torch.zeros(1, 2, 8, 8), 900.0)


@torch.no_grad()
def test_a_dictionary_that_the_model_writes_to_is_compared_as_it_was_given() -> None:
    """Within an object, which is no container of arguments: the first call is recorded, and writes to it."""

    class Holder:
        def __init__(self) -> None:
            self.seen: dict[str, int] = {"calls": 0}

        def __call__(self) -> None:
            self.seen["calls"] += 1

    class Writes(Tiny):
        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            more["holder"]()
            return super().forward(x, t, c)

    with ch.wrap(Writes()) as cw:
        assert loop(cw, lambda k: {"holder": Holder()}) == "FAFAFAFA"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_the_model_writes_to_is_compared_as_it_was_given(mode: Callable[[], Any]) -> None:
    """The recorded call leaves in it just what the next call is given."""

    class Counts(Tiny):
        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            assert c is not None
            output = super().forward(x, t, c)
            c.add_(1)
            return output

    with mode():
        judge, count, times = Judge(Counts()), torch.zeros(1, 3), TIMES.clone()
        with ch.wrap(judge.unet, schedule=lambda step: True):
            for step, t in enumerate(times[:4]):
                x, c = torch.randn(1, 2, 8, 8), count.clone()
                output = judge.unet(x, t, count)
                assert torch.equal(output, judge.plain(x, t, c)), f"step {step} is served with other conditions"


class Regional:
    def __init__(self, mask: Tensor) -> None:
        self.mask, self.scale = mask, lambda x: x * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Regional(torch.ones(2, 2)),
        lambda: {"f": lambda x: x + 1, "names": frozenset({"a", "b"}), "times": [900, 800, 700]},
        lambda: {"pairs": frozenset({("a", 1), ("b", 2)}), "sets": {frozenset({1}), frozenset({2})}},
    ],
    ids=["object", "lambda, frozenset, list", "sets of tuples"],
)
def test_new_objects_with_the_same_content_are_the_same_condition(make: Callable[[], Any]) -> None:
    with ch.wrap(Tiny()) as cw:
        assert loop(cw, lambda k: {"more": make()}) == "FAFAFAFA"


class Options(dict[str, Any]):
    """Options as many write them: an attribute that is asked for is an item, or an error of its own."""

    __getattr__ = dict.__getitem__


class Looks:
    """A hook that answers no attribute but by an error."""

    def __call__(self, *args: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.SkippedModuleWarning")
@pytest.mark.parametrize("where", ["an argument", "an attribute of the UNet", "a processor", "a hook"])
def test_nobody_is_asked_for_attributes_that_he_may_not_have(where: str) -> None:
    unet, options = Tiny(), Options(a=1, text=torch.ones(1, 3))
    if where == "an attribute of the UNet":
        unet.config, unet.down.config = options, options  # type: ignore[assignment]
    elif where == "a processor":
        unet.down.processor = options  # type: ignore[assignment]
    elif where == "a hook":
        unet.down.register_forward_hook(Looks())
    with ch.wrap(unet) as cw:
        assert loop(cw, lambda k: {"more": Options(options)} if where == "an argument" else {}) == "FAFAFAFA"


# -- prompts that take turns ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("cycle", "passes"), [("ab", "FFAAFFAA"), ("abc", "FFFAAAFF"), ("aab", "FAFFAAFA"), ("a", "FAFAFAFA")]
)
def test_prompts_that_take_turns(cycle: str, passes: str) -> None:
    """[a|b]: each prompt is served from its own step before, and has a clock of its own."""
    judge, random, turns = Judge(Tiny()), torch.Generator().manual_seed(0), dict.fromkeys("abc", 0)
    prompts, times = {name: torch.randn(1, 3, generator=random) for name in "abc"}, TIMES.clone()
    with ch.wrap(judge.unet, reuse="same condition") as cw:
        for run in range(2):
            judge.begin()
            for k in range(8):
                name = cycle[k % len(cycle)]
                turns[name] += 1
                x = torch.randn(1, 2, 8, 8, generator=random)
                judge.call(x, times[k], prompts[name], step=turns[name], branch=name)
            turns = dict.fromkeys("abc", 0)
            assert judge.letters == passes * (run + 1)
            assert cw.stats.trajectories[-1].steps == 8


@torch.no_grad()
def test_a_prompt_that_was_away_for_long_is_full() -> None:
    judge, times, order = Judge(Tiny()), torch.linspace(900, 100, 20), "abbbabbbba"
    prompts = {"a": torch.zeros(1, 3), "b": torch.ones(1, 3)}
    with ch.wrap(judge.unet, schedule=lambda step: True, reuse="same condition"):
        for k, name in enumerate(order):
            step = 99 if k == 9 else order[: k + 1].count(name)  # five steps after its last one
            judge.call(torch.randn(1, 2, 8, 8), times[k], prompts[name], step=step, branch=name)
    assert judge.letters == "FFAAAAAAAF"


def test_reuse_is_one_of_two() -> None:
    with pytest.raises(ArgumentError, match="same condition"):
        ch.wrap(Tiny(), reuse="always")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reuse": ["step before"]}, "same condition"),
        ({"ignore": None}, "names arguments by dotted paths"),
        ({"ignore": 3}, "names arguments by dotted paths"),
        ({"schedule": ch.IdentityAdaptor()}, "a function of the step"),
        ({"schedule": lambda: True}, "a function of the step"),
    ],
)
def test_options_of_another_type_are_refused_before_the_first_call(options: dict[str, Any], said: str) -> None:
    unet = Tiny()
    before = snapshot(unet)
    with pytest.raises(ArgumentError, match=said):
        ch.wrap(unet, **options)
    assert snapshot(unet) == before
