"""Sampling loops that nobody had in mind: what each call returns is checked by a judge that is told the truth.

Every loop says how many of its calls are adaptor passes at least, so that "everything is full" does not pass.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import clockwork_hooks as ch
from tests.oracle import Judge
from tests.small_unet import Tiny
from tests.test_samplers import k_sampling

TIMES = [900, 800, 700, 600, 500, 400, 300, 200]
Loop = Callable[[Judge, ch.ClockworkWrapper, torch.Generator], None]


def noise(random: torch.Generator, batch: int = 1, size: int = 8) -> Tensor:
    return torch.randn(batch, 2, size, size, generator=random)


def text(random: torch.Generator) -> Tensor:
    return torch.randn(1, 3, generator=random)


def a_step_for_each_time(judge: Judge) -> Callable[[Tensor, Any], Tensor]:
    """Undeclared, that is what a step is: a change of the time."""
    step, last = 0, None

    def call(x: Tensor, time: Any) -> Tensor:
        nonlocal step, last
        value = float(torch.as_tensor(time).flatten()[0])
        step, last = step + (value != last), value
        return judge.call(x, time, step=step)

    return call


# -- several evaluations, corrections, steps taken back ------------------------------------------------------------


def predict_evaluate_correct_evaluate(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Each time but the first is evaluated twice: at the prediction, and at the correction."""
    x, c = noise(random), text(random)
    slope = judge.call(x, TIMES[0], c, step=1)
    for k, t in enumerate(TIMES[1:], 2):
        other = judge.call(x - 0.1 * slope, t, c, step=k)
        x = x - 0.05 * (slope + other)
        slope = judge.call(x, t, c, step=k)


def steps_taken_back(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """An adaptive step size: every third step is rejected after both its evaluations, and tried again at half."""
    call, x, t, stride = a_step_for_each_time(judge), noise(random), 900.0, 160.0
    for trial in range(9):
        slope = call(x, t)
        other = call(x - 0.1 * slope, t - stride)
        if trial % 3 == 2:
            stride /= 2
        else:
            t, x = t - stride, x - 0.05 * (slope + other)


def k_diffusion_adaptive(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """`sample_dpm_adaptive`: two or three evaluations a step, at times of its own; rejected ones begin above."""
    call = a_step_for_each_time(judge)
    model = lambda x, sigma: x - sigma[:, None, None, None] * call(x, sigma).tanh()  # noqa: E731
    k_sampling().sample_dpm_adaptive(model, noise(random) * 14.6, 0.1, 14.6, disable=True, rtol=0.02, h_init=1.0)


def k_diffusion_fast(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """`sample_dpm_fast`: steps of three evaluations, then of fewer."""
    call = a_step_for_each_time(judge)
    model = lambda x, sigma: x - sigma[:, None, None, None] * call(x, sigma).tanh()  # noqa: E731
    k_sampling().sample_dpm_fast(model, noise(random) * 14.6, 0.1, 14.6, 11, disable=True)


def restart(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Xu et al. 2023: back up into the middle of the list, and down the same entries again."""
    times, x = torch.tensor([float(t) for t in TIMES]), noise(random)
    for step, index in enumerate((0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7), 1):
        x = x - 0.1 * judge.call(x, times[index], step=step)


def time_travel(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """FreeDoM and RePaint with jumps of one: two steps down, one up, over a list's entries."""
    times, x = torch.tensor([float(t) for t in TIMES]), noise(random)
    for step, index in enumerate((0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 5, 6, 7), 1):
        x = x - 0.1 * judge.call(x, times[index], step=step)


def noise_again_at_the_same_time(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Universal guidance with self-recurrence: the whole step three times, each time from fresh noise."""
    x, c = noise(random), text(random)
    for k, t in enumerate(TIMES, 1):
        for _ in range(3):
            x = x - 0.1 * judge.call(x, t, c, step=k)
            x = x + 0.1 * noise(random)


def langevin(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Fewer and fewer corrections at each noise level."""
    x = noise(random)
    for k, (t, count) in enumerate(zip(TIMES, (4, 4, 3, 3, 2, 1, 1, 1), strict=True), 1):
        for _ in range(count):
            x = x - 0.1 * judge.call(x, t, step=k) + 0.1 * noise(random)


# -- who evaluates --------------------------------------------------------------------------------------------------


def evaluations_left_out(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """AdaptiveDiffusion: the sampler itself takes an old prediction in every second step, later on."""
    times, x = torch.arange(900.0, 0, -75), noise(random)
    for step, index in enumerate((0, 1, 2, 3, 5, 7, 9, 11), 1):
        x = x - 0.1 * judge.call(x, times[index], step=step)


def parallel_in_time(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """ParaDiGMS: a window of steps as one batch with a time for each row, then plain steps."""
    step = 0
    for first in (0, 2, 4):
        step += 1
        judge.begin()
        judge.call(noise(random, 3), torch.tensor(TIMES[first : first + 3]).float(), step=step)
    judge.begin()
    for t in TIMES:
        step += 1
        judge.call(noise(random, 3), torch.full((3,), float(t)), step=step)


def few_steps_from_fresh_noise(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Consistency sampling: four steps, each from noise that is new but for what is known of the image."""
    for _ in range(3):
        judge.begin()
        image = torch.zeros(1, 2, 8, 8)
        for k, t in enumerate((999, 759, 499, 259), 1):
            image = judge.call(image + t / 1000 * noise(random), t, step=k)


def two_generators(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Two prompts sampled by turns in one thread, a step at a time, at the times of two schedulers."""

    def run(which: int, times: Tensor) -> Iterator[None]:
        c, x = text(random), noise(random)
        for k, t in enumerate(times, 1):
            x = x - 0.1 * judge.call(x, t, c, step=k, branch=which)
            yield

    turns = run(0, torch.linspace(900, 100, 9)), run(1, torch.linspace(850, 50, 9))
    for _ in zip(*turns, strict=True):
        pass


def one_after_the_other_as_generators(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """The first is left half-way without being closed."""

    def run(which: int) -> Iterator[None]:
        c, x = text(random), noise(random)
        for k, t in enumerate(TIMES, 1):
            x = x - 0.1 * judge.call(x, t, c, step=k, branch=which)
            yield

    first, second = run(0), run(1)
    for _ in itertools.islice(first, 3):
        pass
    for _ in second:
        pass


# -- guidance ---------------------------------------------------------------------------------------------------------


def classifier_guidance(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """The gradient of a loss on what the UNet predicts, through the UNet; then a second call without gradients."""
    x = noise(random)
    for k, t in enumerate(TIMES, 1):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(judge.call(y, t, step=k, branch="grad").square().mean(), y)
        x = x - 0.1 * judge.call(x - slope, t, step=k, branch="grad")


def negative_prompt_swapped(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Another negative prompt from the middle on, and the first one again at the end."""
    c, one, other = text(random), text(random), text(random)
    for k, t in enumerate(TIMES, 1):
        judge.call(noise(random), t, c, step=k, branch="c")
        name = "other" if 4 <= k <= 6 else "one"
        judge.call(noise(random), t, {"one": one, "other": other}[name], step=k, branch=name)


def alternating_words(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """[cow|horse]: another prompt in every second step; each of the two paused in the step before."""
    pair = text(random), text(random)
    for k, t in enumerate(TIMES, 1):
        judge.call(noise(random), t, text(random) * 0 + 1, step=k, branch="uncond")
        judge.call(noise(random), t, pair[k % 2], step=k, branch=k % 2)


def self_conditioning(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """What was predicted last is given back as a condition: another one in each step, so it has to be named."""
    x, estimate = noise(random), torch.zeros(1, 3)
    for k, t in enumerate(TIMES, 1):
        with cw.branch("self"):
            output = judge.call(x, t, estimate, step=k)
        x, estimate = x - 0.1 * output, output.mean((2, 3)) @ torch.ones(2, 3)


def self_attention_guidance(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Text, no text, and no text once more on a blurred sample."""
    c, none, x = text(random), text(random), noise(random)
    for k, t in enumerate(TIMES, 1):
        judge.call(x, t, c, step=k, branch="text")
        output = judge.call(x, t, none, step=k, branch="none")
        x = x - 0.1 * judge.call(x - output.mean(), t, none, step=k, branch="none")


def autoguidance(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """A worse version of the model guides it: two wrapped UNets by turns, with the same times and conditions."""
    worse, c, x = Judge(Tiny(seed=1)), text(random), noise(random)
    with ch.wrap(worse.unet, clock=3):
        for k, t in enumerate(torch.tensor(TIMES), 1):
            good, bad = judge.call(x, t, c, step=k), worse.call(x, t, c, step=k)
            x = x - 0.1 * (good + 0.5 * (good - bad))
    assert worse.letters == "FAAFAAFA"


# -- form -------------------------------------------------------------------------------------------------------------


def growing_pictures(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Three steps small, then upsampled, then large."""
    x = noise(random)
    for k, t in enumerate(TIMES, 1):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if k == 4 else x
        x = x - 0.1 * judge.call(x, t, step=k)


def inference_mode_by_turns(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """Pairs of steps under `inference_mode`, pairs under `no_grad`."""
    for k, t in enumerate(TIMES, 1):
        with torch.inference_mode((k - 1) % 4 < 2):
            judge.call(noise(random), t, step=k)


def a_buffer_for_the_time(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """One tensor that is written to before each call, as loops do that are captured; and one sample, likewise."""
    time, x, c = torch.empty(1), noise(random), text(random)
    for k, t in enumerate(TIMES, 1):
        time.fill_(t)
        x -= 0.1 * judge.call(x, time, c, step=k)


def a_buffer_of_two_times(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """This step's time and the next one's, moved along in one buffer: the entry stays the same, its value does not."""
    times = torch.empty(2)
    for k, (t, then) in enumerate(itertools.pairwise(TIMES), 1):
        times[0], times[1] = t, then
        judge.call(noise(random), times[0], step=k)


def a_batch_that_did_not_fit(judge: Judge, cw: Any, random: torch.Generator) -> None:
    """In the fourth step the whole batch fails; from then on it runs in two halves."""
    x, c = noise(random, 4), torch.randn(4, 3, generator=random)
    for k, t in enumerate(TIMES, 1):
        if k < 4:
            judge.call(x, t, c, step=k)
            continue
        if k == 4:
            handle = judge.unet.head.register_forward_hook(out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                judge.unet(x, t, c)
            handle.remove()
            judge.begin()
        for half in range(2):
            judge.call(x[half::2], t, c[half::2], step=k, branch=half)


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("simulated")


LOOPS: dict[Loop, tuple[int, int]] = {  # adaptor passes at least: as it is, and within `with cw.trajectory()`
    predict_evaluate_correct_evaluate: (4, 4),
    steps_taken_back: (3, 5),
    k_diffusion_adaptive: (4, 5),
    k_diffusion_fast: (3, 5),
    restart: (7, 7),
    time_travel: (5, 5),
    noise_again_at_the_same_time: (9, 9),
    langevin: (1, 1),  # another number of calls than in the step before tells nothing
    evaluations_left_out: (3, 3),
    parallel_in_time: (3, 4),
    few_steps_from_fresh_noise: (0, 6),
    two_generators: (0, 0),  # another list in each call: a thread or a task each has passes
    one_after_the_other_as_generators: (3, 5),
    classifier_guidance: (6, 6),
    negative_prompt_swapped: (5, 6),
    alternating_words: (3, 4),
    self_conditioning: (3, 4),
    self_attention_guidance: (8, 8),
    autoguidance: (4, 4),
    growing_pictures: (2, 3),
    inference_mode_by_turns: (3, 4),
    a_buffer_for_the_time: (3, 4),
    a_buffer_of_two_times: (2, 3),
    a_batch_that_did_not_fit: (2, 5),
}


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
@pytest.mark.parametrize("within", [False, True], ids=["as it is", "within trajectory"])
@pytest.mark.parametrize("schedule", ["clock 2", "always"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_nothing_stale_in_a_loop_that_is_not_named_anywhere(loop: Loop, schedule: str, within: bool) -> None:
    """Twice with one wrapper, from the same seed: the same passes both times, none of them stale."""
    judge, runs = Judge(Tiny()), []
    with ch.wrap(judge.unet, schedule=None if schedule == "clock 2" else lambda step: True) as cw:
        for _ in range(2):
            judge.begin()
            judge.letters = ""
            with cw.trajectory() if within else contextlib.nullcontext():
                loop(judge, cw, torch.Generator().manual_seed(0))
            runs.append(judge.letters)
    assert runs[0] == runs[1]
    assert runs[0].count("A") >= LOOPS[loop][within]


class TakesAnyTime(Tiny):
    """A UNet that copes with NaN and infinity."""

    def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
        return super().forward(x, torch.as_tensor(t).nan_to_num(950.0, 990.0, 10.0), c, **more)


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
@pytest.mark.parametrize("listed", [True, False], ids=["one list", "tensors"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_no_times(odd: float, listed: bool) -> None:
    """From infinity to infinity is no step: two calls of one step, of which the second was served by the first."""
    judge, random = Judge(TakesAnyTime()), torch.Generator().manual_seed(0)
    for places in itertools.combinations(range(len(TIMES)), 2):
        times = torch.tensor([odd if k in places else float(time) for k, time in enumerate(TIMES)])
        judge.begin()
        with ch.wrap(judge.unet):
            for step, time in enumerate(times, 1):
                for _ in range(2):
                    judge.call(noise(random), time if listed else time.clone(), step=step)
    assert judge.share > 0.05 or not listed
