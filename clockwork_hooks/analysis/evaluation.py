"""`evaluate`: the same pictures by several ways of running one UNet, judged against the plain ones; and its report.

Every variant gets the same conditions and the same seeds, so the same noise. Batches of all variants are interleaved,
so whatever else the machine does meets them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from clockwork_hooks._generate import Generate, with_seed
from clockwork_hooks._numbers import count, duration, macs, percent
from clockwork_hooks._version import versions
from clockwork_hooks.adaptors.stand_in import resolve_adaptor
from clockwork_hooks.analysis.flops import counting
from clockwork_hooks.analysis.sampling import check_runs, count_steps, never_called
from clockwork_hooks.analysis.timing import device_name, measured
from clockwork_hooks.engine.attach import wrap
from clockwork_hooks.engine.wrapper import check_unet
from clockwork_hooks.errors import ArgumentError, is_several, named_options
from clockwork_hooks.metrics import Metric, Paired
from clockwork_hooks.regions.find import Choice
from clockwork_hooks.reports.progress import ProgressBar
from clockwork_hooks.reports.report import Report, reading
from clockwork_hooks.reports.tables import Table, table
from clockwork_hooks.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one variant, with what the seed does to it.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        digits = 4 if abs(self.mean) < 2 else 2
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class VariantResult:
    """What one variant costs and how its pictures are judged.

    Attributes:
        name: as given.
        scores: name of the score → its values; scores that compare with the plain pictures are absent for "plain".
        macs_per_image: convolutions and matrix products of the UNet, attention products counted.
        seconds_per_image: wall time of `generate`, the median over the batches.
        images: pictures a seed.
        full_passes, adaptor_passes: UNet calls over all seeds; None without Clockwork.
    """

    name: str
    scores: Mapping[str, Score]
    macs_per_image: int
    seconds_per_image: float
    images: int
    full_passes: int | None = None
    adaptor_passes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, and mean and spread of each score; for JSON."""
        scores = {
            name: {"mean": score.mean, "spread": score.spread, "values": list(score.values)}
            for name, score in self.scores.items()
        }
        return {name: getattr(self, name) for name in self.__slots__} | {"scores": scores}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VariantResult:
        """What `to_dict` gave."""
        scores = {name: Score(tuple(score["values"])) for name, score in data["scores"].items()}
        return cls(**{name: data[name] for name in cls.__slots__ if name != "scores"}, scores=scores)


@dataclass(frozen=True, slots=True)
class Evaluation(Report):
    """What `evaluate` found; prints as a table.

    Attributes:
        rows: "plain" first.
        better: name of each score → "higher" or "lower".
        settings: seeds, device, versions.
    """

    SCHEMA = "evaluation/1"

    rows: tuple[VariantResult, ...]
    better: Mapping[str, str]
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> VariantResult:
        """The row of a variant."""
        return next(row for row in self.rows if row.name == name)

    def table(self) -> Table:
        """The comparison as one table; an arrow says which way is better."""
        arrows = {"higher": "↑", "lower": "↓"}
        heads = [f">{name} {arrows[way]}" for name, way in self.better.items()]
        plain = self.rows[0]
        cells = [
            (
                row.name,
                *(row.scores.get(name) for name in self.better),
                macs(row.macs_per_image),
                None if row is plain else percent(1 - row.macs_per_image / plain.macs_per_image),
                duration(row.seconds_per_image),
            )
            for row in self.rows
        ]
        notes = (
            f"{count(plain.images, 'picture')}, {'seed' if len(self.settings['seeds']) == 1 else 'seeds'} "
            f"{', '.join(map(str, self.settings['seeds']))}: mean ± standard deviation "
            f"over the seeds, on {self.settings['device']}. MACs of the UNet, attention products counted.",
        )
        return table("Fidelity", ("variant", *heads, ">MACs/image", ">saved", ">time/image"), cells, notes=notes)

    def data(self) -> dict[str, Any]:
        """Everything; times in seconds, MACs in units."""
        return {"rows": [row.to_dict() for row in self.rows], "better": self.better, "settings": self.settings}

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """What `to_json` wrote.

        Raises:
            ArgumentError: the text is no evaluation.
        """
        with reading(cls, text) as data:
            return cls(tuple(VariantResult.from_dict(row) for row in data["rows"]), data["better"], data["settings"])


PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of making the pictures.

    Attributes:
        wrap: options of `wrap`, such as `{"clock": 2, "adaptor": "folder"}`; None leaves the UNet as it is.
        generate: replaces `evaluate`'s own, for fewer steps, another sampler, or a peer's cache.

    Example:
        >>> variants = {"identity": Variant({"clock": 2}), "every third": Variant({"clock": 3})}
        >>> variants["every third"].wrap
        {'clock': 3}
    """

    wrap: Mapping[str, Any] | None = None
    generate: Generate | None = None


@dataclass(slots=True)
class _Tally:
    """What gathers about one variant while it runs."""

    name: str
    variant: Variant
    options: dict[str, Any] | None
    rows: list[list[list[Tensor]]] = field(default_factory=list)  # by seed, metric, batch
    seconds: list[float] = field(default_factory=list)
    images: int = 0
    passes: tuple[int, int] = (0, 0)
    macs: int = 0
    counted: int = 0
    steps: int | None = None  # of the sampler, where the variant's schedule counts from their end

    @property
    def counts_steps(self) -> bool:
        """Is it yet to be seen how many there are?"""
        schedule = None if self.options is None else self.options.get("schedule")
        return self.steps is None and schedule is not None and Schedule.of(schedule).counts_from_end


@named_options
def evaluate(
    unet: nn.Module,
    generate: Generate,
    conditions: Iterable[Any],
    variants: Mapping[str, Variant | Mapping[str, Any]],
    *,
    metrics: Sequence[Metric] = (),
    seeds: Sequence[int] = (0, 1, 2),
    console: Console | None = None,
) -> Evaluation:
    """Judge variants of one UNet against the plain pictures from the same noise.

    Args:
        unet: what `generate` calls; unchanged afterwards.
        generate: your own sampling code: `generate(batch, seed)` draws its noise from the seed and returns pictures
            (B, 3, H, W) in [0, 1]; or `generate(batch)`, as in `measure_drift`.
        conditions: batches of whatever `generate` takes, usually lists of prompts.
        variants: name → options of `wrap`, or a `Variant`; "plain" is always there.
        metrics: what to judge by; without any, `Paired()`.
        seeds: one evaluation over all conditions for each; the spread over them shows how certain a difference is.
            Batch k of K is sampled with seed · K + k, so that no two share their noise.
        console: where the progress bar goes; None for standard error.

    Returns:
        A row a variant, "plain" first.

    Raises:
        ArgumentError: no conditions, no seeds, one seed twice, a variant called "plain", pictures of another form, or
            `generate` never calls the UNet.
        AdaptorError: a variant's adaptor cannot be called or loaded, or does not fit the region.
        WrapError: the UNet is wrapped already.

    Example:
        >>> import torch
        >>> from clockwork_hooks import evaluate
        >>> from clockwork_hooks.demo import DEMO_PROMPTS, load_demo
        >>> model = load_demo()
        >>> result = evaluate(
        ...     model.unet,
        ...     lambda prompts, seed: model.sample(prompts, steps=4, scheduler="ddim", seed=seed),
        ...     [DEMO_PROMPTS[:2]],
        ...     {"identity": {"clock": 2}},
        ...     seeds=(0,),
        ... )
        >>> [row.name for row in result.rows], result["identity"].scores["PSNR"].mean > 10
        (['plain', 'identity'], True)

    Source: arXiv 2312.08128, Sec. 5 (what is measured there: FID, CLIP score, FLOPs, latency).
    """
    check_unet(unet)
    batches, judges = check_runs(generate, conditions, seeds), _judges(metrics)
    _check(variants)
    tallies = [_Tally(PLAIN, Variant(), None)]
    for name, value in variants.items():
        variant = value if isinstance(value, Variant) else Variant(wrap=value)
        tallies.append(_Tally(name, variant, None if variant.wrap is None else dict(variant.wrap)))
    with ProgressBar(console) as bar:
        task = bar.add_task("", total=len(seeds) * len(batches) * len(tallies))
        for number, seed in enumerate(seeds):
            for tally in tallies:
                tally.rows.append([[] for _ in judges])
            for k, batch in enumerate(batches):
                plain: Tensor | None = None
                for tally in tallies:
                    bar.update(task, description=f"seed {seed}, {tally.name}")
                    images = _run(unet, tally, generate, batch, seed * len(batches) + k)
                    for judge, rows in zip(judges, tally.rows[number], strict=True):
                        seen = judge.observe(images, plain, batch)
                        if seen is not None:
                            rows.append(seen.detach().double().cpu())
                    plain = images if plain is None else plain
                    bar.advance(task)
    better = {name: way for judge in judges for name, way in judge.better.items()}
    results = tuple(_result(tally, judges, len(seeds)) for tally in tallies)
    return Evaluation(results, better, _settings(results[0].images, seeds, unet))


@torch.no_grad()
def _run(unet: nn.Module, tally: _Tally, generate: Generate, batch: Any, seed: int) -> Tensor:
    """One batch of one variant, timed; the first one is traced or counted, and timed only if it stays the only one."""
    make, first = with_seed(tally.variant.generate or generate), not tally.seconds
    device = next((tensor.device for tensor in unet.parameters()), torch.device("cpu"))
    if tally.options is not None:
        if tally.counts_steps:
            tally.steps = count_steps(unet, lambda: make(batch, seed), **tally.options)
        with wrap(unet, **tally.options) as cw, cw.trajectory(steps=tally.steps):
            images, seconds = _timed(make, batch, seed, device)
            if not cw.stats.full_passes + cw.stats.adaptor_passes:
                raise never_called(unet)
            tally.passes = (tally.passes[0] + cw.stats.full_passes, tally.passes[1] + cw.stats.adaptor_passes)
            tally.macs += cw.stats.macs_run
            if not tally.options.keys() & {"plan", "clocks"}:  # found once; the next wrapper needs no trace
                chosen = {one.name for one in fields(Choice)}
                tally.options = {k: v for k, v in tally.options.items() if k not in chosen} | {"region": cw.region}
        tally.counted += len(images)
    elif first:
        with counting(unet) as calls:
            images, seconds = _timed(make, batch, seed, device)
        if not calls and tally.variant.generate is None:  # a variant's own may sample with another model
            raise never_called(unet)
        tally.macs, tally.counted = sum(calls), len(images)
    else:
        images, seconds = _timed(make, batch, seed, device)
    tally.seconds.append(seconds / max(len(images), 1))
    tally.images += len(images)
    return images


def _timed(make: Callable[[Any, int], Any], batch: Any, seed: int, device: torch.device) -> tuple[Tensor, float]:
    images, seconds = measured(lambda: make(batch, seed), device)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        seen = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(
            "generate must return pictures (B, 3, H, W) of floats in [0, 1]",
            seen={"returned": seen},
            do='with a diffusers pipeline: pipe(..., output_type="pt").images',
        )
    return images, seconds


def _result(tally: _Tally, judges: Sequence[Metric], seeds: int) -> VariantResult:
    scores: dict[str, list[float]] = {}
    for of_seed in tally.rows:
        for judge, rows in zip(judges, of_seed, strict=True):
            if rows:
                for name, value in judge.score(torch.cat(rows)).items():
                    scores.setdefault(name, []).append(value)
    full, adapted = tally.passes if tally.options is not None else (None, None)
    return VariantResult(
        name=tally.name,
        scores={name: Score(tuple(values)) for name, values in scores.items()},
        macs_per_image=tally.macs // max(tally.counted, 1),
        seconds_per_image=statistics.median(tally.seconds[1:] or tally.seconds),
        images=tally.images // seeds,
        full_passes=full,
        adaptor_passes=adapted,
    )


def _judges(metrics: Any) -> list[Metric]:
    """What to judge by; raise `ArgumentError` if anything else is among it."""
    given = list(metrics) if is_several(metrics) else [metrics]
    wrong = [type(one).__name__ for one in given if isinstance(one, type) or not isinstance(one, Metric)]
    if wrong:
        raise ArgumentError(
            "metrics are objects with better, observe and score, in a list",
            seen={"no metric": ", ".join(wrong)},
            do="pass metrics=[Paired()], or one of your own: help(ch.metrics.Metric)",
        )
    return given or [Paired()]


def _check(variants: Mapping[str, Any]) -> None:
    named = isinstance(variants, Mapping)
    wrong = [name for name in variants if not isinstance(variants[name], (Variant, Mapping, NoneType))] if named else ()
    if not named or wrong:
        raise ArgumentError(
            "variants are a name and the options of `wrap` for each",
            seen={"variants": repr(variants)[:80]},
            do='pass {"clock 2": {"clock": 2}}',
        )
    if PLAIN in variants:
        raise ArgumentError(
            'the variant "plain" is always there: the UNet as it is',
            seen={"variants": ", ".join(variants)},
            do="give yours another name",
        )
    for variant in variants.values():  # what cannot be used is refused before anything is sampled
        options = variant.wrap if isinstance(variant, Variant) else variant
        adaptor = (options or {}).get("adaptor")
        for one in adaptor.values() if isinstance(adaptor, Mapping) else (adaptor,):
            resolve_adaptor(one)


def _settings(images: int, seeds: Sequence[int], unet: nn.Module) -> dict[str, Any]:
    weight = next(iter(unet.parameters()), torch.empty(0))
    return {
        "images": images,
        "seeds": list(seeds),
        "device": device_name(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "versions": versions(),
    }
