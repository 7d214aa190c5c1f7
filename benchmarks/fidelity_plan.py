"""What `benchmarks/fidelity.py` trains and measures: samplers, adaptors and rows, in groups, the most important first.

A group is what shares one sampler and one region: its adaptors learn from the same trajectories, its rows are judged
against the same plain pictures. Rows are named "group/label" everywhere.

Source of the experiments: arXiv 2312.08128, Tab. 1 and 3-5, Fig. 4 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clockwork_hooks.demo.model import GUIDANCE
from clockwork_hooks.schedule import Schedule

__all__ = ["GROUPS", "MODES_SEEDS", "Group", "Row", "Sampler", "Trained", "group_named", "modes_group"]

MODES_SEEDS = (0, 1, 2)  # of training, where ways of training are compared
WIDTH = 64  # of the ResNets: 12% of a full pass, so that clock 2 saves a third of the MACs


@dataclass(frozen=True, slots=True)
class Sampler:
    """How pictures are sampled."""

    scheduler: str = "dpm++"
    steps: int = 8
    guidance: float = GUIDANCE


@dataclass(frozen=True, slots=True)
class Trained:
    """An adaptor to train.

    Attributes:
        name: its folder.
        kind: class in `clockwork_hooks.adaptors`.
        loss, mode: as `distill` takes them.
        inputs: what it reads beside the time.
        options: of the class.
        seed: of its first weights, and of the noise and prompts that it is trained on.
    """

    name: str
    kind: str = "ScaledResNetAdaptor"
    loss: str = "guided-output"
    mode: str = "unrolled"
    inputs: tuple[str, ...] = ("entry", "exit", "text")
    options: tuple[tuple[str, int], ...] = (("width", WIDTH),)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One way of sampling.

    Attributes:
        label: within its group.
        steps: of the sampler, where it is not the group's.
        adaptor: None for no Clockwork, "identity", or what was trained.
        clock: one full pass every so many steps.
        at: the steps that use the adaptor, in the place of the clock.
        deepcache: runs the peer's package, with this cache branch, interval 2.
    """

    label: str
    steps: int | None = None
    adaptor: str | Trained | None = None
    clock: int = 2
    at: tuple[int, ...] | None = None
    deepcache: int | None = None

    @property
    def schedule(self) -> Schedule:
        """Which steps are full."""
        return Schedule.every(self.clock) if self.at is None else Schedule.at(self.at)

    @property
    def told(self) -> dict[str, Any]:
        """What it is, for the JSON of its measurement."""
        trained = self.adaptor if isinstance(self.adaptor, Trained) else None
        return {
            "steps": self.steps,
            "adaptor": trained.name if trained else self.adaptor,
            "kind": trained.kind if trained else None,
            "loss": trained.loss if trained else None,
            "mode": trained.mode if trained else None,
            "schedule": None if self.adaptor is None else str(self.schedule),
        }

    def is_measured_by(self, found: Mapping[str, Any] | None) -> bool:
        """Is this the measurement of this row, not of an earlier plan's row of the same label?"""
        return found is not None and all(found.get(name) == value for name, value in self.told.items())


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with one sampler and one region.

    Attributes:
        name: of its file.
        rows: beside "plain", which is always there.
        sampler: of the plain row.
        region: "outer" or "paper", the two cuts of the default region; or the place of another one in
            `find_regions`, widest first.
        share: of the basic number of training trajectories.
    """

    name: str
    rows: tuple[Row, ...]
    sampler: Sampler = Sampler()
    region: str | int = "outer"
    share: float = 1.0

    @property
    def trained(self) -> tuple[tuple[Trained, Row], ...]:
        """The adaptors to train, each with the row that says its schedule."""
        return tuple((row.adaptor, row) for row in self.rows if isinstance(row.adaptor, Trained))

    @property
    def seconds(self) -> float:
        """A first guess of what it takes on one large GPU; `run` corrects it by what other groups took."""
        sampled = sum(row.steps or self.sampler.steps for row in (Row("plain"), *self.rows))
        return 8 + 18 * self.share * len(self.trained) + 0.5 * sampled


def _pair(steps: int, scheduler: str = "dpm++", share: float = 1.0) -> Group:
    """Identity and trained adaptor of one sampler."""
    prefix = f"steps-{steps}" if scheduler == "dpm++" else f"solver-{scheduler}"
    rows = (Row("identity", adaptor="identity"), Row("trained", adaptor=Trained(prefix)))
    return Group(prefix, rows, Sampler(scheduler, steps), share=share)


def modes_group(steps: int, seed: int) -> str:
    """The name of the group of the ways of training with so many steps, from one training seed."""
    return f"modes-{steps}" + (f"-seed-{seed}" if seed else "")


def _modes(steps: int) -> tuple[Group, ...]:
    """The three ways of training, each with as many gradient steps, from several training seeds."""
    made = []
    for seed in MODES_SEEDS:
        name = modes_group(steps, seed)
        rows = tuple(
            Row(mode.replace("_", "-"), adaptor=Trained(f"{name}-{mode.replace('_', '-')}", mode=mode, seed=seed))
            for mode in ("unrolled", "forward_noise", "on_policy")
        )
        made.append(Group(name, rows, Sampler(steps=steps), share=3.0 if steps == 4 else 0.5))
    return tuple(made)


def _cut(region: str | int) -> Group:
    name = f"cut-{region}"
    rows = (Row("identity", adaptor="identity"), Row("trained", adaptor=Trained(name)))
    return Group(name, rows, region=region)


def _losses(name: str, sampler: Sampler, *more: Row, share: float) -> Group:
    made = tuple(
        Row(loss, adaptor=Trained(f"{name}-{loss}", loss=loss))
        for loss in ("feature", "guided-feature", "guided-output")
    )
    return Group(name, (Row("identity", adaptor="identity"), *made, *more), sampler, share=share)


_LATE, _MIDDLE, _BOTH = (5, 6, 7, 8), (3, 4, 5, 6), (3, 4, 6, 7)  # _BOTH: the first and the last step are full
_INNER = (3, 5, 7)  # every other step, the first two and the last one full
_LIGHT = (("light", 1),)
_PAPER = "ResNetAdaptor"


def _light(name: str) -> Trained:
    return Trained(name, "UNetAdaptor", options=_LIGHT)


GROUPS: tuple[Group, ...] = (
    _losses(
        "losses-8",
        Sampler(),
        Row("ResNet, feature", adaptor=Trained("losses-8-resnet-feature", _PAPER, loss="feature")),
        Row("ResNet, guided-output", adaptor=Trained("losses-8-resnet-guided-output", _PAPER)),
        *(Row(f"plain, {steps} steps", steps=steps) for steps in (6, 5, 4, 3)),
        Row("DeepCache, branch 0", deepcache=0),
        Row("DeepCache, branch 1", deepcache=1),
        share=2.0,
    ),
    _pair(4),
    _pair(6),
    Group(
        "kinds-8",
        (
            Row("UNet-light", adaptor=_light("kinds-8-unet-light")),
            Row("UNet", adaptor=Trained("kinds-8-unet", "UNetAdaptor", options=())),
            Row("width 48", adaptor=Trained("kinds-8-width-48", options=(("width", 48),))),
            Row("width 80", adaptor=Trained("kinds-8-width-80", options=(("width", 80),))),
        ),
        share=2.0,
    ),
    Group(
        "inputs-8",
        (
            Row("entry", adaptor=Trained("inputs-8-entry", _PAPER, inputs=("entry",))),
            Row("exit", adaptor=Trained("inputs-8-exit", _PAPER, inputs=("exit",))),
            Row("entry + exit", adaptor=Trained("inputs-8-both", _PAPER, inputs=("entry", "exit"))),
            Row(
                "every step, no cache",
                adaptor=Trained("inputs-8-every", _PAPER, inputs=("entry", "text")),
                at=(*range(2, 9),),
            ),
        ),
        share=2.0,
    ),
    Group(  # what came nearest to the plain model: fewer adaptor steps, each of which skips more
        "best-8",
        (
            Row("identity, 3 5 7", adaptor="identity", at=_INNER),
            Row("width 64, 3 5 7", adaptor=Trained("best-8-width-64"), at=_INNER),
            Row("width 32, 3 5 7", adaptor=Trained("best-8-width-32", options=(("width", 32),)), at=_INNER),
            Row("UNet-light, 3 5 7", adaptor=_light("best-8-unet-light"), at=_INNER),
        ),
        region=0,
        share=4.0,
    ),
    Group(  # the default cut and clock 2, trained for longer
        "long-8",
        (
            Row("UNet-light", adaptor=_light("long-8-unet-light")),
            Row("width 64", adaptor=Trained("long-8-width-64")),
            Row("width 64, on-policy", adaptor=Trained("long-8-on-policy", mode="on_policy")),
        ),
        share=3.0,
    ),
    *_modes(4),
    Group(  # four steps, trained for longer
        "long-4",
        (
            Row("UNet-light", adaptor=_light("long-4-unet-light")),
            Row("width 64", adaptor=Trained("long-4-width-64")),
        ),
        Sampler(steps=4),
        share=3.0,
    ),
    Group("longer-4", (Row("width 64", adaptor=Trained("longer-4-width-64")),), Sampler(steps=4), share=9.0),
    Group(
        "clocks-50",
        tuple(Row(f"identity, clock {clock}", adaptor="identity", clock=clock) for clock in (2, 3, 4)),
        Sampler("ddim", 50),
    ),
    _cut(0),  # nearly the whole UNet, as DeepCache cuts
    _cut(2),  # below the second level: half of the MACs
    _cut("paper"),
    *(_pair(8, scheduler) for scheduler in ("ddim", "dpm", "pndm")),
    Group(
        "schedules-8",
        (
            Row("identity, 5 6 7 8", adaptor="identity", at=_LATE),
            Row("trained, 5 6 7 8", adaptor=Trained("schedules-8-late"), at=_LATE),
            Row("identity, 3 4 5 6", adaptor="identity", at=_MIDDLE),
            Row("trained, 3 4 5 6", adaptor=Trained("schedules-8-middle"), at=_MIDDLE),
            Row("identity, 3 4 6 7", adaptor="identity", at=_BOTH),
            Row("trained, 3 4 6 7", adaptor=Trained("schedules-8-both"), at=_BOTH),
        ),
        share=2.0,
    ),
    _pair(16),
    *_modes(16),
    *_modes(8),
    *_modes(6),
    _losses("guidance-4", Sampler(guidance=4.0), share=1.0),
)


def group_named(name: str) -> Group:
    """The group of that name."""
    return next(group for group in GROUPS if group.name == name)
