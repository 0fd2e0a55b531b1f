"""Callbacks: one concern per file. Each docstring says what state the callback saves in checkpoints."""

from .checkpoint import Checkpoint, ExactResume
from .ema import EMA
from .layout import Layout
from .nonfinite import NonFinite, Spike
from .profile import Profile
from .progress import ProgressBar
from .pruning import Pruning
from .rows import Rows
from .samples import Samples
from .throughput import Throughput

__all__ = ["EMA", "Checkpoint", "ExactResume", "Layout", "NonFinite", "Profile", "ProgressBar", "Pruning", "Rows", "Samples", "Spike", "Throughput"]
