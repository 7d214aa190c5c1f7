"""Draw eight UNets, and why an exit is one, into docs/diagrams.

python docs/generate_diagrams.py [--out FOLDER] [--format png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import clockwork_hooks as ch
from clockwork_hooks.reports.u_drawing import Diagram

HERE = Path(__file__).resolve().parent
ZOO_CASES = {
    "1d": "unet1d",
    "3d": "monai3d",
    "video": "svd",
    "sdxl": "sdxl",
    "shared-upsampler": "shared_upsampler",
    "nested": "nested",
    "several-entries": "several_entries",
}
NAMES = (*ZOO_CASES, "dit", "dominance")


def make(name: str) -> Any:
    """The diagram of one of `NAMES`, with `to_svg` and `save`; weights are random and play no part in it."""
    if name == "dominance":
        from docs.draw_dominance import picture

        return picture()
    if name == "dit":
        return by_hand()
    from tests.zoo import ZOO

    case = ZOO[ZOO_CASES[name]]()
    return ch.diagram(case.model, *case.args, **case.kwargs)


def by_hand() -> Diagram:
    """A transformer has one resolution: its region is named."""
    from diffusers import DiTTransformer2DModel

    sizes: dict[str, Any] = {"num_layers": 6, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    dit = DiTTransformer2DModel(2, 8, 4, **sizes).eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([900]), torch.tensor([3]))
    region = ch.find_region(dit, *inputs, modules=["transformer_blocks.1:transformer_blocks.4"])
    return ch.diagram(dit, *inputs, region=region)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "diagrams")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = options.out / f"{name}.{options.format}"
        make(name).save(path)
        print(path)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(HERE.parent))  # tests.zoo, docs.draw_dominance
    main()
