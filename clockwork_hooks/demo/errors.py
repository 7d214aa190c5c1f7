"""What can go wrong in the demo, below `clockwork_hooks.errors.DemoError`."""

from __future__ import annotations

from clockwork_hooks.errors import DemoError

__all__ = ["CaptionError", "UnknownWordError", "WeightsError"]


class CaptionError(DemoError):
    """A prompt whose words are known but whose form is not."""


class UnknownWordError(CaptionError):
    """A prompt with words that the demo model has never seen."""


class WeightsError(DemoError):
    """Shipped weights that are missing, corrupted, or of another architecture."""
