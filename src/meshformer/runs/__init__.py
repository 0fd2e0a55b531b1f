"""Load, compare and draw runs.

    from meshformer.runs import load_runs, load_metrics, load_model, compare, figures

These functions need the extra `notebooks`. The modules `scan`, `table` and `choices` are plain Python, so that `meshformer runs` starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshformer.runs import figures
    from meshformer.runs.frames import compare, load_metrics, load_runs
    from meshformer.runs.models import attention_maps, load_model, loss_by_position, training_flops
    from meshformer.runs.report import write_report
    from meshformer.runs.speech import confusions, transcripts

__all__ = [
    "attention_maps", "compare", "confusions", "figures", "load_metrics", "load_model", "load_runs", "loss_by_position", "training_flops",
    "transcripts", "write_report",
]  # fmt: skip
_MODULES = {
    "load_runs": "frames",
    "load_metrics": "frames",
    "compare": "frames",
    "load_model": "models",
    "attention_maps": "models",
    "loss_by_position": "models",
    "training_flops": "models",
    "confusions": "speech",
    "transcripts": "speech",
    "write_report": "report",
    "figures": "figures",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("pandas", "matplotlib"):
            raise
        raise ImportError(f"meshformer.runs.{name} needs {error.name}: pip install 'meshformer[notebooks]'", name=error.name) from None
    return module if name == "figures" else getattr(module, name)
