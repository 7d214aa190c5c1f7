"""What a clone with Clockwork must sample, by a hook on a plain one: it shares no code with the node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Reference:
    """Serves rows of the exit from the step before, where the clock says so and all of them were there in that step.

    Args:
        unet: the diffusion model.
        exit: path of the module that returns the exit.
        evaluations: of the model in each step of the sampler, told by hand.
        adapted: is this step, from 0, one that uses the adaptor?
        frozen: modules that are not run where the adaptor is used; what they return then does not matter.
        shapes: of batches that were sampled before: the first call of another one is full.

    Attributes:
        letters: F or A for each call.
    """

    def __init__(
        self,
        unet: nn.Module,
        exit: str,
        evaluations: Sequence[int],
        adapted: Callable[[int], bool],
        frozen: Sequence[str] = (),
        shapes: set[Any] | None = None,
    ) -> None:
        self._places = [(step, k) for step, count in enumerate(evaluations) for k in range(count)]
        self._adapted, self.letters = adapted, ""
        self._at = self._step = -1
        self._shapes = set() if shapes is None else shapes
        self._keys: list[Any] = []
        self._now: dict[Any, Tensor] = {}
        self._before: dict[Any, Tensor] = {}
        self._seen: Counter[Any] = Counter()
        self._hooks = [
            unet.register_forward_pre_hook(self._call, with_kwargs=True),
            unet.get_submodule(exit).register_forward_hook(self._exit),
        ]

        self._frozen = [unet.get_submodule(path) for path in frozen]
        for module in self._frozen:
            module.forward = self._freeze(module.forward)  # type: ignore[method-assign]

    def _freeze(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        last: list[Any] = [None]

        def frozen(*args: Any, **kwargs: Any) -> Any:
            if self.letters[-1] == "F":
                last[0] = forward(*args, **kwargs)
            return last[0]

        return frozen

    def evaluation(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's PREDICT_NOISE wrapper."""
        self._at += 1
        self._seen.clear()
        step, evaluation = self._places[self._at]
        if evaluation == 0:
            self._before, self._now = self._now if step - 1 == self._step else {}, {}
            self._step = step
        return executor(*args, **kwargs)

    def _call(self, unet: nn.Module, args: Any, kwargs: Any) -> None:
        options = kwargs["transformer_options"]
        window = getattr(options.get("context_window"), "index_list", None)
        controlled = kwargs.get("control") is not None  # where control begins or ends, the model gets other arguments
        step, evaluation = self._places[self._at]
        pairs = zip(options["cond_or_uncond"], options["uuids"], strict=True)
        weights = float(sum(one.double().sum() for one in unet.parameters()))  # which hooks may change in each call
        chunks = [(*pair, repr(window), controlled, weights) for pair in pairs]
        self._seen.update(chunks)
        x = args[0] if args else kwargs["x"]
        self._keys = [
            (evaluation, *chunk, self._seen[chunk], row) for chunk in chunks for row in range(len(x) // len(chunks))
        ]
        due = self._adapted(step) and all(key in self._before for key in self._keys)
        first = (x.shape, controlled) not in self._shapes
        self._shapes.add((x.shape, controlled))
        self.letters += "A" if due and not first else "F"

    def _exit(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        served = torch.stack([self._before[k] for k in self._keys]) if self.letters[-1] == "A" else output.clone()
        self._now.update(zip(self._keys, served, strict=True))
        return served.clone()

    def remove(self) -> None:
        """Take the hooks off, and look whether the sampler made as many evaluations as it was said to."""
        for hook in self._hooks:
            hook.remove()
        for module in self._frozen:
            del module.forward
        assert self._at == len(self._places) - 1, (self._at, self._places)
