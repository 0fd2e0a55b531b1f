"""One concern a file; each docstring says what state the callback keeps."""

from .checkpoint import Checkpoint, ExactResume
from .layout import Layout
from .progress import ProgressBar
from .rows import Rows
from .samples import Samples
from .throughput import Throughput

__all__ = ["Checkpoint", "ExactResume", "Layout", "ProgressBar", "Rows", "Samples", "Throughput"]
