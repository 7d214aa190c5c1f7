"""What the training tests share: a small adaptor, a guided sampler over `Tiny`, and Algorithm 1 written by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.small_unet import Tiny, reference

GUIDANCE = 3.0
TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)


class Small(nn.Module):
    """Two convolutions over entry and cached exit; starts close to the identity."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mix = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 8, 3, padding=1))
            nn.init.normal_(self.mix[2].weight, std=0.01)

    def forward(self, entry: Tensor | None, exit_cached: Tensor, *, time: Tensor | None, text: Tensor | None) -> Tensor:
        assert entry is not None
        return exit_cached + self.mix(torch.cat([entry, exit_cached], 1))


def noise_of(prompt: int) -> tuple[Tensor, Tensor]:
    """A prompt's own noise and condition: whoever samples it, in whatever batch."""
    generator = torch.Generator().manual_seed(int(prompt))
    return torch.randn(2, 8, 8, generator=generator), torch.randn(3, generator=generator)


def sampler(
    unet: nn.Module,
    times: Sequence[float] = TIMES,
    *,
    calls: int = 1,
    guidance: float = GUIDANCE,
    within: Sequence[float] | None = None,
) -> Callable[[Any], Tensor]:
    """A guided Euler-like sampler: both branches in one call, or in two; at other times than `within`, one alone."""

    def generate(batch: Any) -> Tensor:
        sample, condition = (torch.stack(parts) for parts in zip(*map(noise_of, batch), strict=True))
        empty, both = torch.zeros_like(condition), torch.cat([torch.zeros_like(condition), condition])
        for t in torch.tensor(times):
            if within is not None and t not in within:
                plain = guided = unet(sample, t, condition)
            elif calls == 1:
                plain, guided = unet(torch.cat([sample, sample]), t, both).chunk(2)
            else:
                plain, guided = unet(sample, t, empty), unet(sample, t, condition)
            sample = sample - 0.2 * (plain + guidance * (guided - plain))
        return sample

    return generate


def by_hand(
    unet: Tiny,
    adaptor: nn.Module,
    batches: list[list[int]],
    *,
    clock: int,
    loss: str,
    lr: float,
    times: Sequence[float] = TIMES,
    scale: Callable[[float], float | None] = lambda t: GUIDANCE,
    within: Sequence[float] | None = None,
    accumulate: int = 1,
    after: Callable[[], None] = lambda: None,
) -> list[float]:
    """Algorithm 1 with plain hooks, and the three losses as they are defined; `after` each gradient step."""
    optimizer = torch.optim.Adam(adaptor.parameters(), lr=lr)
    losses = []
    for batch in batches:
        seen: list[tuple[Any, Tensor, Tensor, Tensor]] = []

        def teacher(x: Tensor, t: Tensor, c: Tensor, seen: Any = seen) -> Tensor:
            output, exit = reference(unet, x, t, c)
            entry = unet.stem(x) + unet.emb(t.reshape(-1, 1).expand(len(x), 1) / 100).sin()[:, :, None, None]
            seen.append(((x, t, c), entry, exit, output))
            return output

        with torch.no_grad():
            sampler(teacher, times, within=within)(batch)  # type: ignore[arg-type]
        cached = seen[0][2]
        for step, (args, entry, exit, output) in enumerate(seen, 1):
            if (step - 1) % clock == 0:
                cached = exit
                continue
            adapted = adaptor(entry, cached, time=None, text=None)
            value = _loss(loss, unet, args, adapted, exit, output, scale(float(args[1])))
            (value / accumulate).backward()
            losses.append(value.item())
            if len(losses) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                after()
            cached = adapted.detach()
    return losses


def _loss(
    loss: str, unet: Tiny, args: Any, emitted: Tensor, exit: Tensor, output: Tensor, scale: float | None
) -> Tensor:
    def combined(error: Tensor) -> Tensor:
        if scale is None:
            return error
        plain, guided = error.chunk(2)
        return plain + scale * (guided - plain)

    feature = (emitted - exit).square().mean()
    if loss == "feature":
        return feature
    if loss == "guided-feature":
        return feature + combined(emitted - exit).square().mean()
    return combined(reference(unet, *args, exit=emitted)[0] - output).square().mean()
