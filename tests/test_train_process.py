"""What training sets up in its own process."""

import ctypes
import os
import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from meshformer.job.train import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(12):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**20) for _ in range(12)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    faults = {}
    for what in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", PAGES, what], env=clean, capture_output=True, text=True, check=True)
        faults[what] = int(done.stdout)
    assert faults["keep"] < faults["give back"] / 10, faults
