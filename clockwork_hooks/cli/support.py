"""The commands for when something is missing or wrong: `doctor` lists what is installed, `explain` prints help."""

from __future__ import annotations

import difflib
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from clockwork_hooks._numbers import count
from clockwork_hooks._version import __version__
from clockwork_hooks.cli.app import INSTALL, app, epilog
from clockwork_hooks.cli.options import Format, FormatOption, deliver
from clockwork_hooks.errors import ArgumentError
from clockwork_hooks.reports.report import Report
from clockwork_hooks.reports.tables import Table, table

# extra → what it is for; the requirements themselves come from the installed package
PURPOSES = {
    "": "everything",
    "diffusers": "presets, diffusers folders, pipelines, the demo's sampler",
    "train": "distill",
    "evaluate": "evaluate",
    "plot": "plots, diagrams as PNG, the demo's picture",
    "demo": "demo",
}
DOCTOR_EXAMPLES = ("doctor", "doctor --format json   (for an issue, or a script)")


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


@dataclass(frozen=True, slots=True)
class Installation(Report):
    """What is installed, and what it runs on.

    Attributes:
        parts: packages.
        devices: name → what it is.
    """

    SCHEMA = "doctor/1"

    parts: tuple[Part, ...]
    devices: Mapping[str, str]

    @property
    def install(self) -> str | None:
        """The pip line for what is missing."""
        return pip_line([part for part in self.parts if part.version is None])

    @property
    def advice(self) -> str:
        """The same, as it is printed."""
        return f"To install what is missing:\n{self.install}" if self.install else "Nothing is missing."

    def tables(self) -> tuple[Table, ...]:
        """Devices and packages."""
        rows = [
            (one.name, one.version or "missing", one.requirement.removeprefix(one.name), PURPOSES[one.extra])
            for one in self.parts
        ]
        return self.table(), table("Packages", ("package", "installed", "wanted", "needed for"), rows)

    def table(self) -> Table:
        """Devices."""
        note = f"clockwork_hooks {__version__}, Python {platform.python_version()}, {platform.platform()}"
        return table("Devices", ("device", "is"), self.devices.items(), notes=(note,))

    def data(self) -> dict[str, Any]:
        """Versions, devices, packages."""
        return {
            "clockwork_hooks": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": self.devices,
            "parts": {part.name: {"version": part.version, "extra": part.extra or None} for part in self.parts},
            "install": self.install,
        }


@app.command(epilog=epilog(*DOCTOR_EXAMPLES), rich_help_panel=INSTALL)
def doctor(format: FormatOption = Format.table) -> None:
    """Say which versions and devices are there, what is missing, and the pip line that installs it."""
    installation = Installation(tuple(parts()), dict(devices()))
    deliver(installation, format, "doctor")
    if format is not Format.json:
        typer.echo(installation.advice)
    if any(not part.extra for part in installation.parts if part.version is None):
        raise typer.Exit(1)


def parts() -> Iterator[Part]:
    """Every package that the installed metadata asks for here, for all extras that a user has a use for."""
    from packaging.requirements import Requirement

    seen = {"clockwork-hooks"}
    requirements = [Requirement(line) for line in metadata.requires("clockwork-hooks") or ()]
    for extra in PURPOSES:  # a package of several extras goes with the first
        for wanted in requirements:
            name, marker = wanted.name, wanted.marker
            if name not in seen and (marker is None or marker.evaluate({"extra": extra})):
                seen.add(name)
                yield Part(name, str(wanted).partition(";")[0], extra, _version(name))


def pip_line(missing: Sequence[Part]) -> str | None:
    """What installs these packages into the Python that runs; None for none."""
    if not missing:
        return None
    return f"{sys.executable} -m pip install " + " ".join(f'"{part.requirement}"' for part in missing)


def devices() -> Iterator[tuple[str, str]]:
    """Name of each device that torch can use, and what it is."""
    import torch

    yield "cpu", f"{platform.machine()}, torch uses {count(torch.get_num_threads(), 'thread')}"
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


EXPLAIN_EXAMPLES = ("explain   (the list of errors and warnings)", "explain WrapError", "explain NoEffectWarning")
PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "error_pages", PACKAGE.parent / "docs" / "errors")  # in a wheel, in a checkout


def pages() -> dict[str, Path]:
    """Name of the error → its page; "index" is the list of all."""
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.md"))}


@app.command(epilog=epilog(*EXPLAIN_EXAMPLES), rich_help_panel=INSTALL)
def explain(
    name: Annotated[
        str,
        typer.Argument(metavar="[ERROR]", help="Name of the error or warning, as the last line of its message has it."),
    ] = "index",
) -> None:
    """Print causes and fixes of an error or a warning; without a name, the list of all."""
    names = {page.lower(): page for page in pages()}
    page = names.get(name.rpartition(".")[2].lower())
    if page is None:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        raise ArgumentError(
            "explain takes the name of an error or a warning of this library",
            seen={"name": name, "names": ", ".join(sorted(set(names.values()) - {"index"}))},
            do=f"clockwork-hooks explain {names[near[0]]}" if near else "clockwork-hooks explain lists them",
        )
    text = pages()[page].read_text(encoding="utf-8")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text, hyperlinks=False))
    else:
        typer.echo(text.rstrip())
