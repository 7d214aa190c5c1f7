"""A volume of medical imaging: MONAI's 3D DiffusionModelUNet under its own `DiffusionInferer`.

python examples/monai_3d.py
"""

import torch
from monai.inferers import DiffusionInferer
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler

import clockwork_hooks as ch


def build(*, seed=0):
    """A small UNet with fresh weights; MONAI sets the last ones to zero, which would hide everything before them."""
    torch.manual_seed(seed)
    unet = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=(8, 16, 16),
        num_res_blocks=1,
        attention_levels=(False, False, True),
        norm_num_groups=8,
        num_head_channels=8,
    )
    torch.nn.init.normal_(unet.out[2].conv.weight, std=0.1)
    return unet.eval()


@torch.no_grad()
def sample(unet, *, steps=8, seed=0):
    """A volume (1, 1, 16, 16, 16)."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(num_inference_steps=steps)
    noise = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
    return DiffusionInferer(scheduler).sample(noise, unet, scheduler, verbose=False)


def main():
    unet = build()
    with ch.wrap(unet, clock=2) as cw:
        sample(unet)
        print(cw.report())


if __name__ == "__main__":
    main()
