"""A controller that replans in a loop, as diffusion policies do: a trajectory of denoising for every few actions.

    python examples/diffusion_policy.py

Each plan is a trajectory of its own: nothing of the plan before is used in it.
"""

import torch
from torch import nn

import clockwork_hooks as ch

HORIZON, ACTIONS, STEPS = 16, 2, 6


class Policy(nn.Module):
    """A UNet over time: actions (B, 2, 16), a step, and an observation (B, 4) to the noise in the actions."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv1d(ACTIONS, width, 3, padding=1)
        self.condition = nn.Linear(4 + 1, width)
        self.down = nn.Conv1d(width, 2 * width, 4, 2, 1)
        self.middle = nn.Sequential(nn.SiLU(), nn.Conv1d(2 * width, 2 * width, 3, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose1d(2 * width, width, 4, 2, 1)
        self.head = nn.Conv1d(2 * width, ACTIONS, 3, padding=1)

    def forward(self, sample, timestep, observation):
        time = torch.full((len(sample), 1), float(timestep) / 100)
        h = self.stem(sample) + self.condition(torch.cat([observation, time.sin()], 1))[:, :, None]
        return self.head(torch.cat([h, self.up(self.middle(self.down(h)))], 1))


@torch.no_grad()
def control(policy, *, plans=4, seed=0):
    """Plan, take four actions, look, plan again. Returns where the agent was."""
    generator, place, seen = torch.Generator().manual_seed(seed), torch.zeros(1, 2), []
    for _ in range(plans):
        observation = torch.cat([place, torch.ones(1, 2) - place], 1)
        plan = torch.randn(1, ACTIONS, HORIZON, generator=generator)
        for k in range(STEPS, 0, -1):
            noise = policy(plan, 100 * k / STEPS, observation)
            plan = plan - noise / STEPS
        for action in plan[0, :, :4].T:
            place = place + 0.1 * action.tanh()
            seen.append(place)
    return torch.cat(seen)


def main():
    torch.manual_seed(0)
    policy = Policy().eval()
    with ch.wrap(policy, clock=2) as cw:
        control(policy)
        print(cw.report())


if __name__ == "__main__":
    main()
