"""`clockwork-hooks edit`: edit pictures of the demo model by their text, plain and with Clockwork."""

from __future__ import annotations

from typing import Annotated

import typer

from clockwork_hooks.cli.app import TRY, app, epilog
from clockwork_hooks.cli.delivery import deliver
from clockwork_hooks.cli.options import Clock, Format, FormatOption, OutFolder, Seed

__all__ = ["edit"]

PARAGRAPHS = (
    "How it works: DDIM inversion takes a scene to noise, and DDIM under the new text takes it back; features and "
    "self-attention of the source, injected in the first steps of the way back, keep its layout (Plug-and-Play). "
    "Clockwork runs in both loops.",
    "What to turn: more inversion steps keep the source better. A larger --until-features keeps the layout better, and "
    "more of the old shape and colour too.",
    "The table: MACs and time of both loops for one scene; how many attributes of the new text a classifier finds; how "
    "far the objects' centres and radii are from the source's, measured on the pixels.",
    "It is the demo model that edits; for a model of your own call clockwork_hooks.editing.edit.",
)
EXAMPLES = (
    "edit",
    "edit --scenes 16 --inversion-steps 100 --steps 50",
    'edit --source "a large red circle in the centre on a grey background" --replace "red circle" --by "blue square"',
)


@app.command(epilog="\n\n".join([*PARAGRAPHS, epilog(*EXAMPLES)]), rich_help_panel=TRY)
def edit(
    format: FormatOption = Format.table,
    out: OutFolder = None,
    source: Annotated[
        str | None,
        typer.Option(help="Caption of the source: size, colour, shape, place, background.", show_default="4 scenes"),
    ] = None,
    replace: Annotated[str | None, typer.Option(help="Words of it to replace.", show_default=False)] = None,
    by: Annotated[str | None, typer.Option(help="Words in their place.", show_default=False)] = None,
    scenes: Annotated[
        int, typer.Option(help="Edit so many scenes drawn at random; 0 for the 4 of the docs.", min=0, max=256)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps of a trajectory.", min=1, max=1000)] = 20,
    inversion_steps: Annotated[int, typer.Option(help="DDIM steps of the inversion.", min=1, max=1000)] = 40,
    clock: Clock = 2,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 3.0,
    until_features: Annotated[
        float, typer.Option(help="τ_f: share of the steps in which features are injected, 0 to 1.")
    ] = 0.3,
    until_attention: Annotated[float, typer.Option(help="τ_A: likewise for self-attention.")] = 0.5,
    seed: Seed = 3,
) -> None:
    """Edit scenes by their text, plain, with Clockwork and without injection: cost, text, layout, a picture."""
    from clockwork_hooks.demo.edits import EDITS, draw_edits, edit_scenes
    from clockwork_hooks.errors import ArgumentError

    own = [word for word in (source, replace, by) if word is not None]
    if len(own) not in (0, 3):
        raise ArgumentError(
            "an edit of your own has a source, words to replace, and words in their place",
            seen={"--source": source, "--replace": replace, "--by": by},
            do="pass all three, or none",
        )
    if own and scenes:
        raise ArgumentError(
            "scenes are drawn, or one is named", seen={"--source": source, "--scenes": scenes}, do="pass one of the two"
        )
    drawn = draw_edits(scenes, seed) if scenes else EDITS
    result = edit_scenes(
        [(own[0], own[1], own[2])] if own else drawn,
        inversion_steps=inversion_steps,
        steps=steps,
        clock=clock,
        guidance=guidance_scale,
        until_features=until_features,
        until_attention=until_attention,
        seed=seed,
    )
    deliver(result, format, "edit", out)
