"""Private names of Hydra (1.3). Imports no torch.

Hydra's public entry point, a decorator, reads sys.argv, creates folders and exits the process. Our command line has several commands and its
own error messages, so it calls the functions behind the decorator.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.utils import JobReturn

__all__ = ["Callbacks", "Hydra", "create_config_search_path", "get_args_parser", "job_result"]


def job_result(job: JobReturn) -> Any:
    """Return the value of a job, or the exception that ended it, which the public `return_value` would print and raise."""
    return job._return_value
