"""Distil an adaptor for the demo model on a CPU, from nothing to a picture, in less than three minutes.

    python examples/train_adaptor.py --out clockwork-adaptor

Trains on captions of one set of scenes, then samples others with the plain UNet, with the feature of the step before
as it is (the identity), and with the trained adaptor, and draws them side by side.
"""

import time
from pathlib import Path

import typer
from matplotlib.figure import Figure

import clockwork_hooks as ch
from clockwork_hooks.demo import DEMO_PROMPTS
from clockwork_hooks.demo.recipe import Recipe
from clockwork_hooks.metrics import psnr


def main(
    out: Path = Path("clockwork-adaptor"),
    steps: int = 8,
    minutes: float = 2.0,  # of training
    batch: int = 8,  # captions in a trajectory
    prompts: int = 8,  # pictures to draw
    latent_size: int = 32,  # edge of the latents in training
) -> None:
    """Train, sample, draw."""
    recipe = Recipe.of(steps=steps, latent_size=latent_size)
    options = {"clock": 2, "minutes": minutes, "batch": batch, "hold": 2, "reuse": 2, "lr": 1e-3, "decay": "cosine"}
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    result = ch.distill(adaptor="resnet", folder=folder, **options, **recipe.arguments())
    model, texts = recipe.model, DEMO_PROMPTS[:prompts]
    images = {"plain": model.sample(texts, steps=steps)}
    for name, adaptor in (("identity", None), ("trained", result.adaptor)):
        with ch.wrap(model.unet, adaptor, clock=2):
            images[name] = model.sample(texts, steps=steps)
        print(f"{name:9} {psnr(images[name], images['plain']).mean():5.1f} dB to the plain pictures")

    figure = Figure(figsize=(1.2 * prompts, 4), layout="constrained")
    for row, (name, pictures) in zip(figure.subplots(3, prompts, squeeze=False), images.items(), strict=True):
        row[0].set_ylabel(name)
        for place, picture in zip(row, pictures, strict=True):
            place.imshow(picture.permute(1, 2, 0))
            place.set(xticks=[], yticks=[])
    figure.savefig(folder / "pictures.png", dpi=150)
    print(folder / "pictures.png")


if __name__ == "__main__":
    typer.run(main)
