"""Private names of Hydra (1.3). Imports no torch.

Hydra's public entry point, a decorator, reads sys.argv, creates folders and exits the process. Our command line has several commands and its
own error messages, so it reads the flags with Hydra's parser and calls the callbacks of `hydra.callbacks` itself.
"""

from __future__ import annotations

from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser

__all__ = ["Callbacks", "get_args_parser"]
