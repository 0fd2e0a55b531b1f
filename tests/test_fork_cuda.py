"""No process asks CUDA anything before it forks: CUDA once started does not survive a fork ("Cannot re-initialize CUDA in forked subprocess").

This machine may have no GPU, and this torch no CUDA: what counts is that nobody asks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import TINY, text_file

ROOT = Path(__file__).parents[1]
# In each process that Python starts with this on its path: notes who asks CUDA, once torch is there, and tells of it at the next fork.
WATCHER = """
import os, sys, traceback

TOLD, ASKED = os.environ["MESHFORMER_TOLD"], []


def watch():
    import torch

    def noting(owner, name):
        real = getattr(owner, name, None)
        if real is None:  # torch knows by these whether it was built for CUDA
            return

        def noted(*args, **kwargs):
            ASKED.append(name + " in " + " < ".join(f"{frame.name} ({frame.filename})" for frame in traceback.extract_stack()[-2:-6:-1]))
            return real(*args, **kwargs)

        setattr(owner, name, noted)

    for name in ("is_available", "device_count", "_lazy_init", "current_device", "get_device_capability"):
        noting(torch.cuda, name)
    noting(torch._C, "_cuda_getDeviceCount")
    if os.environ.get("MESHFORMER_TOUCH"):
        torch.cuda.is_available()


def tell():
    with open(TOLD, "a") as file:
        file.write("forks\\n")
        file.writelines(f"asked: {what}\\n" for what in ASKED)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "compile") and not torch.__spec__._initializing:
            sys.meta_path.remove(Finder)
            watch()


sys.meta_path.insert(0, Finder)
os.register_at_fork(before=tell)
"""


def told(folder: Path, *words: str, **environment: str) -> list[str]:
    """What the processes of `meshformer train WORDS` said when they forked."""
    (folder / "sitecustomize.py").write_text(WATCHER)
    text = text_file(folder)
    given = [
        f"data.files=[{text}]",
        f"paths.data={folder}/cache",
        f"paths.runs={folder}/runs",
        "trainer.max_steps=1",
        "~callbacks.checkpoint",
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM"))}
    path = f"{folder}{os.pathsep}{ROOT / 'src'}"
    env = clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MESHFORMER_TOLD": str(folder / "told")} | environment
    command = [sys.executable, "-m", "meshformer.cli", "train", *words, *TINY, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return (folder / "told").read_text().splitlines()


RANKS = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
COMMANDS = {
    "ranks from a fork server": (RANKS, 2),
    # The sweep's server forks two jobs, and each job its two ranks.
    "ranks of a sweep's jobs": (["-m", "hydra/launcher=local", "hydra.launcher.cores=4", "seed=1,2", *RANKS], 6),
}  # fmt: skip


SLOW = ("ranks from a fork server",)  # the sweep's jobs have such ranks


@pytest.mark.parametrize(
    ("words", "forks"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, case in COMMANDS.items()],
)
def test_nobody_asks_cuda_before_a_fork(tmp_path: Path, words: list[str], forks: int) -> None:
    found = told(tmp_path, *words)
    assert found.count("forks") >= forks
    assert not [line for line in found if line.startswith("asked")], found


def test_who_asks_is_seen(tmp_path: Path) -> None:
    assert any(line.startswith("asked: is_available") for line in told(tmp_path, *RANKS, MESHFORMER_TOUCH="1"))
