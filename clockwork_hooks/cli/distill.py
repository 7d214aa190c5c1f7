"""`clockwork-hooks distill`: train an adaptor as a configuration file says."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from clockwork_hooks._numbers import count
from clockwork_hooks.cli.app import EXIT_CODES, TRAIN, Interrupted, app
from clockwork_hooks.cli.options import Format, FormatOption, check_out, deliver
from clockwork_hooks.errors import ArgumentError, first_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Result = TypeVar("_Result")
DEMO: dict[str, Any] = {
    "source": {"kind": "demo", "sampler": "dpm++", "steps": 8},
    "adaptor": {"kind": "resnet"},
    "trajectories": 60,
    "batch": 8,
    "reuse": 2,
    "lr": 1e-3,
    "decay": "cosine",
}
EPILOG = f"""Examples:

clockwork-hooks distill demo --out my-adaptor        (the demo model; minutes on a CPU)

clockwork-hooks distill examples/distill_demo.toml --set trajectories=200 --set loss=feature

clockwork-hooks distill sd15.json --resume               (goes on from the folder's checkpoint)

accelerate launch --num_processes 2 -m clockwork_hooks distill sd15.json

A configuration (TOML or JSON) has a table "source", a table "adaptor", and the options of clockwork_hooks.distill:
clock, mode, loss, guidance, level, cut, folder, trajectories, minutes, batch, lr, buffer, buffer_gb, ema, ...

source.kind = "demo": sampler, steps, guidance, captions, latent_size, device.

source.kind = "pipeline": path (a diffusers folder), prompts (a text file, a prompt a line), steps, guidance, scheduler
(class name), height, width, dtype, device.

source.kind = "python": factory = "package.module:function", which gets the rest of the table and returns the
arguments of clockwork_hooks.distill: unet, generate, prompts, guidance, an adaptor of your own, ...

adaptor.kind = "resnet", "scaled-resnet" or "unet", with the options of its class (width, inputs, light, ...).

{EXIT_CODES}
"""


@app.command(epilog=EPILOG, rich_help_panel=TRAIN)
def distill(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help='A TOML or JSON file, or "demo".', show_default=False)
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="The folder for the adaptor, its checkpoints and the report.",
            show_default="the configuration's, or clockwork-adaptor",
            callback=check_out,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint, if any.")] = False,
    buffer_gb: Annotated[
        float | None, typer.Option(help="Most memory for recorded features, in 10⁹ bytes.", show_default="4")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change an option; source.steps=4 changes one of a table. Repeatable."
        ),
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """Train an adaptor on the trajectories of a sampler, and save it where `wrap(unet, FOLDER)` finds it."""
    from clockwork_hooks.training import distill as train

    options = _read(config)
    for text in settings or ():
        _set(options, text)
    if buffer_gb is not None:
        options["buffer_gb"] = buffer_gb
    options["folder"] = out or options.get("folder") or "clockwork-adaptor"
    options["resume"] = resume or options.get("resume", False)
    options.setdefault("mode", "unrolled")
    own = options.pop("adaptor", None)
    adaptor = _adaptor(_table("adaptor", own or {}))
    arguments = _source(_table("source", options.pop("source", {})), options["mode"])
    if own is not None or "adaptor" not in arguments:  # else the source has one of its own
        arguments["adaptor"] = adaptor
    try:
        result = train(**{**arguments, **options})
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_left(Path(options["folder"]), config)) from interrupt
    if os.environ.get("RANK", "0") == "0":  # of several processes, one tells
        if result.folder is not None:
            result.save(result.folder / "report.html")
        deliver(result, format, "distill")
        typer.echo(result.folder, err=True)


def _left(folder: Path, config: str) -> str:
    """What an interrupted run leaves, and how it goes on."""
    from clockwork_hooks.training.result import latest_checkpoint

    before = latest_checkpoint(folder)
    report = folder / "training.json"
    done = json.loads(report.read_text(encoding="utf-8"))["trajectories"] if report.exists() else 0
    trained = f"The adaptor of {count(done, 'trajectory batch', 'trajectory batches')} is in {folder}."
    again = (
        f"clockwork-hooks distill {shlex.quote(config)} --out {shlex.quote(str(folder))} --resume, and the same --set"
    )
    goes_on = f"From its checkpoint {before.name} it goes on: {again}" if before else "There is no checkpoint yet."
    return f"{trained if done else 'Nothing is trained yet.'}\n{goes_on}"


def _read(config: str) -> dict[str, Any]:
    if config == "demo":
        return copy.deepcopy(DEMO)
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
        options = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            'a configuration is a TOML or JSON file, or "demo"',
            seen={"file": path, "error": first_line(error)},
            do='start from examples/distill_demo.toml; for your own UNet, source.kind = "python" names its factory',
        ) from error
    if not isinstance(options, dict):
        raise ArgumentError(
            "a configuration has to be a table",
            seen={"file": path, "holds": type(options).__name__},
            do='{"source": {...}}',
        )
    return options


def _set(options: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    *tables, last = name.split(".")
    for table in tables:
        options = options.setdefault(table, {}) if isinstance(options, dict) else options
    if not equals or not last or not isinstance(options, dict):
        raise ArgumentError("--set takes KEY=VALUE", seen={"got": text}, do="--set trajectories=200")
    try:
        options[last] = json.loads(value)
    except ValueError:
        options[last] = value


def _table(name: str, value: Any) -> dict[str, Any]:
    """A table of the configuration; a text alone is its kind."""
    if isinstance(value, str):
        return {"kind": value}
    if not isinstance(value, dict):
        raise ArgumentError(
            f"the {name} of a configuration has to be a table",
            seen={name: repr(value)[:80]},
            do=f'write "{name}": {{"kind": ...}}',
        )
    return value


def _adaptor(own: dict[str, Any]) -> Any:
    from clockwork_hooks.training.distill import kind_of

    kind = kind_of(own.pop("kind", "resnet"))
    return lambda region: kind.for_region(region, **own)


def _source(own: dict[str, Any], mode: str) -> dict[str, Any]:
    """Arguments of `distill` from the configuration's source."""
    from clockwork_hooks.training import local_device

    kind = own.pop("kind", None)
    if kind == "demo":
        from clockwork_hooks.demo.recipe import Recipe

        return _call_source(kind, Recipe.of, {"device": local_device(), **own}).arguments(mode)
    if kind == "pipeline":
        from clockwork_hooks.training.pipeline import pipeline_arguments

        return _call_source(kind, pipeline_arguments, {"device": local_device(), **own})
    if kind == "python":
        from clockwork_hooks.models import find_factory

        name = str(own.pop("factory", ""))
        module, _, factory = name.partition(":")
        return _check_arguments(name, _call_source(name, find_factory(module or "?", factory, bare=False), own))
    raise ArgumentError(
        "a source says what samples",
        seen={"source.kind": repr(kind)},
        do='pass "demo", "pipeline" or "python" in the table "source"; clockwork-hooks distill --help tells more',
    )


def _call_source(name: str, factory: Callable[..., _Result], own: Mapping[str, Any]) -> _Result:
    """What a source returns for the rest of its table."""
    try:
        inspect.signature(factory).bind(**own)
    except TypeError as error:
        raise ArgumentError(
            "a source takes the rest of its table",
            seen={"source": f"{name}{inspect.signature(factory)}", "table": dict(own), "error": error},
            do="give its parameters and the table the same names",
        ) from error
    return factory(**own)


def _check_arguments(name: str, returned: Any) -> dict[str, Any]:
    """What the user's factory has returned, if it is what `distill` takes."""
    needed = ("unet", "generate", "prompts")
    if not isinstance(returned, Mapping) or not all(one in returned for one in needed):
        kinds = ", ".join(returned) if isinstance(returned, Mapping) else f"a {type(returned).__name__}"
        raise ArgumentError(
            "a factory must return the arguments of clockwork_hooks.distill as a dict",
            seen={"factory": name, "returned": kinds},
            do=f"return {', '.join(needed)}, and what else should be set: guidance, facts, ...",
        )
    return dict(returned)
