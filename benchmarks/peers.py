"""The peers, from PyPI, run as their own manuals say: DeepCache and tomesd."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.ideal import Compiled, copied
from benchmarks.setting import Loop


class DeepCache:
    """DeepCache on a UNet, branch 0. Its helper reads the step off the pipeline's scheduler (a wait for the device).

    Args:
        unet: a UNet that nothing else uses.
        loop: whose scheduler the helper reads.
        interval: a full pass every so many steps.
    """

    def __init__(self, unet: Any, loop: Loop, interval: int) -> None:
        from DeepCache import DeepCacheSDHelper

        self.unet = unet
        self.helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=loop.scheduler))
        self.helper.set_params(cache_interval=interval, cache_branch_id=0)
        self.helper.enable()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


class DeepCacheByHand(DeepCache):
    """DeepCache as two static functions, which it does not offer: its step counter is set from outside.

    Args:
        make: makes a function static.
        **options: those of `DeepCache`.
    """

    def __init__(self, unet: Any, loop: Loop, interval: int, make: Callable[[Any], Any]) -> None:
        super().__init__(unet, loop, interval)
        unet.forward = self.helper.function_dict["unet_forward"]  # without the wait for the device
        self.interval, self.step = interval, 0
        self.read = [key for key in self.helper.function_dict if key != "unet_forward" and self._is_read(*key)]
        self.full, self.skip = (make(self._at(cursor)) for cursor in (0, 1))

    def begin(self) -> None:
        """A trajectory begins."""
        self.step = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.full if self.step % self.interval == 0 else self.skip
        self.step += 1
        output = run(*args, **kwargs)
        if run is self.full and isinstance(run, Compiled):  # out of the memory that the next call overwrites
            self.helper.cached_output = tree_map(copied, self.helper.cached_output)
        return output

    def _is_read(self, kind: str, name: str, block: int, layer: int) -> bool:
        """Does a skipping step take this output from the cache? Not if it lies within a block that does."""
        self.helper.start_timestep, self.helper.cur_timestep = 0, 1
        skip = self.helper.is_skip_step
        return skip(block, layer, kind) and (name in ("block", "mid_block") or not skip(block, 0, kind))

    def _at(self, cursor: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            helper = self.helper
            helper.start_timestep, helper.cur_timestep = 0, cursor
            if cursor == 0:
                helper.cached_output = {}  # or what lies there would be a condition of the graph
            output = self.unet(*args, **kwargs)
            helper.cached_output = {key: helper.cached_output[key] for key in self.read}  # nothing else leaves a graph
            return output

        return run


def tome(unet: Any, *, rand: bool = True) -> Any:
    """A UNet with half of the tokens of its highest level merged (tomesd's defaults)."""
    import tomesd

    return tomesd.apply_patch(unet, ratio=0.5, use_rand=rand)
