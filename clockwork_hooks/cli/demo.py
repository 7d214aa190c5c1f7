"""The demo model's commands: `demo` draws side by side, `play` on a local page, `edit` changes scenes by their text."""

from __future__ import annotations

from typing import Annotated

import typer

from clockwork_hooks.cli.app import TRY, app, epilog
from clockwork_hooks.cli.options import Clock, Format, FormatOption, OutFolder, Seed, Steps, check_out, deliver
from clockwork_hooks.errors import ArgumentError

DEMO_EXAMPLES = (
    "demo",
    "demo --steps 20 --clock 4 --out my-folder",
    'demo --prompt "a large pink star left of a small white ring on a black background" --seed 7',
    "demo --prompts my-scenes.txt",
)


@app.command(epilog=epilog(*DEMO_EXAMPLES), rich_help_panel=TRY)
def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help='A scene, e.g. "a small yellow star above a large cyan ring on a dark blue background"; repeatable. '
            "None for the 16 that ship with the demo.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Scenes of a text file, one a line.", show_default=False)
    ] = None,
    steps: Steps = 8,
    clock: Clock = 2,
    seed: Seed = 0,
    out: Annotated[
        str, typer.Option(help="The folder for the picture and the report.", callback=check_out)
    ] = "clockwork-demo",
    format: FormatOption = Format.table,
) -> None:
    """Draw the same scenes plain, with DeepCache's setting, the identity, and an adaptor that is calibrated live."""
    from clockwork_hooks.demo.run import demo as run
    from clockwork_hooks.training.pipeline import read_prompts

    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    result = run(texts, steps=steps, clock=clock, seed=seed, out=out)
    deliver(result, format, "demo")
    for name in ("grid.png", "report.html", "report.md", "report.json"):
        typer.echo(result.folder / name, err=True)


PLAY_EXAMPLES = ("play", "play --port 0 --no-browser   (any port that is free; its address is printed)")


@app.command(epilog=epilog(*PLAY_EXAMPLES), rich_help_panel=TRY)
def play(
    port: Annotated[int, typer.Option(help="Port of this machine; 0 for one that is free.", min=0, max=65535)] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Draw a prompt plain and with Clockwork on a page: click the steps, see MACs, time and PSNR. Ctrl-C ends it."""
    from clockwork_hooks.demo.playground import serve

    with serve(port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        typer.echo(f"{address}   (Ctrl-C ends it)", err=True)
        if browser:
            import webbrowser

            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended; nothing is kept", err=True)


EDIT_PARAGRAPHS = (
    "How it works: DDIM inversion takes a scene to noise, and DDIM under the new text takes it back; features and "
    "self-attention of the source, injected in the first steps of the way back, keep its layout (Plug-and-Play). "
    "Clockwork runs in both loops.",
    "What to turn: more inversion steps keep the source better. A larger --until-features keeps the layout better, and "
    "more of the old shape and colour too.",
    "The table: MACs and time of both loops for one scene; how many attributes of the new text a classifier finds; how "
    "far the objects' centres and radii are from the source's, measured on the pixels.",
    "It is the demo model that edits; for a model of your own call clockwork_hooks.editing.edit.",
)
EDIT_EXAMPLES = (
    "edit",
    "edit --scenes 16 --inversion-steps 100 --steps 50",
    'edit --source "a large red circle in the centre on a grey background" --replace "red circle" --by "blue square"',
)


@app.command(epilog="\n\n".join([*EDIT_PARAGRAPHS, epilog(*EDIT_EXAMPLES)]), rich_help_panel=TRY)
def edit(
    format: FormatOption = Format.table,
    out: OutFolder = None,
    source: Annotated[
        str | None,
        typer.Option(help="Caption of the source: size, colour, shape, place, background.", show_default="4 scenes"),
    ] = None,
    replace: Annotated[str | None, typer.Option(help="Words of the source to replace.", show_default=False)] = None,
    by: Annotated[str | None, typer.Option(help="Words that take their place.", show_default=False)] = None,
    scenes: Annotated[
        int, typer.Option(help="Number of scenes, drawn at random; 0 for the 4 of the docs.", min=0, max=256)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps of a trajectory.", min=1, max=1000)] = 20,
    inversion_steps: Annotated[int, typer.Option(help="DDIM steps of the inversion.", min=1, max=1000)] = 40,
    clock: Clock = 2,
    guidance_scale: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 3.0,
    until_features: Annotated[
        float, typer.Option(help="τ_f: share of the steps in which features are injected, 0 to 1.")
    ] = 0.3,
    until_attention: Annotated[
        float, typer.Option(help="τ_A: share of the steps in which self-attention is injected.")
    ] = 0.5,
    seed: Seed = 3,
) -> None:
    """Edit scenes by their text, plain, with Clockwork and without injection: cost, text, layout, a picture."""
    from clockwork_hooks.demo.edits import EDITS, draw_edits, edit_scenes

    own = [word for word in (source, replace, by) if word is not None]
    if len(own) not in (0, 3):
        raise ArgumentError(
            "an edit of your own needs a source, the words to replace, and the words that replace them",
            seen={"--source": source, "--replace": replace, "--by": by},
            do="pass all three, or none",
        )
    if own and scenes:
        raise ArgumentError(
            "either scenes are drawn at random, or one is named",
            seen={"--source": source, "--scenes": scenes},
            do="pass one of the two",
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
