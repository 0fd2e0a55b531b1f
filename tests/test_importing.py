"""Imports of torch and Lightning are frozen, so that no collection walks them; nothing else is."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from meshformer.importing import SPINS, heavy_imports, spin_briefly

AFTER = """
import gc, sys
from meshformer.importing import heavy_imports
with heavy_imports():
    assert not gc.isenabled()
    with heavy_imports():
        import torch
    assert not gc.isenabled(), "the outer block is not over"
print(gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()))
"""


def test_what_is_imported_is_frozen_and_the_collector_runs_again() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER], capture_output=True, text=True, check=True)
    enabled, frozen, walked = done.stdout.split()
    assert enabled == "True" and int(frozen) > 100_000 > 10 * int(walked)


def test_a_command_that_imports_nothing_new_freezes_nothing() -> None:
    frozen = gc.get_freeze_count()
    with heavy_imports():
        import json  # noqa: F401
    assert gc.get_freeze_count() == frozen and gc.isenabled()


def test_the_collector_runs_again_after_an_import_that_fails() -> None:
    try:
        with heavy_imports():
            raise ImportError
    except ImportError:
        pass
    assert gc.isenabled()


def test_ranks_and_jobs_of_a_sweep_are_forked_from_frozen_imports() -> None:
    code = "import gc, meshformer.command.preload; print(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 300_000


@pytest.mark.parametrize(("given", "left"), [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_spin_briefly_unless_the_user_says_otherwise(given: dict[str, str], left: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == left


def test_a_job_is_told_before_torch_is_imported() -> None:
    """libgomp reads the variable when it is loaded, and torch loads it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, sys, meshformer.command.launch as launch; assert 'torch' not in sys.modules; "
    code += "launch.heavy_imports().__enter__(); print(os.environ['GOMP_SPINCOUNT'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean).stdout.strip() == SPINS
