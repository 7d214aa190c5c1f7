"""k-diffusion's own samplers on the demo model: first- and second-order, ancestral and SDE.

python examples/k_diffusion_samplers.py
"""

import importlib.util
import sys
import types

import torch

import clockwork_hooks as ch
from clockwork_hooks.demo import DEMO_PROMPTS, load_demo

SAMPLERS = ("sample_dpmpp_2m", "sample_heun", "sample_euler_ancestral", "sample_dpmpp_2m_sde")


def k_diffusion(name):
    """One file of k-diffusion, without torchvision and the rest that only its training scripts need."""
    if "k_diffusion" not in sys.modules:
        package = types.ModuleType("k_diffusion")
        package.__path__ = importlib.util.find_spec("k_diffusion").submodule_search_locations
        sys.modules["k_diffusion"] = package
    for key in (absent := () if importlib.util.find_spec("torchvision") else ("torchvision", "torchvision.transforms")):
        sys.modules[key] = types.ModuleType(key)
        sys.modules[key].functional = None
    found = importlib.import_module(f"k_diffusion.{name}")
    for key in absent:
        del sys.modules[key]
    return found


@torch.no_grad()
def sample(unet, hidden, sampler, *, steps=8, seed=0):
    """The demo's UNet in k-diffusion's denoiser for discrete v-prediction; it hands over one time per row."""

    class Denoiser(k_diffusion("external").DiscreteVDDPMDenoiser):
        def get_v(self, x, t, **_):
            return self.inner_model(x, t, encoder_hidden_states=hidden).sample

    angle = (torch.arange(1000) + 1) / 1001 * torch.pi / 2
    model = Denoiser(unet, angle.cos() ** 2, quantize=False)
    sigmas, generator = model.get_sigmas(steps), torch.manual_seed(seed)
    noise = torch.randn(1, 12, 32, 32, generator=generator) * sigmas[0]
    return getattr(k_diffusion("sampling"), sampler)(model, noise, sigmas, disable=True)


def main():
    demo = load_demo()
    hidden = demo.encode_prompts(DEMO_PROMPTS[:1], guided=False)
    for sampler in SAMPLERS:
        with ch.wrap(demo.unet, clock=2) as cw:
            sample(demo.unet, hidden, sampler)
            stats = cw.stats
        print(f"{sampler}: {stats.full_passes} full, {stats.adaptor_passes} with the adaptor: saves {stats.saving:.0%}")


if __name__ == "__main__":
    main()
