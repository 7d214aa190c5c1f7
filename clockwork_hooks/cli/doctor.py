"""`clockwork-hooks doctor`: what is installed, what it runs on, and what to install for the rest."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import typer

from clockwork_hooks._version import __version__
from clockwork_hooks.cli.app import EXIT_CODES, app
from clockwork_hooks.cli.options import Format, Output, show

if TYPE_CHECKING:
    from clockwork_hooks.report import Table

__all__ = ["Part", "doctor", "parts"]

# extra → what it is for; the requirements themselves come from the installed package
PURPOSES = {
    "": "everything",
    "diffusers": "presets, diffusers folders, pipelines, the demo's sampler",
    "train": "distill",
    "evaluate": "evaluate",
    "plot": "plots, diagrams as PNG, the demo's picture",
    "demo": "demo",
}
EPILOG = f"""Examples:

clockwork-hooks doctor

clockwork-hooks doctor --format json   (for an issue, or a script)

{EXIT_CODES}
"""


@dataclass(frozen=True, slots=True)
class Part:
    """A package that the library uses.

    Attributes:
        name: on the package index.
        requirement: name and versions, as pip takes it.
        extra: the optional part that it belongs to; "" where nothing works without it.
        version: the one that is installed, or None.
    """

    name: str
    requirement: str
    extra: str
    version: str | None


@app.command(epilog=EPILOG)
def doctor(output: Output = Format.table) -> None:
    """Say which versions and devices are there, what is missing, and the pip line that installs it."""
    import json

    found, machine = tuple(parts()), dict(devices())
    missing = [part for part in found if part.version is None]
    line = pip_line(missing)
    if output is Format.json:
        data = {
            "clockwork_hooks": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": machine,
            "parts": {part.name: {"version": part.version, "extra": part.extra or None} for part in found},
            "install": line,
        }
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        made = (_devices_table(machine), _parts_table(found))
        if output is Format.md:
            typer.echo("\n\n".join(one.to_markdown() for one in made))
        else:
            show(*made)
        typer.echo(f"To install what is missing:\n{line}" if line else "Nothing is missing.")
    if any(not part.extra for part in missing):
        raise typer.Exit(1)


def parts() -> Iterator[Part]:
    """Every package that the installed metadata names, for all extras that a user has a use for."""
    seen = {"clockwork-hooks"}
    split = [requirement.partition(";") for requirement in metadata.requires("clockwork-hooks") or ()]
    for group in PURPOSES:  # a package of several extras goes with the first
        for wanted, _, condition in split:
            extra = re.search(r"extra == ['\"]([^'\"]+)", condition)
            name = re.split(r"[^\w.-]", wanted.strip(), maxsplit=1)[0]
            if group == (extra[1] if extra else "") and name not in seen:
                seen.add(name)
                yield Part(name, wanted.strip(), group, _version(name))


def pip_line(missing: Sequence[Part]) -> str | None:
    """What installs these packages into the Python that runs; None for none."""
    if not missing:
        return None
    return f"{sys.executable} -m pip install " + " ".join(f'"{part.requirement}"' for part in missing)


def devices() -> Iterator[tuple[str, str]]:
    """Name of each device that torch can use, and what it is."""
    import torch

    yield "cpu", f"{platform.machine()}, torch uses {torch.get_num_threads()} threads"
    for k in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(k)
        yield f"cuda:{k}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute {about.major}.{about.minor}"
    if torch.backends.mps.is_available():
        yield "mps", "Apple's GPU"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices_table(machine: dict[str, str]) -> Table:
    from clockwork_hooks.report import table

    note = f"clockwork_hooks {__version__}, Python {platform.python_version()}, {platform.platform()}"
    return table("Devices", ("device", "is"), machine.items(), notes=(note,))


def _parts_table(found: Sequence[Part]) -> Table:
    from clockwork_hooks.report import table

    rows = [
        (part.name, part.version or "missing", part.requirement.removeprefix(part.name), PURPOSES[part.extra])
        for part in found
    ]
    return table("Packages", ("package", "installed", "wanted", "needed for"), rows)
