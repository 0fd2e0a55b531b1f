"""One concern a file; each docstring says what state the callback keeps."""

from .checkpoint import Checkpoint, ExactResume
from .progress import ProgressBar
from .rows import Rows
from .samples import Samples
from .throughput import Throughput

__all__ = ["Checkpoint", "ExactResume", "ProgressBar", "Rows", "Samples", "Throughput"]
