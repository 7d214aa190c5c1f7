"""Real samplers, untouched: what every call returns is checked by a judge that is told the true steps."""

import contextlib
import importlib
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

import clockwork_hooks as ch
from benchmarks import samplers
from benchmarks.samplers import Sampler
from tests.oracle import Judge
from tests.small_unet import Tiny


class Loop:
    """Serves a sampler: `begin` is told each denoising step, and every call is judged.

    Undeclared, a new time is a new step, and that is what the judge is told; declared, it is told the sampler's own.
    `within`: each run stands in `with cw.trajectory()`, so that no evidence is asked for.
    """

    def __init__(self, *, declared: bool, within: bool = False, clock: int = 2) -> None:
        self.judge = Judge(Tiny())
        self.cw = ch.wrap(self.judge.unet, clock=clock)
        self.declared, self.within, self.step, self.last = declared, within, 0, None

    def run(self) -> contextlib.AbstractContextManager[Any]:
        return self.cw.trajectory() if self.within else contextlib.nullcontext()

    def restart(self) -> None:
        if self.declared:
            self.cw.reset()
        self.judge.begin()
        self.judge.letters, self.step, self.last = "", 0, None

    def begin(self) -> None:
        if self.declared:
            self.cw.step()
            self.step += 1

    def __call__(self, sample: Tensor, time: Any, *conditions: Any) -> Tensor:
        value = torch.as_tensor(time).flatten()[0].item()
        if not self.declared and value != self.last:
            self.step, self.last = self.step + 1, value
        return self.judge.call(sample, time, *conditions, step=self.step)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("declared", [False, True], ids=["as it is", "declared"])
@pytest.mark.parametrize("sampler", list(samplers.samplers()), ids=lambda sampler: sampler.name)
def test_schedulers_of_diffusers(sampler: Sampler, declared: bool) -> None:
    """The same picture twice. docs/samplers.md has the passes."""
    loop, letters = Loop(declared=declared), []
    with loop.cw:
        for _ in range(2):
            loop.restart()
            sampler.run(sampler.told(loop, loop.begin), sampler.scheduler(), (1, 2, 8, 8))
            letters.append(loop.judge.letters)
    assert letters[0] == letters[1]
    plain = 0.0 if sampler.name == "KarrasVe" else 0.25  # noise is raised before each step: times run up and down
    assert loop.judge.share >= (plain if sampler.undeclared and not declared else 0.33)


# -- k-diffusion --------------------------------------------------------------------------------------------------


def k_sampling() -> Any:
    """Its samplers alone: the package imports vision and plotting libraries that no sampler uses."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None:
            pytest.skip("needs k-diffusion")
        package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
        package.__path__ = list(spec.submodule_search_locations or ())
        package.utils = utils
        utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
        sys.modules["k_diffusion"], sys.modules["k_diffusion.utils"] = package, utils
    return importlib.import_module("k_diffusion.sampling")


K_SAMPLERS = {  # the least shares of adaptor passes at clock 2: as it is, and within `with cw.trajectory()`
    "sample_euler": (0.25, 0.5),
    "sample_euler_ancestral": (0.25, 0.5),
    "sample_heun": (0.25, 0.35),
    "sample_dpm_2": (0.3, 0.45),
    # an evaluation at the next step's time, or a last bit below it, so that what follows runs backwards: which of the
    # two is rounding, and one kind of CPU has 5 adaptor passes of 15, another 4
    "sample_dpm_2_ancestral": (0.0, 0.25),
    "sample_lms": (0.25, 0.5),
    "sample_dpmpp_2s_ancestral": (0.0, 0.25),
    "sample_dpmpp_sde": (0.3, 0.45),
    "sample_dpmpp_2m": (0.25, 0.5),
    "sample_dpmpp_2m_sde": (0.25, 0.5),
    "sample_dpmpp_3m_sde": (0.25, 0.5),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("within", [False, True], ids=["as it is", "within trajectory"])
@pytest.mark.parametrize("name", K_SAMPLERS)
def test_samplers_of_k_diffusion(name: str, within: bool) -> None:
    """They make a new tensor of sigmas for every call, so that eight steps on Karras' grid lose two adaptor passes."""
    sampling = k_sampling()
    sigmas = sampling.get_sigmas_karras(8, 0.03, 14.6)
    loop = Loop(declared=False, within=within)
    with loop.cw:
        outputs = []
        for _ in range(2):
            loop.restart()
            torch.manual_seed(0)
            denoise = lambda x, sigma: x - sigma[:, None, None, None] * loop(x, sigma).tanh()  # noqa: E731
            with loop.run():
                getattr(sampling, name)(denoise, torch.randn(2, 2, 8, 8) * sigmas[0], sigmas, disable=True)
            outputs.append(loop.judge.letters)
    assert outputs[0] == outputs[1]
    assert loop.judge.share >= K_SAMPLERS[name][within]


K_EVALUATIONS = (
    "sample_heun",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_sde",
)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", K_EVALUATIONS)
def test_samplers_of_k_diffusion_that_declare(name: str) -> None:
    """Two evaluations a step but for the last: the denoiser counts them."""
    sampling, loop = k_sampling(), Loop(declared=True)
    sigmas = sampling.get_sigmas_karras(8, 0.03, 14.6)
    with loop.cw:
        for _ in range(2):
            loop.restart()
            torch.manual_seed(0)
            evaluations = itertools.count()

            def denoise(x: Tensor, sigma: Tensor, evaluations: Any = evaluations) -> Tensor:
                if next(evaluations) % 2 == 0:
                    loop.begin()
                return x - sigma[:, None, None, None] * loop(x, sigma).tanh()

            getattr(sampling, name)(denoise, torch.randn(2, 2, 8, 8) * sigmas[0], sigmas, disable=True)
            assert loop.judge.letters == 3 * "FFAA" + "FFA"


# what each step's evaluations are at clock 2, in the sampler's own words: the last step goes to sigma 0
# of steps of two evaluations a plain clock counts the evaluations; `BY_STEPS` are passes of another schedule
BY_EACH, BY_STEPS = "FF AF AF AF AF AF AF A", "FF AA FF AA FF AA FF A"
BY_NAME = {
    "sample_euler": "F A F A F A F A",
    "sample_heun": BY_EACH,
    "sample_dpm_2": BY_EACH,
    "sample_dpm_2_ancestral": BY_EACH,
    "sample_lms": "F A F A F A F A",
    "sample_dpmpp_2s_ancestral": BY_EACH,
    "sample_dpmpp_sde": BY_EACH,
    "sample_dpmpp_2m": "F A F A F A F A",
    "sample_dpmpp_2m_sde": "F A F A F A F A",
    "sample_dpmpp_3m_sde": "F A F A F A F A",
    "sample_dpm_fast": "FFF AAA FF",
}


class Counted:
    """A UNet's calls, judged by the sampler's own steps: each evaluation is told which step it is of.

    Args:
        passes: the letters of each step. "AF" is one where the evaluations are counted, each as a step.
        branches: calls of an evaluation.
        clock: plain; or a schedule that is none, and goes by steps.
    """

    def __init__(self, passes: str, branches: int, *, clock: bool = True) -> None:
        self.judge, self.branches = Judge(Tiny()), branches
        self.cw = ch.wrap(self.judge.unet, schedule=ch.Schedule.every(2, stop=None if clock else 99))
        steps = passes.replace(" ", "") if "AF" in passes else passes.split()
        self.of = [step for step, letters in enumerate(steps) for _ in letters]
        self.conditions = [torch.randn(1, 3), torch.randn(1, 3)][:branches]
        self.evaluation = -1

    def begin(self) -> None:
        self.judge.begin()
        self.judge.letters, self.evaluation = "", -1

    def __call__(self, sample: Tensor, time: Any) -> Tensor:
        self.evaluation += 1
        step = self.of[self.evaluation]
        calls = [self.judge.call(sample, time, c, step=step, branch=k) for k, c in enumerate(self.conditions)]
        return sum(calls)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("churn", [0.0, 3.0])
@pytest.mark.parametrize("clock", [True, False])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_sampler_by_its_name(name: str, clock: bool, branches: int, churn: float) -> None:
    """k-diffusion's own code, twice in one block: `cw.sampler(name, sigmas)` knows its steps."""
    sampling, passes = k_sampling(), BY_NAME[name]
    passes = BY_STEPS if passes == BY_EACH and not clock else passes
    counted = Counted(passes, branches, clock=clock)
    sigmas = sampling.get_sigmas_karras(8, 0.03, 14.6)
    options: dict[str, Any] = {"s_churn": churn} if name in ("sample_heun", "sample_dpm_2") else {}
    if churn and not options:
        pytest.skip("it has no churn")
    if not clock and BY_NAME[name] != BY_EACH:
        pytest.skip("it goes by steps")
    denoise = lambda x, sigma: x - sigma[:, None, None, None] * counted(x, sigma).tanh()  # noqa: E731
    with counted.cw as cw, cw.sampler(name, sigmas):
        for _ in range(2):
            counted.begin()
            x = torch.randn(2, 2, 8, 8) * sigmas[0]
            if name == "sample_dpm_fast":
                sampling.sample_dpm_fast(denoise, x, 0.03, 14.6, 8, disable=True)
            else:
                getattr(sampling, name)(denoise, x, sigmas, disable=True, **options)
            assert counted.judge.letters == "".join(letter * branches for letter in passes.replace(" ", ""))


def comfy_heun_plus(counted: Counted, sigmas: Tensor) -> None:
    """Times as ComfyUI's heunpp2 and seeds_3 take them."""
    for k in range(len(sigmas) - 1):
        rest = len(sigmas) - 1 - k
        for j in range(min(rest, 3)):
            counted(torch.randn(1, 2, 8, 8), sigmas[k + j] * torch.ones(1))


def comfy_seeds(counted: Counted, sigmas: Tensor) -> None:
    for now, then in itertools.pairwise(sigmas):
        for part in (0.0, 1 / 3, 2 / 3)[: 3 if then else 1]:
            counted(torch.randn(1, 2, 8, 8), now + part * (then - now) * torch.ones(1))


def nvlabs(counted: Counted, sigmas: Tensor) -> None:
    """EDM's sampler with churn: the first time of a step is computed, the second is an entry of the list."""
    for now, then in itertools.pairwise(sigmas):
        counted(torch.randn(1, 2, 8, 8), torch.as_tensor(now + 0.2 * now))
        if then:
            counted(torch.randn(1, 2, 8, 8), then)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "run", "passes"),
    [
        ("heunpp2", comfy_heun_plus, "FFF AAA FFF AA F"),
        ("seeds_3", comfy_seeds, "FFF AAA FFF AAA F"),
        ("edm", nvlabs, "FF AF AF AF A"),
        ("karras_ve", nvlabs, "FF AF AF AF A"),
    ],
)
@pytest.mark.parametrize("branches", [1, 2])
def test_steps_of_other_samplers(name: str, run: Callable[..., None], passes: str, branches: int) -> None:
    counted = Counted(passes, branches)
    sigmas = torch.tensor([14.0, 9.0, 5.0, 2.0, 0.4, 0.0])
    with counted.cw as cw, cw.sampler(name, sigmas):
        run(counted, sigmas)
    assert counted.judge.letters == "".join(letter * branches for letter in passes.replace(" ", ""))


@torch.no_grad()
@pytest.mark.parametrize(("method", "passes"), [("midpoint", "FF AF AF AF"), ("rk4", "FFFF AAAA FFFF AAAA")])
def test_steps_of_torchdiffeq(method: str, passes: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    counted, times = Counted(passes, 1), torch.linspace(1, 0, 5)
    with counted.cw as cw, cw.sampler(method, times):
        torchdiffeq.odeint(lambda t, x: counted(x, t).tanh(), torch.randn(1, 2, 8, 8), times, method=method)
    assert counted.judge.letters == passes.replace(" ", "")


@torch.no_grad()
@pytest.mark.parametrize("at", range(3, 8))
def test_an_error_in_the_middle_of_a_step_of_a_sampler(at: int) -> None:
    """The evaluation is tried again in the same block: what is left of its step is full, the first of the next too."""

    class Fails(Tiny):
        fails = False

        def forward(self, x: Tensor, t: Any, c: Tensor | None = None, **more: Any) -> Tensor:
            self.fails, fails = False, self.fails
            if fails:
                raise MemoryError
            return super().forward(x, t, c, **more)

    unet, sigmas = Fails(), torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    judge = Judge(unet)
    with ch.wrap(unet, schedule=lambda step: True) as cw, cw.sampler("dpm_2", sigmas):
        for evaluation in range(12):
            k = evaluation // 2
            time = (sigmas[k] * sigmas[k + 1]).sqrt() if evaluation % 2 else sigmas[k].clone()
            if evaluation == at:
                unet.fails = True
                with pytest.raises(MemoryError):
                    unet(torch.randn(1, 2, 8, 8), time)
            judge.call(torch.randn(1, 2, 8, 8), time, step=k, branch=evaluation % 2)
    full = (2 - at % 2) + 2  # the rest of its step, and the next one
    assert judge.letters == "FF" + "A" * (at - 2) + "F" * full + "A" * (12 - at - full)


ORDERS = st.sampled_from([[0, 1], [0, 1], [0, 1], [0]])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25)
@given(orders=st.lists(ORDERS, min_size=16, max_size=16), shared=st.booleans(), clock=st.booleans())
def test_branches_that_come_and_go_within_a_sampler(orders: list[list[int]], shared: bool, clock: bool) -> None:
    """Heun's evaluations share their times: where calls cannot be counted, nothing is taken for another step's.

    The branch without the prompt comes and goes, as within a guidance interval; the order stays.
    """
    random, counted = torch.Generator().manual_seed(0), Counted("FF AA", 2, clock=clock)
    sigmas = torch.linspace(14, 1, 9)
    with counted.cw as cw, cw.sampler("heun", sigmas):
        for k in range(8):
            for j in range(2):
                sigma = sigmas[k + j] + (0 if shared else 0.1 * j)
                for branch in orders[2 * k + j]:
                    x = torch.randn(1, 2, 8, 8, generator=random)
                    counted.judge.call(
                        x, sigma.clone(), counted.conditions[branch], step=2 * k + j if clock else k, branch=branch
                    )
    event(f"adaptor passes: {counted.judge.letters.count('A')}")


@torch.no_grad()
@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral", "edm"])
def test_times_that_run_up_and_down_are_told_what_to_write(name: str) -> None:
    sampling, unet = k_sampling(), Tiny()
    sigmas = karras(8).float() if name == "edm" else sampling.get_sigmas_karras(8, 0.03, 14.6)
    denoise = lambda x, sigma: x - sigma[:, None, None, None] * unet(x, sigma).tanh()  # noqa: E731

    def churn() -> None:
        for sigma in (sigma for k in range(8) for sigma in (sigmas[k] * 1.2, sigmas[k + 1])):
            unet(torch.randn(2, 2, 8, 8), sigma)

    run = getattr(sampling, f"sample_{name}", None)
    x = torch.randn(2, 2, 8, 8) * 14
    with ch.wrap(unet), pytest.warns(ch.NoEffectWarning, match="cw.sampler"):
        churn() if run is None else run(denoise, x, sigmas, disable=True)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sampler_that_chooses_its_steps_as_it_runs() -> None:
    """Undeclared: full passes, and one warning. Declared by its callback: three evaluations a step."""
    sampling, judge = k_sampling(), Judge(Tiny())
    cw, x = ch.wrap(judge.unet), torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 14
    steps, now, accepted = [0], [0], []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        now[0] += not steps[0]  # undeclared, a new time is a new step
        noise = judge.call(x, sigma, step=steps[0] or now[0])
        return x - sigma[:, None, None, None] * noise.tanh()

    def step(info: Any) -> None:
        cw.step()
        steps[0] += 1
        accepted.append(info["n_accept"])

    options = {"rtol": 0.02, "h_init": 2.0, "disable": True}
    with pytest.warns(ch.NoEffectWarning, match="not known to be one trajectory") as warned:
        sampling.sample_dpm_adaptive(denoise, x, 0.03, 14.6, **options)
    assert len([one for one in warned if one.category is ch.NoEffectWarning]) == 1
    assert judge.share < 0.2
    with cw, cw.trajectory():
        judge.begin()
        cw.stats.clear()
        steps[0] = 1
        cw.step()
        sampling.sample_dpm_adaptive(denoise, x, 0.03, 14.6, callback=step, **options)
    assert cw.stats.adaptor_passes == 3 * (len(accepted) // 2)
    assert cw.stats.full_passes == 3 * len(accepted) - cw.stats.adaptor_passes
    assert accepted[-1] < len(accepted), "no step was tried again"  # then its first exit is the very one before


@pytest.mark.parametrize(
    ("name", "sigmas", "error"),
    [("dpmp_sde", [2, 1], "dpmpp_sde"), ("euler", [1], "next"), ("dpm_adaptive", [2, 1], "callback")],
)
def test_a_sampler_that_nobody_knows(name: str, sigmas: list[int], error: str) -> None:
    with ch.wrap(Tiny()) as cw, pytest.raises(ch.ArgumentError, match=error):
        cw.sampler(name, sigmas)


# -- times partly entries of a list and partly computed -----------------------------------------------------------


def edm_times(sigmas: Tensor, k: int) -> list[Tensor]:
    """NVlabs' sampler without churn: its first time of a step is computed nevertheless."""
    return [torch.as_tensor(sigmas[k] + 0 * sigmas[k]), sigmas[k + 1]]


def midpoint_times(sigmas: Tensor, k: int) -> list[Tensor]:
    return [sigmas[k], sigmas[k] + (sigmas[k + 1] - sigmas[k]) / 2]


def rk4_times(sigmas: Tensor, k: int) -> list[Tensor]:
    """Torchdiffeq's rule of 3/8."""
    now, then = sigmas[k], sigmas[k + 1]
    return [now, now + (then - now) / 3, now + (then - now) * 2 / 3, then]


MIXED = {one.__name__: one for one in (edm_times, midpoint_times, rk4_times)}


def karras(steps: int) -> Tensor:
    return torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps + 1, dtype=torch.float64) ** 7


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
@pytest.mark.parametrize("within", [False, True], ids=["as it is", "within trajectory"])
@pytest.mark.parametrize(
    ("times", "shares"), [("edm_times", (0.33, 0.4)), ("midpoint_times", (0.35, 0.45)), ("rk4_times", (0.2, 0.25))]
)
def test_times_partly_in_a_list(times: str, shares: tuple[float, float], within: bool) -> None:
    loop = Loop(declared=False, within=within)
    with loop.cw:
        for _ in range(2):
            loop.restart()
            sigmas = karras(18)
            with loop.run():
                for time in (time for k in range(18) for time in MIXED[times](sigmas, k)):
                    loop(torch.randn(1, 2, 8, 8), time)
            assert loop.judge.share >= shares[within], loop.judge.letters


RUNS = st.tuples(st.sampled_from(sorted(MIXED)), st.integers(0, 12), st.integers(6, 26), st.integers(1, 2))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25)
@given(runs=st.lists(RUNS, min_size=1, max_size=4), alone=st.sampled_from([None, 0.31, 0.9]))
def test_mixed_runs_that_are_given_up(runs: list[Any], alone: float | None) -> None:
    """Each is given up somewhere, and the next begins where it did not stop; between them may be a single call."""
    random, loop, sigmas = torch.Generator().manual_seed(0), Loop(declared=False), karras(18)
    conditions, at = [torch.randn(1, 3), torch.randn(1, 3)], -1.0

    def call(time: Tensor, branches: int) -> None:
        value = float(time)
        if value != loop.last:
            loop.step, loop.last = loop.step + 1, value
        for branch in range(branches):
            x = torch.randn(1, 2, 8, 8, generator=random)
            loop.judge.call(x, time, conditions[branch], step=loop.step, branch=branch)

    with loop.cw:
        for kind, first, calls, branches in runs:
            times = [time for k in range(first, 18) for time in MIXED[kind](sigmas, k)]
            if at >= 0 and float(times[0]) <= at:  # it would go on just where the last one stopped
                continue
            loop.judge.begin()
            for time in times[:calls]:
                call(time, branches)
            at = float(times[:calls][-1])
            if alone is not None:
                loop.judge.begin()
                loop.last = None
                call(torch.tensor(at * alone, dtype=torch.float64), 1)
                at *= alone
            loop.last = None
    event(f"adaptor passes: {min(loop.judge.letters.count('A'), 10)}")


# -- samplers written by hand -------------------------------------------------------------------------------------


def edm(loop: Loop) -> None:
    """Karras et al. 2022, algorithm 2, with churn: the noise is raised before each step."""
    sigmas, x = [8.0, 5.0, 3.0, 1.8, 1.0, 0.5, 0.2, 0.0], torch.randn(1, 2, 8, 8) * 8
    for now, then in itertools.pairwise(sigmas):
        loop.begin()
        hat = now * 1.3
        x = x + torch.randn_like(x) * (hat**2 - now**2) ** 0.5
        slope = loop(x, hat).tanh()
        other = x + (then - hat) * slope
        x = x + (then - hat) * (slope + loop(other, then).tanh()) / 2 if then else other


def rk4(loop: Loop) -> None:
    """Four evaluations a step: at its start, twice in its middle, at its end."""
    x = torch.randn(1, 2, 8, 8)
    for k in range(8):
        loop.begin()
        t, h = 1 - k / 8, -1 / 8
        a = loop(x, t).tanh()
        b = loop(x + a * h / 2, t + h / 2).tanh()
        c = loop(x + b * h / 2, t + h / 2).tanh()
        d = loop(x + c * h, t + h).tanh()
        x = x + (a + 2 * b + 2 * c + d) * h / 6


def repaint(loop: Loop) -> None:
    """Two steps down, one up, again and again."""
    t, x = 1000, torch.randn(1, 2, 8, 8)
    for k in range(12):
        loop.begin()
        x = x - 0.1 * loop(x, t).tanh()
        t += 100 if k % 3 == 2 else -100
        x = x + 0.1 * torch.randn_like(x) if k % 3 == 2 else x


def torchdiffeq_midpoint(loop: Loop) -> None:
    """The library asks for two evaluations a step."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    calls = 0

    def field(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        if calls % 2 == 0:
            loop.begin()
        calls += 1
        return loop(x, t.expand(len(x))).tanh()

    torchdiffeq.odeint(field, torch.randn(2, 2, 8, 8), torch.linspace(1, 0, 9), method="midpoint")


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
@pytest.mark.parametrize("within", [False, True], ids=["as it is", "within trajectory"])
@pytest.mark.parametrize(
    ("sampler", "shares"),
    [(edm, (0.0, 0.3)), (rk4, (0.3, 0.3)), (repaint, (0.0, 0.3)), (torchdiffeq_midpoint, (0.4, 0.45))],
)
def test_samplers_that_are_safe_undeclared(
    sampler: Callable[[Loop], None], shares: tuple[float, float], within: bool
) -> None:
    loop = Loop(declared=False, within=within)
    with loop.cw:
        for _ in range(2):
            loop.restart()
            with loop.run():
                sampler(loop)
            assert loop.judge.share >= shares[within]


@torch.no_grad()
@pytest.mark.parametrize(
    ("sampler", "passes"),
    [
        (edm, "FF AA FF AA FF AA F"),
        (rk4, "FFFF AAAA FFFF AAAA FFFF AAAA FFFF AAAA"),
        (repaint, "F A F F F A F A F F F A"),  # the step after each way up is full
        (torchdiffeq_midpoint, "FF AA FF AA FF AA FF AA"),
    ],
)
def test_samplers_that_declare_their_steps(sampler: Callable[[Loop], None], passes: str) -> None:
    loop = Loop(declared=True)
    with loop.cw:
        for _ in range(2):
            loop.restart()
            sampler(loop)
            assert loop.judge.letters == passes.replace(" ", "")


# -- times in every form ------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[float], Any]] = {
    "int": int,
    "float": float,
    "0-dim": torch.tensor,
    "0-dim int64": lambda t: torch.tensor(int(t)),
    "(1,)": lambda t: torch.tensor([t]),
    "(B,)": lambda t: torch.full((3,), t),
    "(B,) expanded": lambda t: torch.tensor(t).expand(3),
    "(B, 1)": lambda t: torch.full((3, 1), t),
    "half": lambda t: torch.tensor(t, dtype=torch.float16),
    "float32 of numpy": np.float32,
    "int64 of numpy": np.int64,
    "0-dim array": np.array,
}
LISTS: dict[str, list[float]] = {
    "timesteps": [875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0, 0.0],
    "sigmas": [80.0, 42.0, 21.0, 9.7, 4.1, 1.5, 0.5, 0.1],
    "normalised": [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    "flow matching, shifted": [1.0, 0.955, 0.9, 0.83, 0.75, 0.64, 0.5, 0.3],
    "log of sigma": [1.1, 0.9, 0.65, 0.38, 0.06, -0.33, -0.85, -1.5],
    "inversion": [1.0, 126.0, 251.0, 376.0, 501.0, 626.0, 751.0, 876.0],
}


def _whole(times: str, form: str) -> bool:
    return "int" not in form or times in ("timesteps", "inversion")


@torch.no_grad()
@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize(("times", "form"), [pair for pair in itertools.product(LISTS, FORMS) if _whole(*pair)])
def test_times_in_every_form(times: str, form: str, keyword: bool) -> None:
    """Half of the passes within `with cw.trajectory()`; else one fewer on an even grid, and two on an uneven one."""
    judge, form_of = Judge(Tiny()), FORMS[form]
    even = times in ("timesteps", "normalised", "inversion")
    with ch.wrap(judge.unet) as cw:
        for within in (False, False, True, True):
            judge.begin()
            judge.letters = ""
            with cw.trajectory() if within else contextlib.nullcontext():
                for k, t in enumerate(LISTS[times], 1):
                    x = torch.randn(3, 2, 8, 8)
                    if keyword:
                        judge.call(x, t=form_of(t), step=k)
                    else:
                        judge.call(x, form_of(t), step=k)
            assert judge.letters == ("FAFAFAFA" if within else "FFFAFAFA" if even else "FFFFFAFA"), cw.report()


@torch.no_grad()
def test_times_of_rows_are_full() -> None:
    """Training, or a validation loss: a time for each row, at random."""
    judge, random = Judge(Tiny()), torch.Generator().manual_seed(0)
    with ch.wrap(judge.unet) as cw:
        for _ in range(8):
            judge.begin()
            judge.call(torch.randn(3, 2, 8, 8), torch.rand(3, generator=random) * 1000, step=1)
        assert cw.report().cache == {}
    assert judge.letters == "F" * 8
    assert cw.stats.reasons == {"time differs between rows or cannot be read": 8}
    assert not cw.stats.trajectories


@pytest.mark.filterwarnings("ignore::clockwork_hooks.NoEffectWarning")
@torch.no_grad()
def test_duplicates_among_the_times() -> None:
    """Karras' sigmas as rounded times: where two steps share a time, whose features are whose is not known."""
    times = [999, 850, 620, 400, 230, 110, 45, 14, 3, 1, 1, 0, 0, 0]
    for make in (lambda: list(times), lambda: torch.tensor(times)):
        judge = Judge(Tiny())
        with ch.wrap(judge.unet):
            for _ in range(2):
                judge.begin()
                judge.letters = ""
                for k, t in enumerate(make(), 1):
                    judge.call(torch.randn(1, 2, 8, 8), t, step=k)
                assert judge.letters[:11] == ("FAFAFAFAFAF" if make()[0] is not times[0] else "FFFFFFFAFAF")


@torch.no_grad()
def test_a_picture_after_a_picture() -> None:
    """After one that was given up half-way, one of another length and one that starts lower: each as if alone."""
    from diffusers import DDIMScheduler

    def picture(call: Callable[[Tensor, Any, int], Tensor], steps: int, first: int = 0, last: int = 99) -> Tensor:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        for k, t in enumerate(scheduler.timesteps[first:last], 1):
            x = scheduler.step(call(x, t, k), t, x).prev_sample
        return x

    runs = [(8,), (8, 0, 3), (8, 4), (12,), (8,), (8, 0, 2), (8, 2), (5, 1)]
    alone = []
    for run in runs:
        with ch.wrap(Tiny()) as cw:
            alone.append(picture(lambda x, t, k, cw=cw: cw(x, t), *run))
    judge = Judge(Tiny())
    with ch.wrap(judge.unet):
        for run, expected in zip(runs, alone, strict=True):
            judge.begin()
            assert torch.equal(picture(lambda x, t, k: judge.call(x, t, step=k), *run), expected)
    assert judge.share >= 0.4


@torch.no_grad()
def test_a_list_just_below_times_that_are_in_none() -> None:
    """Fresh tensors, then the scheduler's list, as regular as if it were the same loop: it is another one."""
    judge = Judge(Tiny())
    with ch.wrap(judge.unet, schedule=lambda step: True):
        for k, t in enumerate((900.0, 800.0, 700.0), 1):
            judge.call(torch.randn(1, 2, 8, 8), torch.tensor(t), step=k)
        judge.begin()
        for k, t in enumerate(torch.tensor([600.0, 500.0, 400.0]), 1):
            judge.call(torch.randn(1, 2, 8, 8), t, step=k)
    assert judge.letters == "FFFFAA"


@torch.no_grad()
@pytest.mark.parametrize(
    ("listed", "first"),
    [
        (True, 0),
        (True, 1),
        (False, 0),
        (False, 1),
    ],
)
def test_a_branch_that_missed_one_of_two_steps_at_one_time(listed: bool, first: int) -> None:
    """Two steps of the list have the same time; the second branch has no call in the first of them."""
    times: Any = torch.tensor([900.0, 800.0, 800.0, 700.0, 600.0])
    judge, pair = Judge(Tiny()), torch.randn(2, 1, 3)
    with ch.wrap(judge.unet, schedule=lambda step: True):
        for k, t in enumerate(times if listed else times.tolist(), 1):
            for branch in (first, 1 - first):
                if (k, branch) != (2, 1):
                    judge.call(torch.randn(1, 2, 8, 8), t, pair[branch], step=k, branch=branch)
    assert judge.letters.count("A") >= (3 if listed else 2)
