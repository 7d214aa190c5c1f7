"""A DDIM loop written by hand, and Clockwork around it: nothing in the loop changes.

python examples/ddim_loop.py
"""

from itertools import pairwise

import torch

import clockwork_hooks as ch
from clockwork_hooks.demo import DEMO_PROMPTS, load_demo


@torch.no_grad()
def ddim(unet, hidden, *, steps=8, guidance=1.5, seed=0):
    """v-prediction on a cosine schedule, deterministic; `hidden` holds the empty prompt's states, then the prompt's."""
    angle = (torch.arange(1000) + 1) / 1000 * torch.pi / 2
    alpha, sigma = angle.cos().clamp(min=1e-3), angle.sin()
    times = torch.linspace(999, 0, steps + 1).long()
    x = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(seed))
    for now, then in pairwise(times):
        plain, told = unet(torch.cat([x, x]), now, encoder_hidden_states=hidden).sample.chunk(2)
        v = plain + guidance * (told - plain)
        clean, noise = alpha[now] * x - sigma[now] * v, sigma[now] * x + alpha[now] * v
        x = alpha[then] * clean + sigma[then] * noise
    return x


def main():
    demo = load_demo()
    hidden = demo.encode_prompts(DEMO_PROMPTS[:1])
    full = ddim(demo.unet, hidden)
    with ch.wrap(demo.unet, clock=2) as cw:
        quick = ddim(demo.unet, hidden)
        print(cw.report())
    print(f"mean difference of the latents: {(full - quick).abs().mean():.3f} (their spread: {full.std():.3f})")


if __name__ == "__main__":
    main()
