"""Distil an adaptor for the demo model on a CPU, from nothing to a picture, in less than three minutes.

    python examples/train_adaptor.py --out clockwork-adaptor

Trains on captions of one set of scenes, then samples others with the plain UNet, with the feature of the step before
as it is (the identity), and with the trained adaptor, and draws them side by side.
"""

import argparse
import time
from pathlib import Path

import torch

import clockwork_hooks as ch
from clockwork_hooks.demo import DEMO_PROMPTS
from clockwork_hooks.demo.recipe import Recipe
from clockwork_hooks.demo.run import psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("clockwork-adaptor"), help="folder of the adaptor")
    parser.add_argument("--steps", type=int, default=8, help="DPM++ denoising steps")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="captions in a trajectory")
    parser.add_argument("--prompts", type=int, default=8, help="pictures to draw")
    parser.add_argument("--latent-size", type=int, default=32, help="edge of the latents in training")
    options = parser.parse_args()

    recipe = Recipe.of(steps=options.steps, latent_size=options.latent_size)
    result = ch.distill(
        adaptor="resnet",
        clock=2,
        minutes=options.minutes,
        batch=options.batch,
        hold=2,
        reuse=2,
        lr=1e-3,
        decay="cosine",
        folder=options.out / time.strftime("%Y%m%d-%H%M%S"),
        **recipe.arguments(),
    )
    model, prompts = recipe.model, DEMO_PROMPTS[: options.prompts]
    images = {"plain": model.sample(prompts, steps=options.steps)}
    for name, adaptor in (("identity", None), ("trained", result.adaptor)):
        with ch.wrap(model.unet, adaptor, clock=2):
            images[name] = model.sample(prompts, steps=options.steps)
        print(f"{name:9} {psnr(images[name], images['plain']):5.1f} dB to the plain pictures")
    print(draw(images, result.folder / "pictures.png"))


def draw(images: dict[str, torch.Tensor], path: Path) -> Path:
    """A row a way of sampling, its name on the left."""
    from PIL import Image, ImageDraw, ImageFont

    side, left, gap = 128, 110, 6
    count = len(next(iter(images.values())))
    page = Image.new("RGB", (left + count * (side + gap), len(images) * (side + gap) + gap), "white")
    for row, (name, pictures) in enumerate(images.items()):
        top = gap + row * (side + gap)
        ImageDraw.Draw(page).text((10, top + side // 2 - 10), name, "black", font=ImageFont.load_default(20))
        for column, picture in enumerate(pictures):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            drawn = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            page.paste(drawn, (left + column * (side + gap), top))
    page.save(path)
    return path


if __name__ == "__main__":
    main()
