"""Clockwork Diffusion on any diffusion UNet: run its low-resolution part on a slow clock.

    import clockwork_hooks as ch

    cw = ch.wrap(unet, clock=2)     # any UNet, in place
    images = pipe(prompt)           # your own sampler, untouched
    print(cw.report())              # what ran, what was saved
    cw.remove()                     # as if it had never been there

Source: Habibian et al., "Clockwork Diffusion: Efficient Generation With Model-Step Distillation", arXiv 2312.08128.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from clockwork_hooks._version import __version__

if _TYPE_CHECKING:  # what type checkers, editors and the documentation see; at run time _HOME says the same
    from clockwork_hooks import adaptors as adaptors
    from clockwork_hooks import diffusers as diffusers
    from clockwork_hooks import editing as editing
    from clockwork_hooks import metrics as metrics
    from clockwork_hooks import training as training
    from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor, ResNetAdaptor, ScaledResNetAdaptor, UNetAdaptor
    from clockwork_hooks.analysis.drift import Drift, measure_drift
    from clockwork_hooks.analysis.plan import Plan
    from clockwork_hooks.analysis.planner import plan
    from clockwork_hooks.analysis.robustness import Robustness, measure_robustness
    from clockwork_hooks.attach import wrap
    from clockwork_hooks.bench_report import Benchmark
    from clockwork_hooks.benchmark import bench
    from clockwork_hooks.blocks import diagram
    from clockwork_hooks.boundary import Boundary, Region, Side
    from clockwork_hooks.cost import FlopsReport
    from clockwork_hooks.drawing import Diagram
    from clockwork_hooks.errors import (
        AdaptorError,
        AmbiguousInputError,
        ArgumentError,
        ClockworkError,
        CompileError,
        CountError,
        DemoError,
        DistillError,
        ModelNotFoundError,
        NoEffectWarning,
        RegionNotFoundError,
        TraceError,
        WrapError,
    )
    from clockwork_hooks.evaluation import Variant, evaluate
    from clockwork_hooks.flops import flops_report
    from clockwork_hooks.graph import Trace, trace
    from clockwork_hooks.regions import find_region, find_regions
    from clockwork_hooks.schedule import Schedule
    from clockwork_hooks.scores import Evaluation
    from clockwork_hooks.stats import RunReport, Stats
    from clockwork_hooks.training import DistillResult, Student, TrainingOptions, distill
    from clockwork_hooks.wrapper import ClockworkWrapper

__all__ = [
    "Adaptor",
    "AdaptorError",
    "AmbiguousInputError",
    "ArgumentError",
    "Benchmark",
    "Boundary",
    "ClockworkError",
    "ClockworkWrapper",
    "CompileError",
    "CountError",
    "DemoError",
    "Diagram",
    "DistillError",
    "DistillResult",
    "Drift",
    "Evaluation",
    "FlopsReport",
    "IdentityAdaptor",
    "ModelNotFoundError",
    "NoEffectWarning",
    "Plan",
    "Region",
    "RegionNotFoundError",
    "ResNetAdaptor",
    "Robustness",
    "RunReport",
    "ScaledResNetAdaptor",
    "Schedule",
    "Side",
    "Stats",
    "Student",
    "Trace",
    "TraceError",
    "TrainingOptions",
    "UNetAdaptor",
    "Variant",
    "WrapError",
    "__version__",
    "bench",
    "diagram",
    "distill",
    "evaluate",
    "find_region",
    "find_regions",
    "flops_report",
    "measure_drift",
    "measure_robustness",
    "plan",
    "trace",
    "wrap",
]

# Where the public names are at home. Each is imported when it is first asked for (PEP 562): `import clockwork_hooks`
# costs nothing, and who only wraps a UNet never loads the training.
_HOME = {
    name: home
    for home, names in {
        "adaptors": "Adaptor IdentityAdaptor ResNetAdaptor ScaledResNetAdaptor UNetAdaptor",
        "analysis.drift": "Drift measure_drift",
        "analysis.plan": "Plan",
        "analysis.planner": "plan",
        "analysis.robustness": "Robustness measure_robustness",
        "attach": "wrap",
        "bench_report": "Benchmark",
        "benchmark": "bench",
        "blocks": "diagram",
        "boundary": "Boundary Region Side",
        "cost": "FlopsReport",
        "drawing": "Diagram",
        "errors": (
            "AdaptorError AmbiguousInputError ArgumentError ClockworkError CompileError CountError DemoError "
            "DistillError ModelNotFoundError NoEffectWarning RegionNotFoundError TraceError WrapError"
        ),
        "evaluation": "Variant evaluate",
        "flops": "flops_report",
        "graph": "Trace trace",
        "regions": "find_region find_regions",
        "schedule": "Schedule",
        "scores": "Evaluation",
        "stats": "RunReport Stats",
        "training": "DistillResult Student TrainingOptions distill",
        "wrapper": "ClockworkWrapper",
    }.items()
    for name in names.split()
}
_PARTS = ("adaptors", "diffusers", "editing", "metrics", "training")  # modules that are public themselves


def __getattr__(name: str) -> _Any:
    if name in _PARTS:
        return _importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
