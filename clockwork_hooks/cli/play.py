"""`clockwork-hooks play`: the demo model on a local page, where the steps of the clock are clicked."""

from __future__ import annotations

from typing import Annotated

import typer

from clockwork_hooks.cli.app import TRY, app, epilog

__all__ = ["play"]

EXAMPLES = ("play", "play --port 0 --no-browser   (any port that is free; its address is printed)")


@app.command(epilog=epilog(*EXAMPLES), rich_help_panel=TRY)
def play(
    port: Annotated[int, typer.Option(help="Of this machine; 0 for one that is free.", min=0, max=65535)] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
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
