"""InvokeAI's loop: a UNet of diffusers, one call for each prompt, with arguments that say how far the sampling is.

    python examples/invokeai_loop.py

`percent_through` steers InvokeAI's attention, and is another number in every step. What the region makes of it is one
step old on adaptor passes, like the rest of its feature: `ignore=` says that this is meant.
"""

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

import clockwork_hooks as ch


class Regional(AttnProcessor2_0):  # takes what InvokeAI hands to its processors
    def __call__(self, *args, percent_through=None, regional_prompt_data=None, **kwargs):
        return super().__call__(*args, **kwargs)


def build(*, seed=0):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        16,
        block_out_channels=(8, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    unet.set_attn_processor(Regional())
    return unet.eval()


def denoise(unet, *, steps=8, seed=0):
    """Sequential guidance, and embeddings that are handed over as new objects in every call."""
    (scheduler := EulerDiscreteScheduler()).set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    prompts = {name: torch.randn(1, 7, 16, generator=generator) for name in ("negative", "positive")}
    latents, noise = torch.randn(1, 4, 16, 16, generator=generator) * scheduler.init_noise_sigma, {}
    for k, t in enumerate(scheduler.timesteps):
        with torch.inference_mode():
            sample = scheduler.scale_model_input(latents, t)
            for name, text in prompts.items():
                told = {"percent_through": k / steps, "regional_prompt_data": {"masks": [torch.ones(1, 16, 16)]}}
                noise[name] = unet(sample, t, text.clone(), cross_attention_kwargs=told).sample
            latents = scheduler.step(torch.lerp(*noise.values(), 5.0), t, latents).prev_sample
    return latents


def main():
    unet = build()
    with ch.wrap(unet, clock=2, ignore=("cross_attention_kwargs",)) as cw:
        denoise(unet)
        print(cw.report())


if __name__ == "__main__":
    main()
