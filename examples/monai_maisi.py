"""MAISI, MONAI's generator of CT volumes: its own UNet and rectified-flow scheduler, in the loop of its tutorial.

python examples/monai_maisi.py
"""

import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.schedulers import RFlowScheduler

import clockwork_hooks as ch

SIZE = (4, 16, 16, 16)


def build(*, seed=0):
    """A small one with fresh weights; MONAI sets the last ones to zero, which would hide everything before them."""
    torch.manual_seed(seed)
    unet = DiffusionModelUNetMaisi(
        spatial_dims=3,
        in_channels=4,
        out_channels=4,
        num_channels=(8, 16, 16),
        num_res_blocks=1,
        attention_levels=(False, False, True),
        norm_num_groups=8,
        num_head_channels=8,
        num_class_embeds=4,
        resblock_updown=True,
        include_spacing_input=True,
    )
    torch.nn.init.normal_(unet.out[2].conv.weight, std=0.1)
    return unet.eval()


@torch.no_grad()
def sample(unet, *, steps=8, seed=0):
    """Latents of a volume; the time of each call is a new tensor, and the body region is a number for each row."""
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False, use_timestep_transform=True)
    scheduler.set_timesteps(num_inference_steps=steps, input_img_size_numel=16**3)
    latents = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(seed))
    spacing, region = torch.full((1, 3), 100.0), torch.ones(1, dtype=torch.long)
    following = torch.cat([scheduler.timesteps[1:], torch.zeros(1, dtype=scheduler.timesteps.dtype)])
    for t, then in zip(scheduler.timesteps, following, strict=True):
        velocity = unet(x=latents, timesteps=torch.Tensor((t,)), class_labels=region, spacing_tensor=spacing)
        latents, _ = scheduler.step(velocity, t, latents, then)
    return latents


def main():
    unet = build()
    with ch.wrap(unet, clock=2) as cw:
        for _ in range(2):
            with cw.trajectory():  # the calls inside are of one volume
                sample(unet)
        print(cw.report())


if __name__ == "__main__":
    main()
