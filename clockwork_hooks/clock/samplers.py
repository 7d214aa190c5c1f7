"""How often a sampler evaluates the UNet in each of its steps, by the sampler's name, and which call begins a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampler:
    """The evaluations of one sampler.

    Attributes:
        evaluations: (number of the step from 0, sigmas) → how many the step has, one after another at other times.
        shares: may the last evaluation of a step be at the time of the next step's first one? Then the calls are
            counted: as many as in the first evaluation.
        each: at a plain clock each evaluation is a step of its own, the first two of which are full: of steps of two
            evaluations the adaptor then has the first, with a feature that is half a step old, and the second, which
            weighs more in the step, is full (docs/samplers.md has what it is worth).
    """

    evaluations: Callable[[int, Sequence[float]], int]
    shares: bool = False
    each: bool = False

    def steps(self, sigmas: Sequence[float]) -> tuple[int, ...]:
        """Evaluations of each step over these sigmas.

        Example:
            >>> SAMPLERS["dpm_2"].steps([9.0, 4.0, 1.0, 0.0])
            (2, 2, 1)
        """
        counts = []
        for step in range(len(sigmas) - 1):
            counts.append(self.evaluations(step, sigmas))
            if counts[-1] == 0:  # all evaluations are spent
                return tuple(counts[:-1])
        return tuple(counts)


def _always(count: int) -> Callable[[int, Sequence[float]], int]:
    return lambda step, sigmas: count


def _but_to_zero(count: int) -> Callable[[int, Sequence[float]], int]:
    """So many, but a step to sigma 0 is one of Euler's."""
    return lambda step, sigmas: 1 if sigmas[step + 1] == 0 else count


def _heun_plus(step: int, sigmas: Sequence[float]) -> int:
    """The last step is Euler's, the one before it Heun's."""
    if sigmas[step + 1] == sigmas[-1]:
        return 1
    return 2 if sigmas[step + 2] == sigmas[-1] else 3


def _dpm_fast(step: int, sigmas: Sequence[float]) -> int:
    """As many evaluations in all as there are sigmas to go to: three a step, the rest in the last one or two."""
    total = len(sigmas) - 1
    last = [2, 1] if total % 3 == 0 else [total % 3]
    counts = [3] * (total // 3 - (total % 3 == 0)) + last
    return counts[step] if step < len(counts) else 0


_ONE = Sampler(_always(1))
_TWO = Sampler(_but_to_zero(2), each=True)
_TWO_SHARING = Sampler(_but_to_zero(2), shares=True, each=True)

# Read off k-diffusion and ComfyUI (k_diffusion/sampling.py, extra_samplers/uni_pc.py), NVlabs' EDM and torchdiffeq.
# A sampler that evaluates twice at one time, one after the other, has one evaluation there: they are told by order.
SAMPLERS: dict[str, Sampler] = {
    **dict.fromkeys(
        ("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "lms", "ddim", "ddpm"), _ONE
    ),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun"), _ONE),
    **dict.fromkeys(("dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "lcm", "ipndm", "ipndm_v"), _ONE),
    **dict.fromkeys(("deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral"), _ONE),
    **dict.fromkeys(("res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp"), _ONE),
    **dict.fromkeys(("ddpm", "er_sde", "sa_solver", "sa_solver_pece", "uni_pc", "uni_pc_bh2"), _ONE),
    **dict.fromkeys(("dpm_2", "dpmpp_sde", "dpmpp_sde_gpu", "seeds_2"), _TWO),
    **dict.fromkeys(("heun", "edm", "karras_ve", "exp_heun_2_x0", "exp_heun_2_x0_sde"), _TWO_SHARING),
    # with eta 1 half-way down to their lowered sigma, in its logarithm, is the next step's
    **dict.fromkeys(("dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp"), _TWO_SHARING),
    "heunpp2": Sampler(_heun_plus, shares=True),
    "seeds_3": Sampler(_but_to_zero(3)),
    "dpm_fast": Sampler(_dpm_fast),
    "midpoint": Sampler(_always(2), each=True),
    "rk4": Sampler(_always(4), shares=True),
}


def find_sampler(name: str) -> Sampler | None:
    """The sampler of this name, "sample_" before it left out; None where it is not known."""
    return SAMPLERS.get(name.removeprefix("sample_"))


def steps_as_it_runs(name: str) -> bool:
    """Does the sampler of this name choose its steps while it runs, so that nobody can count them ahead?"""
    return name.removeprefix("sample_") == "dpm_adaptive"


class SamplerSteps:
    """Tells which of a run's calls begin a step of its sampler.

    A new evaluation begins with another time. Where the last evaluation of a step shares its time with what follows, it
    has as many calls as the run's first one had, of the same branches. Once they turn out to be others, they cannot be
    counted: each call is told to begin a run, until the sampler's is over. A run that is over, or comes back to its
    first time, begins anew.

    Args:
        counts: evaluations of each step, `Sampler.steps`.
        shares: of the sampler.
        each: every evaluation is a step of its own.

    Example:
        >>> heun = SamplerSteps((2, 2, 1), shares=True)
        >>> [heun.begins(time) for time in (9.0, 4.0, 4.0, 1.0, 1.0)]
        ['run', None, 'step', None, 'step']
    """

    def __init__(self, counts: Sequence[int], *, shares: bool, each: bool = False) -> None:
        self._counts, self._shares, self.each = tuple(counts), shares, each
        self._begin(None)

    def _begin(self, time: float | None) -> None:
        self._step, self._evaluation, self._calls = 0, 0, 1
        self._first = self._time = time
        self._branches: list[Hashable] = []  # of the first evaluation's calls
        self._usual: int | None = None
        self._unsure = False

    def begins(self, time: float | None) -> str | None:
        """What begins with the call that has this time: a "run", a "step", or neither."""
        begun = self._what_begins(time)
        return "run" if self._unsure and self._shares else begun

    def _what_begins(self, time: float | None) -> str | None:
        if self._first is None:
            self._begin(time)
            return "run"
        if not self._is_new(time):
            self._calls += 1
            return None
        self._unsure = self._unsure or self._usual not in (None, self._calls)
        self._usual = self._usual or self._calls
        self._evaluation, self._calls, self._time = self._evaluation + 1, 1, time
        if self._evaluation < self._counts[self._step]:
            return "step" if self.each else None
        self._step, self._evaluation = self._step + 1, 0
        if self._step < len(self._counts):
            return "step"
        first, unsure = self._first, self._unsure
        self._begin(time)
        if unsure and self._shares and time != first:  # where in the run it is was lost: only its beginning tells
            self._first, self._unsure = first, True
        return "run"

    def placed(self, branch: Hashable) -> None:
        """The call that `begins` was asked about is of this branch."""
        if self._usual is None:
            self._branches.append(branch)
        elif self._calls > len(self._branches) or self._branches[self._calls - 1] != branch:
            self._unsure = True

    def _is_new(self, time: float | None) -> bool:
        """Does an evaluation begin with the call that has this time?"""
        if time != self._time:
            if time == self._first:  # the run has begun anew
                self._step, self._evaluation = len(self._counts) - 1, self._counts[-1] - 1
            return True
        last = self._evaluation + 1 == self._counts[self._step]
        return self._shares and last and self._usual is not None and self._calls >= self._usual
