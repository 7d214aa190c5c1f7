"""What can go wrong in the demo."""

from __future__ import annotations

__all__ = ["CaptionError", "DemoError", "UnknownWordError", "WeightsError"]


class DemoError(ValueError):
    """Anything the demo refuses to do."""


class CaptionError(DemoError):
    """A prompt whose words are known but whose form is not."""


class UnknownWordError(CaptionError):
    """A prompt with words that the demo model has never seen."""


class WeightsError(DemoError):
    """Shipped weights that are missing or do not fit."""
