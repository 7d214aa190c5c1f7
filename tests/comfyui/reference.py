"""What a clone with Clockwork must sample, by a hook on a plain one: it shares no code with the node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class Reference:
    """Serves the exit of the step before, where the clock says so and the same call was made in that step.

    Args:
        unet: the diffusion model.
        exit: path of the module that returns the exit.
        evaluations: of the model in each step of the sampler, told by hand.
        adapted: is this step, from 0, one that uses the adaptor?
        frozen: modules that are not run where the adaptor is used; what they return then does not matter.

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
    ) -> None:
        self._places = [(step, k) for step, count in enumerate(evaluations) for k in range(count)]
        self._adapted, self.letters = adapted, ""
        self._at = -1
        self._key: Any = None
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
        if self._places[self._at][1] == 0:
            self._before, self._now = self._now, {}
        return executor(*args, **kwargs)

    def _call(self, unet: nn.Module, args: Any, kwargs: Any) -> None:
        options = kwargs["transformer_options"]
        window = getattr(options.get("context_window"), "index_list", None)
        controlled = kwargs.get("control") is not None  # where control begins or ends, the model gets other arguments
        who = (tuple(options["cond_or_uncond"]), tuple(options["uuids"]), repr(window))
        key = (self._places[self._at][1], *who, controlled)
        self._seen[key] += 1
        self._key = (*key, self._seen[key])
        step = self._places[self._at][0]
        self.letters += "A" if self._adapted(step) and self._key in self._before else "F"

    def _exit(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        served = self._before[self._key] if self.letters[-1] == "A" else output.clone()
        self._now[self._key] = served
        return served.clone()

    def remove(self) -> None:
        """Take the hooks off, and look whether the sampler made as many evaluations as it was said to."""
        for hook in self._hooks:
            hook.remove()
        for module in self._frozen:
            del module.forward
        assert self._at == len(self._places) - 1, (self._at, self._places)
