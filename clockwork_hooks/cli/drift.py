"""`clockwork-hooks drift`: how much what regions emit changes from step to step."""

from __future__ import annotations

from clockwork_hooks.cli.app import MEASURE, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Adaptors, Clocks, OutputFolder, spread
from clockwork_hooks.cli.sampling import Sampled, Sampling, load_sampler

__all__ = ["drift"]

EXAMPLES = (
    "drift   (the demo model)",
    "drift my_package.sampler:build --clock 2 --clock 4 --out my-folder",
    "drift my_package.sampler:build --adaptor identity --adaptor my-adaptor",
)


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=MEASURE)
@spread
def drift(
    sampling: Sampling, output: OutputFolder, model: Sampled = "demo", clock: Clocks = None, adaptor: Adaptors = None
) -> None:
    """Measure how every region's exit changes along the trajectory, and what keeping it does to the result."""
    from clockwork_hooks.analysis.drift import measure_drift

    loaded = load_sampler(model, sampling)
    result = measure_drift(*loaded, **sampling.shared(adaptor, clock))
    deliver(result, output, "drift")
