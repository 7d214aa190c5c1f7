"""The demo model: captioned scenes, a small text-to-image diffusion model of them, and a judge of its pictures.

Everything is imported when it is first used.

Example:
    >>> from clockwork_hooks.demo import DEMO_PROMPTS, attribute_accuracy, load_demo
    >>> model = load_demo()  # doctest: +SKIP
    >>> images = model.sample(DEMO_PROMPTS, steps=8)  # doctest: +SKIP
    >>> attribute_accuracy(model.classifier, images, DEMO_PROMPTS).total  # doctest: +SKIP
    1.0
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clockwork_hooks.demo.captions import VOCABULARY, parse, write_captions
    from clockwork_hooks.demo.classifier import Accuracy, AttributeClassifier, attribute_accuracy
    from clockwork_hooks.demo.evaluate import Attributes
    from clockwork_hooks.demo.model import DEMO_PROMPTS, DemoModel, load_demo
    from clockwork_hooks.demo.scenes import Scenes, draw_scenes, render

__all__ = [
    "DEMO_PROMPTS",
    "VOCABULARY",
    "Accuracy",
    "AttributeClassifier",
    "Attributes",
    "DemoModel",
    "Scenes",
    "attribute_accuracy",
    "draw_scenes",
    "load_demo",
    "parse",
    "render",
    "write_captions",
]

_HOMES = {
    "captions": ("VOCABULARY", "parse", "write_captions"),
    "classifier": ("Accuracy", "AttributeClassifier", "attribute_accuracy"),
    "evaluate": ("Attributes",),
    "model": ("DEMO_PROMPTS", "DemoModel", "load_demo"),
    "scenes": ("Scenes", "draw_scenes", "render"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
