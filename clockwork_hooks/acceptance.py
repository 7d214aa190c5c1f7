"""What can be wrapped, and with what: rules that hold before the first call, each with the error that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from clockwork_hooks.boundary import Region
from clockwork_hooks.errors import ArgumentError, WrapError
from clockwork_hooks.graph import module_paths
from clockwork_hooks.hooks import RootHook
from clockwork_hooks.wrapper import ClockworkWrapper

__all__ = ["check_alone", "check_region", "check_unet", "plan_parts"]


def check_unet(unet: Any) -> None:
    """Raise `WrapError` if the UNet cannot be wrapped, or is wrapped."""
    wrapper = unet if isinstance(unet, ClockworkWrapper) else _wrapper(unet) if isinstance(unet, nn.Module) else None
    if wrapper is not None:
        whole = wrapper.unet if isinstance(wrapper, ClockworkWrapper) else unet
        error = WrapError(
            "a UNet is wrapped once, and this one has its wrapper already",
            seen={"unet": type(whole).__name__, "wrapper": repr(wrapper)},
            do="call remove() on its wrapper first; where nobody kept it, it is this error's .wrapper",
        )
        error.wrapper = wrapper
        raise error
    if not isinstance(unet, nn.Module):
        raise WrapError(
            "only an nn.Module can be wrapped",
            seen={"got": type(unet).__name__},
            do="pass the UNet itself, for a pipeline wrap(pipe.unet)",
        )
    inner = [path for path, module in unet.named_modules() if path and _wrapper(module) is not None]
    if inner:
        raise WrapError(
            "a UNet is wrapped once: nothing inside of it may be wrapped already",
            seen={"unet": type(unet).__name__, "wrapped inside": ", ".join(inner)},
            do="wrap the outer module alone, or leave it at the inner one",
        )
    cached = [path for path, module in unet.named_modules() if _cached(module)]
    if cached:
        raise WrapError(
            "one cache at a time: DeepCache skips modules of this UNet already, and would keep what stands in for ours",
            seen={
                "unet": type(unet).__name__,
                "modules": f"{cached[0] or 'the UNet itself'} and {len(cached) - 1} more",
            },
            do="call disable() on its DeepCacheSDHelper first",
        )
    if "_orig_mod" in unet._modules:
        raise WrapError(
            "the output of torch.compile has its calls fixed: no module call can be skipped in it",
            seen={"got": type(unet).__name__},
            do="wrap the UNet itself: wrap(compiled._orig_mod), and call that",
        )


def check_region(region: Any, unet: nn.Module) -> None:
    """Raise `ArgumentError` if this is no region, or one of another UNet."""
    if not isinstance(region, Region):
        raise ArgumentError(
            "a region comes from find_region or find_regions",
            seen={"region": type(region).__name__},
            do="pass region=ch.find_region(unet, *args, level=1)",
        )
    known = set(module_paths(unet).values())
    needed = (*region.plan.counts, *(port.path for port in region.plan.ports.values()))
    missing = [path for path in dict.fromkeys(needed) if path not in known]
    if missing:
        raise ArgumentError(
            "a region fits the UNet that it was found for",
            seen={
                "region found for": region.model,
                "unet": type(unet).__name__,
                "modules it lacks": ", ".join(missing[:5]),
            },
            do="pass region=ch.find_region(unet, *args), found for this UNet",
        )


_DECIDES = {
    "plan": "a plan says which region, when, and what stands in for it",
    "clocks": "clocks= says which regions, and when; each feature is kept without its graph",
    "schedule": "a schedule says when, and so does a clock",
}


def check_alone(name: str, value: object, others: Mapping[str, object]) -> None:
    """Raise `ArgumentError` if options are given that this one, where it is given, decides; None is not given."""
    given = {other: repr(one)[:80] for other, one in others.items() if one is not None}
    if value is not None and given:
        raise ArgumentError(
            _DECIDES[name], seen={name: repr(value)[:80], **given}, do=f"pass {name}= without {', '.join(given)}"
        )


def plan_parts(plan: Any) -> tuple[Any, Any, Any]:
    """Region, schedule and adaptor of a plan; raise `ArgumentError` where it lacks one."""
    names = ("region", "schedule", "adaptor")
    missing = [name for name in names if not hasattr(plan, name)]
    if missing:
        raise ArgumentError(
            "a plan has a region, a schedule and an adaptor",
            seen={"plan": type(plan).__name__, "it lacks": ", ".join(missing)},
            do="pass region=, schedule= and the adaptor themselves",
        )
    return plan.region, plan.schedule, plan.adaptor


def _wrapper(unet: nn.Module) -> object | None:
    """What is attached to the UNet: a wrapper, or `distill` while it records."""
    return next((hook.owner for hook in unet._forward_pre_hooks.values() if isinstance(hook, RootHook)), None)


def _cached(module: nn.Module) -> bool:
    return str(getattr(vars(module).get("forward"), "__module__", "")).startswith("DeepCache.")
