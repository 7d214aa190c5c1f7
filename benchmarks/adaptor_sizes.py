"""Sizes of the adaptors on SD v1.5 with the paper's cut: the table of docs/adaptors.md.

    python benchmarks/adaptor_sizes.py          # print it
    python benchmarks/adaptor_sizes.py --write  # put it into the page

Counted on the meta device: no weights, a few seconds.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import clockwork_hooks as ch
from clockwork_hooks.models import load_model

PAGE = Path(__file__).parent.parent / "docs" / "adaptors.md"
BETWEEN = re.compile(r"(?<=<!-- sizes -->\n).*?(?=<!-- /sizes -->)", re.DOTALL)
# parameters, and GFLOPs a sample: half of what Tab. 3 adds to the identity's pass of two samples (287)
PAPER = {
    "ResNetAdaptor": ("14M", "7.0"),
    "UNetAdaptor": ("152M", "18.5"),
    "UNetAdaptor, light": ("3M", "1.0"),
}


class Size(NamedTuple):
    """An adaptor, its parameters, its MACs of one sample, and their share of a full pass's."""

    adaptor: nn.Module
    parameters: int
    macs: int
    share: float


def sizes() -> dict[str, Size]:
    """Count them."""
    unet, args, kwargs = load_model("sd15")
    region = ch.find_region(unet, *args, cut="paper", **kwargs)
    with torch.device("meta"):
        made = {
            "ResNetAdaptor": ch.ResNetAdaptor.for_region(region),
            "UNetAdaptor": ch.UNetAdaptor.for_region(region),
            "UNetAdaptor, light": ch.UNetAdaptor.for_region(region, light=True),
        }
    found = {}
    for name, adaptor in made.items():
        report = ch.flops_report(unet, *args, adaptor=adaptor, region=region, **kwargs)
        macs, count = report.adaptor_macs or 0, sum(parameter.numel() for parameter in adaptor.parameters())
        found[name] = Size(adaptor, count, macs, macs / report.full_macs)
    return found


def table(found: Mapping[str, Size]) -> str:
    """The table in Markdown."""
    rows = [
        "| adaptor | options | parameters | paper | GFLOPs a sample | paper | share of a full pass's FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (adaptor, parameters, macs, share) in found.items():
        told = ("width", "middle", "blocks")
        options = ", ".join(f"{key} {getattr(adaptor, key)}" for key in told if hasattr(adaptor, key))
        count, cost = PAPER[name]
        rows.append(
            f"| {name} | {options} | {parameters / 1e6:.2f}M | {count} | {2 * macs / 1e9:.2f} | {cost} | {share:.1%} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/adaptors.md")
    made = table(sizes())
    if parser.parse_args().write:
        PAGE.write_text(BETWEEN.sub(lambda _: made, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(made, end="")


if __name__ == "__main__":
    main()
