"""`clockwork-hooks drift`: how much what regions emit changes from step to step."""

from __future__ import annotations

from clockwork_hooks.cli.app import EXIT_CODES, app
from clockwork_hooks.cli.sampling import (
    Adaptors,
    Clocks,
    Out,
    Prompts,
    Sampled,
    Seeds,
    Steps,
    draw,
    load_sampler,
    shared,
    write,
)

__all__ = ["drift"]

EPILOG = f"""Examples:

clockwork-hooks drift                         (the demo model)

clockwork-hooks drift my_package.sampler:build --clock 2 --clock 4 --out my-folder

clockwork-hooks drift my_package.sampler:build --adaptor identity --adaptor my-adaptor

{EXIT_CODES}
"""


@app.command(epilog=EPILOG)
def drift(
    model: Sampled = "demo",
    clock: Clocks = None,
    adaptor: Adaptors = None,
    steps: Steps = 8,
    prompts: Prompts = 2,
    seed: Seeds = None,
    out: Out = "clockwork-drift",
) -> None:
    """Measure how every region's exit changes along the trajectory, and what keeping it does to the result."""
    from clockwork_hooks.analysis.drift import measure_drift

    loaded = load_sampler(model, steps, prompts)
    result = measure_drift(*loaded, **shared(adaptor, clock, seed))
    folder = write(out, "drift", result)
    draw(result.plot, folder / "drift.png")
