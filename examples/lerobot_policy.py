"""LeRobot's diffusion policy with `compile_model=True`: Clockwork compiles in the place of `torch.compile`.

    python examples/lerobot_policy.py

`Diffusion` stands for `policy.diffusion`, and samples as it does: a time for each row, made anew at every call.
"""

import torch
from diffusers import DDIMScheduler
from torch import nn

import clockwork_hooks as ch


class UNet(nn.Module):  # actions (B, T, D), a step and a condition to the noise in the actions, as LeRobot's
    def __init__(self, actions=2, condition=6, width=16):
        super().__init__()
        self.time, self.film = nn.Linear(1, width), nn.Linear(width + condition, 2 * width)
        self.stem, self.down = nn.Conv1d(actions, width, 5, padding=2), nn.Conv1d(width, 2 * width, 3, 2, 1)
        self.middle, self.up = nn.Conv1d(2 * width, 2 * width, 1), nn.ConvTranspose1d(2 * width, width, 4, 2, 1)
        self.head = nn.Conv1d(2 * width, actions, 1)

    def forward(self, x, timestep, global_cond=None):
        emb = self.film(torch.cat([self.time(timestep[:, None] / 100).sin(), global_cond], 1))[:, :, None]
        skip = self.stem(x.transpose(1, 2))
        h = self.up(self.middle((self.down(skip) * emb).tanh()).tanh())
        return self.head(torch.cat([h, skip], 1)).transpose(1, 2)


class Diffusion(nn.Module):
    def __init__(self, *, backend="inductor"):
        super().__init__()
        torch.manual_seed(0)
        self.unet = torch.compile(UNet().eval(), backend=backend)  # compile_model=True
        self.noise_scheduler = DDIMScheduler(100)

    @torch.no_grad()
    def conditional_sample(self, global_cond, *, steps=10, seed=0):
        sample = torch.randn(len(global_cond), 16, 2, generator=torch.Generator().manual_seed(seed))
        self.noise_scheduler.set_timesteps(steps)
        for t in self.noise_scheduler.timesteps:
            noise = self.unet(sample, torch.full(sample.shape[:1], t, dtype=torch.long), global_cond=global_cond)
            sample = self.noise_scheduler.step(noise, t, sample).prev_sample
        return sample


def main(backend="inductor"):
    diffusion = Diffusion(backend=backend)
    diffusion.unet = getattr(diffusion.unet, "_orig_mod", diffusion.unet)  # 1. the UNet itself
    cw = ch.wrap(diffusion.unet, clock=2).compile(backend=backend)  # 2. Clockwork compiles both kinds of passes
    for k in range(2):
        with cw.trajectory():  # 3. the calls inside are of one plan: its times are numbers of their own
            diffusion.conditional_sample(torch.full((1, 6), float(k)))
    print(cw.report())


if __name__ == "__main__":
    main()
