"""What users pass as an adaptor, made into one: the same values and the same error wherever one is taken."""

from __future__ import annotations

import os
from typing import Any

from clockwork_hooks.adaptors.base import Adaptor, IdentityAdaptor
from clockwork_hooks.errors import AdaptorError

__all__ = ["AdaptorLike", "is_identity", "resolve_adaptor"]

AdaptorLike = Adaptor | str | os.PathLike[str] | None


def is_identity(adaptor: Any) -> bool:
    """Is this the identity, in one of the ways to say it?"""
    return adaptor is None or (isinstance(adaptor, str) and adaptor == "identity") or type(adaptor) is IdentityAdaptor


def resolve_adaptor(adaptor: AdaptorLike) -> Adaptor:
    """The adaptor that a user's value stands for.

    Args:
        adaptor: None or "identity"; the folder of a saved adaptor, as text or a path, or its id on the Hugging Face
            Hub; or a module or function that follows `Adaptor`, which is returned as it is.

    Returns:
        The adaptor; a saved one on the CPU, in evaluation mode.

    Raises:
        AdaptorError: it is none of these, or what is saved there cannot be loaded.

    Example:
        >>> resolve_adaptor("identity")
        IdentityAdaptor()
    """
    if isinstance(adaptor, (str, os.PathLike)) and not is_identity(adaptor):
        from clockwork_hooks.adaptors.learned import LearnedAdaptor  # huggingface_hub comes with it

        return LearnedAdaptor.from_pretrained(adaptor)
    if is_identity(adaptor):
        return adaptor if isinstance(adaptor, IdentityAdaptor) else IdentityAdaptor()
    if isinstance(adaptor, type) or not callable(adaptor):
        raise AdaptorError(
            'an adaptor is None, "identity", the folder of a saved one, or a module called as '
            "adaptor(entry, exit_cached, time=..., text=...)",
            seen={"adaptor": repr(adaptor)[:80]},
            do="pass one of these",
        )
    return adaptor
