"""What training sets up in its own process."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

KEPT = """
import ctypes, json, sys
from meshformer.importing import heavy_imports
with heavy_imports():
    import torch
    from meshformer.job.train import keep_freed_memory


class MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


allocator = ctypes.CDLL(None).mallinfo2
allocator.restype = MallocInfo
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(4):
    held = [torch.ones(2**20) for _ in range(12)]
    mapped = allocator().hblkhd
    del held
print(json.dumps({"mapped while held": mapped, "free for the next step": allocator().fordblks}))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is of glibc 2.33")
def test_freed_memory_is_kept_for_the_next_step():
    """The C library's own account is read: some sandboxes do not count the page faults of a process."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    seen = {}
    for what in ("keep", "give back"):
        # glibc's first threshold, which it else moves by what was freed before: then the place of a small allocation decides what it gives back.
        fixed = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)} if what == "give back" else {}
        done = subprocess.run([sys.executable, "-c", KEPT, what], env={**clean, **fixed}, capture_output=True, text=True, check=True)
        seen[what] = json.loads(done.stdout)
    tensors = 12 * 4 * 2**20
    assert seen["keep"]["free for the next step"] >= tensors, seen
    assert seen["keep"]["mapped while held"] < tensors / 4, seen
    # The default of the C library, which shows that the account sees the difference.
    assert seen["give back"]["free for the next step"] < tensors / 2, seen
