"""Save, find and read checkpoints by tensor name; weights from other programs, and for them (pretrained/)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pretrained.load import load_pretrained as load_pretrained
    from .pretrained.source import derive as derive

_HOME = {"load_pretrained": "load", "derive": "source"}  # on first use: the commands look for checkpoints before torch is there


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.pretrained.{_HOME[name]}"), name)
