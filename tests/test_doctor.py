"""`meshformer doctor` says what is there and whether several processes train to the loss of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-m", "meshformer.cli", "doctor", *arguments], capture_output=True, text=True, env=env)


def test_it_reports_facts_and_passes_its_own_test() -> None:
    done = doctor()
    assert done.returncode == 0, done.stderr
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert {
        "processor",
        "memory",
        "GPUs",
        "bfloat16",
        "matrix rate",
        "process groups",
        "packages",
        "free disk",
        "self-test",
    } <= facts.keys()
    assert "ok: losses within" in facts["self-test"]
    assert len(done.stdout.splitlines()) == len(facts), "what the test jobs print is no part of the report"


@pytest.mark.slow
def test_a_wrong_layout_is_told(tmp_path: Path) -> None:
    """With FSDP's averaging forgotten the self-test fails: it can."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class Break(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'meshformer.job.train' and 'meshformer.parallel.strategy' not in sys.modules:\n"
        "            sys.meta_path.remove(self)\n"
        "            from meshformer.parallel.strategy import MeshStrategy\n"
        "            MeshStrategy.averaged_over = 1\n"
        "sys.meta_path.insert(0, Break())\n"
    )
    done = doctor(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'src'}")
    assert done.returncode == 1, done.stdout
    assert "WRONG" in done.stdout


def test_it_takes_no_settings() -> None:
    done = doctor("trainer.devices=2")
    assert (done.returncode, "doctor takes no settings" in done.stderr) == (2, True)
