"""What it costs to follow what is skipped into memory that a pass makes (`engine/fresh.py`): a small SD-1.5-like UNet.

    python -m benchmarks.followed

Process time, one thread; trajectories with and without following take turns in one process.
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from diffusers import UNet2DConditionModel

import clockwork_hooks as ch

STEPS, ROUNDS = 50, 12


def main() -> None:
    """Print the median of each kind of pass."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    x, text, times = torch.zeros(2, 4, 16, 16), torch.zeros(2, 7, 32), torch.arange(1000, 0, -1000 // STEPS)
    passes: dict[str, list[float]] = {"full": [], "adaptor": [], "adaptor, followed": []}
    with torch.no_grad(), ch.wrap(unet, clock=2) as cw:
        for k in range(ROUNDS):
            cw._engine.chain[0].follows = bool(k % 2)
            with cw.trajectory(steps=STEPS):
                for step, t in enumerate(times):
                    begin = time.process_time()
                    unet(x, t, text)
                    kind = "full" if step % 2 == 0 else "adaptor, followed" if k % 2 else "adaptor"
                    if k > 1:
                        passes[kind].append(time.process_time() - begin)
    for kind, seconds in passes.items():
        low, _, high = statistics.quantiles(seconds, n=4)
        print(f"{kind:20} {1e3 * statistics.median(seconds):6.2f} ms  (quartiles {1e3 * low:.2f} to {1e3 * high:.2f})")


if __name__ == "__main__":
    main()
