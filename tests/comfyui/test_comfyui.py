"""The node samples what an independent hook on a plain clone gives, bit for bit, and leaves everything else alone."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import clockwork_hooks as ch
from clockwork_hooks.comfyui import NODE_CLASS_MAPPINGS, Clockwork, ClockworkNode, Options, Run, evaluations_of
from tests.comfyui.reference import Reference
from tests.comfyui.situations import REAL, SITUATIONS, Case
from tests.snapshot import snapshot

if "COMFYUI_PATH" in os.environ:
    from tests.comfyui import real as client
else:
    from tests.comfyui import stand_in as client  # type: ignore[no-redef]

real_comfyui = pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:torch", "ignore::UserWarning:comfy"
)


def handle(patcher: Any) -> Clockwork:
    """The node's object in a clone."""
    clockwork: Clockwork = patcher.wrappers["sampler_sample"]["clockwork"][0].__self__
    return clockwork


def apply(patcher: Any, **options: Any) -> Any:
    return ClockworkNode().apply(patcher, **options)[0]


def expected(
    case: Case, adapted: Callable[[int], bool] = lambda step: step % 2 == 1, shapes: set[Any] | None = None
) -> tuple[Tensor, str]:
    """What the hook on a plain clone samples, and its passes."""
    plain, steps = case.patcher.clone(), case.evaluations
    if case.each:
        steps, adapted = [1] * sum(steps), lambda evaluation: evaluation >= 2 and evaluation % 2 == 0
    reference = Reference(plain.model.diffusion_model, client.EXIT, steps, adapted, case.frozen, shapes)
    plain.add_wrapper_with_key("predict_noise", "reference", reference.evaluation)
    try:
        picture = client.sample(case.after(plain), **case.options)
    finally:
        reference.remove()
    return picture, reference.letters


@pytest.mark.parametrize("name", [*SITUATIONS, *(pytest.param(name, marks=real_comfyui) for name in REAL)])
def test_situation(name: str) -> None:
    case = (SITUATIONS | REAL)[name](client)
    before, plain = (
        snapshot(case.patcher.model.diffusion_model),
        client.sample(case.after(case.patcher), **case.options),
    )
    wanted, letters = expected(case, shapes=(shapes := set()))
    assert case.letters in (None, letters)
    assert not torch.equal(wanted, plain)
    patcher = case.after(apply(case.patcher))
    for run in range(2):
        if run and len(shapes) > 1:  # those that came late are known now
            wanted, letters = expected(case, shapes=shapes)
        assert torch.equal(client.sample(patcher, **case.options), wanted)
        stats = handle(patcher).wrapper.stats
        assert not case.counted or (stats.full_passes, stats.adaptor_passes) == (
            letters.count("F"),
            letters.count("A"),
        ), stats.reasons
    assert torch.equal(client.sample(case.after(case.patcher), **case.options), plain)
    assert snapshot(case.patcher.model.diffusion_model).keys() == before.keys()
    assert "forward" not in vars(case.patcher.model.diffusion_model)


SAMPLERS = (
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2", "lms"),
    *("dpm_2_ancestral", "dpm_fast", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu"),
    *("dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
    *("dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "er_sde"),
    *("res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "gradient_estimation"),
    *(
        "gradient_estimation_cfg_pp",
        "seeds_2",
        "seeds_3",
        "sa_solver",
        "sa_solver_pece",
        "ddim",
        "uni_pc",
        "uni_pc_bh2",
    ),
)


TWO = (
    *("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp"),
    *("dpmpp_sde", "dpmpp_sde_gpu", "seeds_2"),
)  # evaluations of a step, which a plain clock counts


@real_comfyui
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_samplers_of_comfyui(sampler: str) -> None:
    """A step begins with the evaluation right before the sampler's callback: so the plain run tells its steps."""
    patcher, begins, count = client.model(), list[int](), [0]
    plain = patcher.clone()

    def evaluation(executor: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return executor(*args, **kwargs)

    plain.add_wrapper_with_key("predict_noise", "count", evaluation)
    client.sample(plain, sampler, callback=lambda *_: begins.append(count[0] - 1))
    evaluations = [then - now for now, then in itertools.pairwise([*begins, count[0]])]
    wanted, letters = expected(Case(patcher, {"sampler": sampler}, evaluations, each=sampler in TWO))
    clone = apply(patcher)
    for _ in range(2):
        assert torch.equal(client.sample(clone, sampler), wanted)
    stats = handle(clone).wrapper.stats
    assert (stats.full_passes, stats.adaptor_passes) == (letters.count("F"), letters.count("A")), stats.reasons


@real_comfyui
def test_beside_torch_compile_every_step_is_full(caplog: pytest.LogCaptureFixture) -> None:
    patcher = client.model()
    plain, clone = client.sample(patcher), apply(patcher)
    client.load("comfy_api.torch_helpers.torch_compile").set_torch_compile_wrapper(clone, backend="eager")
    with caplog.at_level(logging.INFO, "clockwork_hooks"):
        assert torch.equal(client.sample(clone), plain)
    assert "6 full, 0 adaptor passes" in caplog.text


@real_comfyui
def test_the_adaptive_sampler_has_three_evaluations_a_step() -> None:
    clone = apply(client.model())
    first = client.sample(clone, "dpm_adaptive")
    assert torch.equal(client.sample(clone, "dpm_adaptive"), first)
    stats = handle(clone).wrapper.stats
    assert stats.adaptor_passes % 3 == 0
    assert stats.full_passes % 3 == 0
    assert 0 <= stats.full_passes - stats.adaptor_passes <= 3


# -- the node's options ----------


@pytest.mark.parametrize(
    ("options", "letters"),
    [
        ({"clock": 3}, "FAAFAA"),
        ({"schedule": "2, 4"}, "FAFAFF"),
        ({"schedule": "every(2, first_full=2)"}, "FFAFAF"),
        ({"schedule": "spread(2)"}, ch.Schedule.spread(2).preview(6).replace(" ", "")),
        ({"start_percent": 0.3}, None),
        ({"end_percent": 0.5}, None),
    ],
)
def test_schedules(options: dict[str, Any], letters: str | None) -> None:
    patcher = client.model()
    sampling = patcher.get_model_object("model_sampling")
    clone = apply(patcher, **options)
    levels: list[float] = []
    clone.add_wrapper_with_key(
        "predict_noise", "look", lambda executor, x, t, *rest: (levels.append(float(t[0])), executor(x, t, *rest))[1]
    )
    pictures = client.sample(clone)
    if letters is None:  # the clock ticks from the first step between start and end
        high, low = (
            sampling.percent_to_sigma(options.get(name, k)) for k, name in enumerate(("start_percent", "end_percent"))
        )
        inside = [k for k, level in enumerate(levels) if low <= level <= high]
        assert 0 < len(inside) < 6
        letters = "".join("FA"[k in inside and (k - inside[0]) % 2] for k in range(6))
        assert "A" in letters
    wanted, seen = expected(Case(patcher), lambda step: letters[step] == "A")
    assert seen == letters
    assert torch.equal(pictures, wanted)


def test_an_adaptive_schedule_decides_as_it_runs() -> None:
    clone = apply(client.model(), schedule="adaptive(0.5, longest=2)")
    client.sample(clone)
    assert any("threshold" in reason or "longest" in reason for reason in handle(clone).wrapper.stats.reasons)


@pytest.mark.parametrize(
    "options",
    [
        {"clock": 0},
        {"schedule": "sometimes"},
        {"schedule": "1, 2"},
        {"region": "the middle"},
        {"region": "level x"},
        {"region": "share 3"},
        {"start_percent": 0.6, "end_percent": 0.5},
    ],
)
def test_a_wrong_option_is_an_error_of_the_node(options: dict[str, Any]) -> None:
    with pytest.raises(ch.ArgumentError):
        apply(client.model(), **options)
    with pytest.raises(ch.AdaptorError):
        apply(client.model(), adaptor="/no/such/folder")


def test_clock_1_is_the_model_itself() -> None:
    patcher = client.model()
    assert apply(patcher, clock=1) is patcher


def test_an_adaptor_from_a_folder(tmp_path: Any) -> None:
    """A calibrated one, solved for on the same network."""
    patcher = client.model()
    unet = patcher.model.diffusion_model

    def loop(text: Tensor) -> Tensor:
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(int(1000 * text[0, 0, 0])))
        with torch.no_grad():
            for t in torch.linspace(900, 50, 6):
                x = x - 0.1 * unet(x, t.expand(1), context=text, transformer_options={})
        return x

    adaptor = ch.calibrate(unet, loop, [torch.randn(1, 7, 16) for _ in range(4)], schedule=ch.Schedule.at({2, 3, 5}))
    adaptor.save_pretrained(tmp_path)
    clone, plain = apply(patcher, adaptor=str(tmp_path)), apply(patcher)
    client.sample(clone)  # records: of a larger network it may not keep the entry, which the adaptor of step 2 reads
    assert not torch.equal(client.sample(clone), client.sample(plain))
    assert type(handle(clone).wrapper.adaptor).__name__ == type(adaptor).__name__
    assert handle(clone).wrapper.stats.adaptor_passes == 3
    assert str(handle(clone).wrapper.schedule) == "at([2, 3, 5])"  # its own
    assert str(handle(apply(patcher, adaptor=str(tmp_path), schedule="2")).options.steps()) == "at([2])"


# -- what must not happen ----------


def test_no_region_costs_full_passes_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    patcher, calls = client.model(), [0]
    plain, clone = client.sample(patcher), apply(patcher, region="share 0.99")
    first = next(one for one in patcher.model.diffusion_model.modules() if isinstance(one, torch.nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
    with caplog.at_level(logging.INFO, "clockwork_hooks"):
        for _ in range(3):
            assert torch.equal(client.sample(clone), plain)
    assert calls == [3 * 6 + 1]  # the one that was recorded ran again; no later run pays for it
    assert [record.message for record in caplog.records if "every step is full" in record.message] != []
    assert len(caplog.records) == 1


def test_an_adaptor_that_fails_does_not_end_the_picture(caplog: pytest.LogCaptureFixture) -> None:
    patcher = client.model()

    def broken(entry: Any, exit_cached: Tensor, **_: Any) -> Tensor:
        raise ValueError("no")

    plain, clone = client.sample(patcher), Clockwork(Options(), broken).put_into(patcher)
    assert torch.equal(client.sample(clone), plain)
    assert "every step is full: no" in caplog.text


def test_an_interrupt_is_passed_on_and_leaves_nothing() -> None:
    patcher = client.model()
    unet, clone = patcher.model.diffusion_model, apply(patcher)
    before, wanted = client.sample(patcher), client.sample(clone)

    class Interrupted(BaseException):
        pass

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        client.sample(clone, callback=stop)
    assert "forward" not in vars(unet)
    assert torch.equal(client.sample(patcher), before)
    assert torch.equal(client.sample(clone), wanted)


def test_the_models_own_error_is_passed_on() -> None:
    clone = apply(client.model())

    def broken(h: Tensor, skip: Tensor, _: Any) -> Any:
        raise RuntimeError("of a patch")

    clone.set_model_output_block_patch(broken)
    with pytest.raises(RuntimeError, match="of a patch"):
        client.sample(clone)
    assert "forward" not in vars(clone.model.diffusion_model)


def test_other_calls_are_left_alone_in_the_middle_of_a_run() -> None:
    """A callback calls the model that all clones share; two nodes with other clocks take turns."""
    patcher = client.model()
    two, three = apply(patcher), apply(patcher, clock=3)
    wanted, seen = {2: client.sample(two), 3: client.sample(three)}, list[Tensor]()
    text = client.cond(1)[0][0]

    def call(step: int, *_: Any) -> None:
        x = torch.full((1, 4, 16, 16), step + 1.0)
        with torch.no_grad():
            seen.append(patcher.model.diffusion_model(x, torch.ones(1), context=text, transformer_options={}))

    for step in range(6):
        call(step)
    assert torch.equal(client.sample(two, callback=call), wanted[2])
    assert torch.equal(client.sample(three, callback=call), wanted[3])
    assert torch.equal(client.sample(two), wanted[2])
    assert len(seen) == 18
    assert all(torch.equal(one, seen[k % 6]) for k, one in enumerate(seen))


def run_of(sampler: str, pictures: int = 2, *, each: bool = False) -> Run:
    run = Run(Options(), sampler, [9.0, 4.0, 1.0, 0.0], (1e9, 0.0), each)
    run.evaluate(lambda: 0.0, pictures)
    return run


def told(conds: Any = (1, 0), uuids: Any = "ba", **more: Any) -> dict[str, Any]:
    return {"cond_or_uncond": list(conds), "uuids": list(uuids), **more}


def batch(rows: int) -> Tensor:
    return torch.zeros(rows, 4, 8, 8)


def test_each_call_of_a_step_has_a_name_of_its_own() -> None:
    """Heun's second evaluation has other names than its first; the next step has those of the step before."""
    run = run_of("heun", 1)
    calls = [told([0], "a"), told([1], "b"), told([0], "a")]
    names = [[run.names(one, batch(1)) for one in calls]]
    for _ in range(3):
        run.evaluate(lambda: 0.0, 1)
        names.append([run.names(one, batch(1)) for one in calls])
    assert run.step == 2
    for of in (lambda name, _: name, lambda _, rows: rows[0]):
        assert len({of(*one) for one in (*names[0], *names[1])}) == 6
    assert names[2:] == names[:2]


def test_rows_have_names_by_condition_and_picture() -> None:
    run = run_of("euler")
    _, both = run.names(told(), batch(4))
    assert len(set(both)) == 4
    run.evaluate(lambda: 0.0, 2)
    assert run.names(told([0], "a"), batch(2))[1] == both[2:]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (None, 4),
        ({}, 4),
        ({"cond_or_uncond": [1, 0]}, 4),
        (told(uuids="a"), 4),
        (told([], ""), 4),
        (told(), 3),
        (told(), 2),  # as many as chunks, but of two pictures: tiles, or a window
        (told(context_window=object()), 4),
    ],
)
def test_rows_that_cannot_be_told_have_no_names(options: Any, rows: int) -> None:
    run = run_of("euler")
    assert run.names(options, batch(rows))[1] == []
    assert run.names(told(), None)[1] == []
    assert run_of("euler", 0).names(told([], ""), batch(0))[1] == []


def test_a_condition_that_comes_twice_in_an_evaluation_is_told_by_the_order_of_its_calls() -> None:
    """Whatever else is in its batch: memory may split one that was whole in the step before."""
    run = run_of("euler")
    both, (_, again) = run.names(told(), batch(4)), run.names(told([0], "a"), batch(2))
    run.evaluate(lambda: 0.0, 2)
    split = [run.names(told([cond], uuid), batch(2)) for cond, uuid in ((1, "b"), (0, "a"), (0, "a"))]
    assert [row for _, rows in split for row in rows] == [*both[1], *again]
    assert both[0] not in [name for name, _ in split]
    twice = run_of("euler").names(told([0, 0], "aa"), batch(4))[1]
    assert len(set(twice)) == 4


def test_a_call_that_is_patched_is_no_other_one() -> None:
    """Perturbed attention calls the model with a patch of its own; GLIGEN's patches are new functions in each call."""

    def attention(*args: Any) -> Any:
        return args

    def patched(kind: str, place: Any, patch: Any = attention) -> dict[str, Any]:
        return told(patches_replace={kind: {place: patch}})

    calls = [told(), patched("attn1", ("middle", 0)), patched("attn1", ("input", 1)), patched("attn2", ("middle", 0))]
    calls += [patched("attn1", ("middle", 0), batch), told(patches={"middle_patch": [attention]})]
    names = [run_of("euler").names(one, batch(4)) for one in calls]
    assert len({name for name, _ in names}) == len({rows[0] for _, rows in names}) == len(calls)
    new = [[lambda *_: None, functools.partial(attention, 1)] for _ in range(2)]
    first, second = (run_of("euler").names(told(patches={"middle_patch": one}), batch(4)) for one in new)
    assert first == second
    assert run_of("euler").names(told(patches=None, patches_replace={"attn1": None}), batch(4)) == names[0]


def test_a_model_that_is_called_with_fewer_rows_than_told() -> None:
    """A patch of somebody's calls it picture by picture: its calls are told by their order, as without names."""
    patcher = client.model()

    def split(executor: Any, x: Tensor, t: Tensor, concat: Any, text: Tensor, *rest: Any, **more: Any) -> Tensor:
        return torch.cat([executor(x[k : k + 1], t[k : k + 1], concat, text[k : k + 1], *rest, **more) for k in (0, 1)])

    clone = apply(patcher)
    clone.add_wrapper_with_key("apply_model", "split", split)
    wanted = None
    for _ in range(2):
        picture = client.sample(clone)
        assert wanted is None or torch.equal(picture, wanted)
        wanted = picture
        stats = handle(clone).wrapper.stats
        assert stats.adaptor_passes >= 4, stats.reasons


@pytest.mark.parametrize("options", [{"schedule": "spread(2)"}, {"schedule": "2, 4"}])
def test_other_schedules_go_by_the_samplers_steps(options: dict[str, Any]) -> None:
    letters = Options(**options).steps().preview(6).replace(" ", "")
    case = SITUATIONS["heun"](client)
    clone = apply(case.patcher, **options)
    wanted, seen = expected(Case(case.patcher, case.options, case.evaluations), lambda step: letters[step] == "A")
    assert seen == "".join(letter * count for letter, count in zip(letters, case.evaluations, strict=True))
    assert torch.equal(client.sample(clone, "heun"), wanted)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"clock": 3}, "FFAAFAAFAAF"),
        ({"start_percent": 0.3}, None),
        ({"end_percent": 0.5}, None),
        ({"start_percent": 0.2, "end_percent": 0.6}, None),
    ],
)
def test_evaluations_between_start_and_end(options: dict[str, Any], passes: str | None) -> None:
    """The clock ticks from the second evaluation of the first step within; a step is within or not as a whole."""
    patcher, counts = client.model(), [2, 2, 2, 2, 2, 1]
    sampling, clone = patcher.get_model_object("model_sampling"), apply(patcher, **options)
    levels: list[float] = []
    clone.add_wrapper_with_key(
        "predict_noise", "look", lambda executor, x, t, *rest: (levels.append(float(t[0])), executor(x, t, *rest))[1]
    )
    picture = client.sample(clone, "dpm_2")
    if passes is None:
        high = sampling.percent_to_sigma(options.get("start_percent", 0.0))
        low = sampling.percent_to_sigma(options.get("end_percent", 1.0))
        steps = [step for step, count in enumerate(counts) for _ in range(count)]
        inside = [k for k, step in enumerate(steps) if low <= levels[2 * step] <= high]
        passes = "".join("FA"[k in inside and k > inside[0] + 1 and (k - inside[0]) % 2 == 0] for k in range(11))
        assert "A" in passes
    wanted, seen = expected(Case(patcher, {"sampler": "dpm_2"}, [1] * 11), lambda evaluation: passes[evaluation] == "A")
    assert seen == passes
    assert torch.equal(picture, wanted)


def test_a_second_node_replaces_the_first() -> None:
    patcher = client.model()
    assert torch.equal(client.sample(apply(apply(patcher, clock=3), clock=2)), client.sample(apply(patcher)))


def test_another_size_and_back() -> None:
    clone = apply(client.model())
    small, large = client.sample(clone), client.sample(clone, size=24)
    assert torch.equal(client.sample(clone), small)
    assert torch.equal(client.sample(clone, size=24), large)
    assert handle(clone).wrapper.stats.adaptor_passes == 3


def test_a_sampler_that_breaks_the_foretold_pattern_is_told_by_its_times(caplog: pytest.LogCaptureFixture) -> None:
    run = handle(apply(client.model()))
    assert evaluations_of("somebodys_own", [3.0, 2.0, 0.0]) is None
    with caplog.at_level(logging.WARNING, "clockwork_hooks"):
        clone = apply(client.model())
        calls: list[int] = []
        client.sample(clone, sampler="heun", callback=lambda step, *_: calls.append(step))
    assert calls == list(range(6))
    assert not caplog.records
    assert run.wrapper is None


@pytest.mark.skipif("COMFYUI_PATH" in os.environ, reason="ComfyUI takes samplers by their names")
@pytest.mark.parametrize(("name", "letters"), [("sample_somebodys", "FAFAFA"), ("sample_dpm_2", "FFFFAF")])
def test_a_sampler_of_somebody_is_told_by_its_times(name: str, letters: str, caplog: pytest.LogCaptureFixture) -> None:
    """By a name that nobody knows; and by a known one whose evaluations turn out to be others in the second step."""

    def sampler(*args: Any) -> Tensor:
        return client.SAMPLERS["euler"](*args)  # type: ignore[attr-defined]

    sampler.__name__ = name
    patcher = client.model()
    clone, case = apply(patcher), Case(patcher, {"sampler": sampler})
    wanted, seen = expected(case, lambda step: letters[step] == "A")
    assert seen == letters
    assert torch.equal(client.sample(clone, sampler), wanted)
    assert ("dpm_2 evaluates the model in another way" in caplog.text) == (name == "sample_dpm_2")


# -- the node as ComfyUI sees it ----------


def test_the_node_is_one() -> None:
    (kind,) = NODE_CLASS_MAPPINGS.values()
    inputs = kind.INPUT_TYPES()
    assert kind.RETURN_TYPES == ("MODEL",)
    assert inputs["required"]["model"][0] == "MODEL"
    names = [*inputs["required"], *inputs["optional"]]
    defaults = {
        name: inputs[group][name][1].get("default") for group in inputs for name in inputs[group] if name != "model"
    }
    assert getattr(kind(), kind.FUNCTION)(client.model(), **defaults)
    assert set(names) - {"model"} == set(defaults)
