"""The imports of torch and Lightning, with the garbage collector paused, and how long OpenMP's threads spin. No torch here."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 100  # modules
SPINS = "30000"  # turns of an idle thread's loop before it sleeps


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Pauses the garbage collector for the imports in this block, and then freezes what they made: no later collection walks these objects.

    torch, Lightning and torchmetrics make a million objects that live as long as the process. Python's collector would walk all of them some ten
    times during the imports, again in each full collection while a model trains, and once more at exit; and a forked process would copy the
    memory that it writes its marks to (https://docs.python.org/3/library/gc.html#gc.freeze). `python -m meshformer.bench startup` measures it.
    """
    spin_briefly()
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


def spin_briefly() -> None:
    """Tells GNU's OpenMP, which reads it when torch is imported, to let a thread that waits for the others sleep after a tenth of its usual time.

    A waiting thread holds its core in a loop. Where another program has a core too, the thread that the others wait for stands behind them, and a
    step takes many times as long (`python -m meshformer.bench threads`). What the user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = SPINS
