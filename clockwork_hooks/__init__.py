"""Clockwork Diffusion on any diffusion UNet: run its low-resolution part on a slow clock.

    import clockwork_hooks as ch

    cw = ch.wrap(unet, clock=2)     # any UNet, in place
    images = pipe(prompt)           # your own sampler, untouched
    print(cw.report())              # what ran, what was saved
    cw.remove()                     # as if it had never been there

Source: Habibian et al., "Clockwork Diffusion: Efficient Generation With Model-Step Distillation", arXiv 2312.08128.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from clockwork_hooks import adaptors as _adaptors
from clockwork_hooks._version import __version__
from clockwork_hooks.adaptors import Adaptor, IdentityAdaptor
from clockwork_hooks.analysis.drift import Drift, measure_drift
from clockwork_hooks.analysis.plan import Plan
from clockwork_hooks.analysis.planner import plan
from clockwork_hooks.analysis.robustness import Robustness, measure_robustness
from clockwork_hooks.attach import wrap
from clockwork_hooks.benchmark import Benchmark, bench
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

if _TYPE_CHECKING:
    from clockwork_hooks.adaptors import ResNetAdaptor, ScaledResNetAdaptor, UNetAdaptor

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

# imported when first asked for: what they need is slow to import
_LATER = dict.fromkeys(("ResNetAdaptor", "ScaledResNetAdaptor", "UNetAdaptor"), _adaptors)


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_LATER[name], name)
