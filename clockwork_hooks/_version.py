"""The version, in the one place that both the build and the running package read."""

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Of this package, torch and Python, as measurements and trainings record them."""
    import platform

    import torch

    return {"clockwork_hooks": __version__, "torch": torch.__version__, "python": platform.python_version()}
