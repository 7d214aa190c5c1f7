"""SD.Next's way: one UNet, of which text-to-image and image-to-image pipelines are made; a sampler for every picture.

    python examples/sdnext_loop.py

The handle of the first pipeline follows the others: it reads the steps off whichever scheduler the UNet is called with.
"""

import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, UNet2DModel

from clockwork_hooks.diffusers import wrap_pipeline


class TextToImage:  # what of a pipeline matters here: its parts, and a loop over the scheduler's times
    def __init__(self, unet, scheduler=None):
        self.unet, self.scheduler = unet, scheduler

    @torch.no_grad()
    def __call__(self, steps=8, *, seed=0, image=None, strength=1.0):
        self.scheduler.set_timesteps(steps)
        times = self.scheduler.timesteps[round(steps * (1 - strength)) * self.scheduler.order :]
        noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        latents = noise * self.scheduler.init_noise_sigma
        if image is not None:
            self.scheduler.set_begin_index(len(self.scheduler.timesteps) - len(times))
            latents = self.scheduler.add_noise(image, noise, times[:1])
        for t in times:
            velocity = self.unet(self.scheduler.scale_model_input(latents, t), t).sample
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        return latents


class ImageToImage(TextToImage):
    """Another pipeline of the same UNet, as `from_pipe` makes them."""


def build(*, seed=0):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(16, block_out_channels=(8, 32), layers_per_block=1, norm_num_groups=8, **blocks).eval()
    return TextToImage(unet), ImageToImage(unet)


def draw(text, image):  # a picture, and another one made of it; each with a sampler of its own, set just before
    text.scheduler = EulerDiscreteScheduler()
    first = text()
    image.scheduler = HeunDiscreteScheduler()
    return first, image(image=first, strength=0.75)


def main():
    text, image = build()
    with wrap_pipeline(text, schedule="every(2)").follow(image) as cw:
        draw(text, image)
        print(cw.report())


if __name__ == "__main__":
    main()
