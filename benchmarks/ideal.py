"""The ideal: Clockwork written by hand for diffusers' conditional UNets, without any library.

A full pass is the UNet; the other passes call the modules of the high-resolution half, one after the other, and
nothing else. This is what the library is measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class Pruned(nn.Module):
    """The high-resolution half of a `UNet2DConditionModel`: `forward(..., exit)` continues from the exit.

    Args:
        unet: the UNet; its modules are called, not copied.
        cut: "outer" begins at the last up block, "paper" at the upsampler before it (and runs the downsampler).
    """

    def __init__(self, unet: Any, cut: str) -> None:
        super().__init__()
        self.unet, self.cut = unet, cut

    def forward(
        self, sample: Tensor, t: Tensor, exit: Tensor, *, encoder_hidden_states: Tensor, added_cond_kwargs: Any = None
    ) -> Tensor:
        unet, text = self.unet, encoder_hidden_states
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
        if added_cond_kwargs is not None:
            added = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
            emb = emb + added
        hidden = unet.conv_in(sample)
        skips = [hidden]
        down, up = unet.down_blocks[0], unet.up_blocks[-1]
        attentions = getattr(down, "attentions", [None] * len(down.resnets))
        for resnet, attention in zip(down.resnets, attentions, strict=True):
            hidden = resnet(hidden, emb)
            if attention is not None:
                hidden = attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
            skips.append(hidden)
        if self.cut == "paper":
            down.downsamplers[0](hidden)
            exit = unet.up_blocks[-2].upsamplers[0](exit)
        options = {"encoder_hidden_states": text} if hasattr(up, "attentions") else {}
        hidden = up(hidden_states=exit, temb=emb, res_hidden_states_tuple=tuple(skips), **options)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


class Full:
    """The UNet, which also hands out the exit."""

    def __init__(self, unet: Any, cut: str) -> None:
        self.unet, self.exit = unet, None
        if cut == "paper":
            unet.up_blocks[-2].upsamplers[0].register_forward_pre_hook(self._before)
        else:
            unet.up_blocks[-2].register_forward_hook(self._after)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output = self.unet(*args, **kwargs, return_dict=False)[0]
        return output, self.exit

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.exit = args[0]

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.exit = output


class HandClock:
    """Clockwork with the identity adaptor, by hand.

    Args:
        unet: a UNet that nothing else uses.
        clock: a full pass every so many steps.
        cut: "outer" or "paper".
        make: makes a function static: `Graphed`, `torch.compile`, or nothing.
    """

    def __init__(self, unet: Any, clock: int, cut: str, make: Callable[[Any], Any] = lambda function: function) -> None:
        self.full, self.pruned = make(Full(unet, cut)), make(Pruned(unet, cut))
        self.clock, self.step, self.exit = clock, 0, None

    def begin(self) -> None:
        """A trajectory begins."""
        self.step, self.exit = 0, None

    def __call__(self, sample: Tensor, t: Tensor, *, return_dict: bool = False, **conditions: Any) -> tuple[Tensor]:
        if self.step % self.clock == 0 or self.exit is None:
            output, self.exit = self.full(sample, t, **conditions)
        else:
            output = self.pruned(sample, t, self.exit, **conditions)
        self.step += 1
        return (output,)


class Graphed:
    """Any function of tensors as one CUDA graph: buffers in, copies out. What one writes by hand in an afternoon."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.graph = function, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.graph is None:
            self._capture(args, kwargs)
        torch.utils._pytree.tree_map(lambda buffer, value: buffer.copy_(value), self.inputs, _tensors((args, kwargs)))
        self.graph.replay()
        return tree_map(copied, self.output)

    def _capture(self, args: Any, kwargs: Any) -> None:
        made: list[Tensor] = []

        def buffer(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                made.append(leaf.clone())
                return made[-1]
            return leaf

        args, kwargs = tree_map(buffer, (args, kwargs))
        self.inputs = made
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.function(*args, **kwargs)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")  # a wait for the device is found here: in a capture it does harm
            try:
                self.function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self.function(*args, **kwargs)
        self.graph = graph


class Compiled:
    """Any function of tensors under torch.compile with CUDA graphs, used as its manual says."""

    def __init__(self, function: Any, **options: Any) -> None:
        self.function = torch.compile(function, fullgraph=True, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        output = self.function(*args, **kwargs)
        return tree_map(copied, output)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def copied(leaf: Any) -> Any:
    """A tensor's copy; anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
