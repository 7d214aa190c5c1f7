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
    from clockwork_hooks import comfyui as comfyui
    from clockwork_hooks import diffusers as diffusers
    from clockwork_hooks import editing as editing
    from clockwork_hooks import graph as graph
    from clockwork_hooks import metrics as metrics
    from clockwork_hooks import models as models
    from clockwork_hooks import regions as regions
    from clockwork_hooks import schedule as schedule
    from clockwork_hooks import training as training
    from clockwork_hooks.adaptors import (
        Adaptor,
        CalibratedAdaptor,
        IdentityAdaptor,
        ResidualAdaptor,
        ResNetAdaptor,
        ScaledResNetAdaptor,
        UNetAdaptor,
    )
    from clockwork_hooks.analysis.benchmark import Benchmark, bench
    from clockwork_hooks.analysis.calibration import Calibration, calibrate
    from clockwork_hooks.analysis.drift import Drift, measure_drift
    from clockwork_hooks.analysis.evaluation import Evaluation, Variant, evaluate
    from clockwork_hooks.analysis.flops import FlopsReport, flops_report
    from clockwork_hooks.analysis.planning import Plan, plan
    from clockwork_hooks.analysis.robustness import Robustness, measure_robustness
    from clockwork_hooks.analysis.tuning import Tuning, tune
    from clockwork_hooks.engine.attach import wrap
    from clockwork_hooks.engine.stats import RunReport, Stats
    from clockwork_hooks.engine.wrapper import ClockworkWrapper
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
        OtherStepsWarning,
        RegionNotFoundError,
        SkippedModuleWarning,
        TraceError,
        WrapError,
    )
    from clockwork_hooks.graph.tracing import Trace, trace
    from clockwork_hooks.regions.blocks import diagram
    from clockwork_hooks.regions.find import Choice, find_region, find_regions
    from clockwork_hooks.regions.region import Boundary, Region, Side
    from clockwork_hooks.reports.u_drawing import Diagram
    from clockwork_hooks.schedule import Schedule
    from clockwork_hooks.training import DistillResult, Student, TrainingOptions, distill

__all__ = [
    "Adaptor",
    "AdaptorError",
    "AmbiguousInputError",
    "ArgumentError",
    "Benchmark",
    "Boundary",
    "CalibratedAdaptor",
    "Calibration",
    "Choice",
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
    "OtherStepsWarning",
    "Plan",
    "Region",
    "RegionNotFoundError",
    "ResNetAdaptor",
    "ResidualAdaptor",
    "Robustness",
    "RunReport",
    "ScaledResNetAdaptor",
    "Schedule",
    "Side",
    "SkippedModuleWarning",
    "Stats",
    "Student",
    "Trace",
    "TraceError",
    "TrainingOptions",
    "Tuning",
    "UNetAdaptor",
    "Variant",
    "WrapError",
    "__version__",
    "bench",
    "calibrate",
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
    "tune",
    "wrap",
]

# Where the public names are at home. Each is imported when it is first asked for (PEP 562): `import clockwork_hooks`
# costs nothing, and who only wraps a UNet never loads the training.
_HOME = {
    name: home
    for home, names in {
        "adaptors": (
            "Adaptor CalibratedAdaptor IdentityAdaptor ResNetAdaptor ResidualAdaptor ScaledResNetAdaptor UNetAdaptor"
        ),
        "analysis.calibration": "Calibration calibrate",
        "analysis.drift": "Drift measure_drift",
        "analysis.planning": "Plan plan",
        "analysis.robustness": "Robustness measure_robustness",
        "analysis.tuning": "Tuning tune",
        "engine.attach": "wrap",
        "analysis.benchmark": "Benchmark bench",
        "regions.blocks": "diagram",
        "regions.region": "Boundary Region Side",
        "reports.u_drawing": "Diagram",
        "errors": (
            "AdaptorError AmbiguousInputError ArgumentError ClockworkError CompileError CountError DemoError "
            "DistillError ModelNotFoundError NoEffectWarning RegionNotFoundError "
            "OtherStepsWarning SkippedModuleWarning TraceError WrapError"
        ),
        "analysis.evaluation": "Evaluation Variant evaluate",
        "analysis.flops": "FlopsReport flops_report",
        "graph.tracing": "Trace trace",
        "regions.find": "Choice find_region find_regions",
        "schedule": "Schedule",
        "engine.stats": "RunReport Stats",
        "training": "DistillResult Student TrainingOptions distill",
        "engine.wrapper": "ClockworkWrapper",
    }.items()
    for name in names.split()
}
_PARTS = (  # modules that are public themselves
    "adaptors", "comfyui", "diffusers", "editing", "graph", "metrics", "models", "regions", "schedule", "training",
)  # fmt: skip
_ELSEWHERE = {"wrap_pipeline": "diffusers", "edit": "editing", "load_model": "models"}  # asked for here, at home there


def __getattr__(name: str) -> _Any:
    if name in _PARTS:
        return _importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        home = _ELSEWHERE.get(name)
        hint = "" if home is None else f"; write: from {__name__}.{home} import {name}"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(_importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
