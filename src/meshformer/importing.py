"""The imports of torch and Lightning, with the garbage collector paused. No torch here."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 100  # modules


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Pauses the garbage collector for the imports in this block, and then freezes what they made: no later collection walks these objects.

    torch, Lightning and torchmetrics make a million objects that live as long as the process. Python's collector would walk all of them some ten
    times during the imports, again in each full collection while a model trains, and once more at exit; and a forked process would copy the
    memory that it writes its marks to (https://docs.python.org/3/library/gc.html#gc.freeze). `python -m meshformer.bench startup` measures it.
    """
    if not gc.isenabled():
        yield
        return
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before + MANY:  # otherwise they were imported already, and freezing would keep what is garbage by now
            gc.freeze()
        gc.enable()
