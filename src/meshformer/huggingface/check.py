"""Which Hugging Face layout a model can be written in, decided from its settings before anything is read or written. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.model.settings import SECOND_NAME

from .parts import TEXT, VISION, Model, complete
from .source import LAYOUTS, listed

KEEPS_ALL = "Use format=safetensors, which keeps every tensor."


def layout_for(model: Model, names: Callable[[], Iterable[str]] = tuple) -> ModuleType:
    """The Hugging Face layout in which the model node `model` can be written without loss.

    ConfigError names the settings in which the model differs from the nearest layout. For a class of the user's it names the tensors that
    no layout has a place for, taken from `names()`, which is called in that case only.
    """
    of_class = [layout for layout in LAYOUTS if model["_target_"] == layout.CLASS]
    if not of_class:
        lost = _unplaced(model, list(names()))
        more = f", and none has a place for {listed(lost)}" if lost else ""
        raise ConfigError(f"no Hugging Face layout is known for {model['_target_']}{more}", "format", "huggingface", fix=KEEPS_ALL)
    whole = complete(model)
    misfits = {layout: layout.unfit(whole) for layout in of_class}
    layout = min(of_class, key=lambda layout: len(misfits[layout]))
    if not misfits[layout]:
        return layout
    differing = ", ".join(f"model.{key}={_plain(whole.get(key))} (there: {_either(value)})" for key, value in misfits[layout].items())
    small = ", or train model=llama_nano, which fits Llama" if layout.NAME == "Llama" else ""
    fix = f"Use format=safetensors, onnx or torch_export{small}."
    message = f"the model fits no Hugging Face layout exactly; the nearest is {layout.NAME}, but for {differing}"
    raise ConfigError(message, "format", "huggingface", fix=fix)


def _unplaced(model: Model, names: list[str]) -> list[str]:
    """The tensors of a class of the user's that the nearest layout has no place for. Empty where the class has other settings than our own
    models, so that no layout can be compared with it."""
    node = {**model, "_target_": VISION if "image_size" in model else TEXT}
    found: list[list[str]] = []
    for layout in LAYOUTS:
        try:
            parts = layout.parts(complete(node))
            found.append([name for name in names if name not in parts and SECOND_NAME.get(name) not in parts])
        except (KeyError, TypeError):
            continue
    return min(found, key=len, default=[])


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _either(value: Any) -> str:
    return " or ".join(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
