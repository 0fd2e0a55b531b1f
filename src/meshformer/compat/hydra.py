"""Private names of Hydra (1.3). Loads no torch.

Hydra's public way in is a decorator that reads sys.argv, makes folders and ends the process; a program with several commands, whose errors are
sentences, has to call what lies behind it.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.utils import JobReturn

__all__ = ["Callbacks", "Hydra", "create_config_search_path", "get_args_parser", "returned"]


def returned(job: JobReturn) -> Any:
    """What a job returned, or the exception that ended it. The public `return_value` raises that, and prints."""
    return job._return_value
