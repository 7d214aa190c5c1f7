"""denoising-diffusion-pytorch: its own UNet and its own `GaussianDiffusion.sample()`.

python examples/denoising_diffusion.py
"""

import importlib.machinery
import importlib.util
import sys
import types

import torch

import clockwork_hooks as ch


def package():
    """The package; where torchvision is not installed, without what only its trainer needs."""
    missing = importlib.util.find_spec("torchvision") is None
    names = ("torchvision", "torchvision.transforms", "torchvision.utils") if missing else ()
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    if missing:
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
        sys.modules["torchvision"].utils = sys.modules["torchvision.utils"]
    import denoising_diffusion_pytorch

    for name in names:
        del sys.modules[name]
    return denoising_diffusion_pytorch


def build(*, seed=0):
    """A small UNet with fresh weights, and a sampler of ten DDIM steps over a thousand times."""
    torch.manual_seed(seed)
    unet = package().Unet(dim=16, dim_mults=(1, 2, 4), attn_heads=2, attn_dim_head=8)
    return unet, package().GaussianDiffusion(unet, image_size=16, timesteps=1000, sampling_timesteps=10).eval()


def sample(diffusion, *, seed=0):
    torch.manual_seed(seed)
    return diffusion.sample(batch_size=2)


def main():
    unet, diffusion = build()
    with ch.wrap(unet, clock=2) as cw:
        sample(diffusion)
        print(cw.report())


if __name__ == "__main__":
    main()
