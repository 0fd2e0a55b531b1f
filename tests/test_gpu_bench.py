"""`python -m meshformer.bench gpu` at toy sizes on the CPU, so that the command still runs when a GPU is there."""

import json
import subprocess
import sys

import pytest

from meshformer.bench.gpu import Bench

SHORT = ("kernels", "waiting", "speed", "long", "saving")
LONG = ("right", "resume", "bf16", "vocabulary")  # whole runs, minutes of them


@pytest.mark.parametrize("parts", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_the_command_runs_every_part_that_it_was_asked_for(parts, tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "meshformer.bench", "gpu", "--device", "cpu", "--tiny", "--json", str(out), "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    result = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert result["errors"] == {} and set(result["seconds"]) == set(parts)
    assert all(row["passed"] is not False for row in result["rows"])
    assert {row["part"] for row in result["rows"]} == set(parts) - {"waiting", "vocabulary"}  # their figures need CUDA


@pytest.mark.parametrize("value, passed", [(0.5, True), (1.5, False), (float("nan"), False)])
def test_a_gate_fails_above_its_limit_and_on_nan(tmp_path, value, passed):
    bench = Bench("cpu", True, 1, tmp_path, None)
    bench.add("right", "something", value, "relative", at_most=1.0)
    assert bench.rows[0].passed is passed


def test_a_part_that_fails_does_not_stop_the_next_and_is_saved(tmp_path):
    out = tmp_path / "gpu.json"
    bench = Bench("cpu", True, 1, tmp_path, out)
    bench.run("first", lambda bench: 1 / 0)
    bench.run("second", lambda bench: bench.add("second", "figure", 1.0, "s"))
    saved = json.loads(out.read_text())
    assert "ZeroDivisionError" in saved["errors"]["first"] and [row["part"] for row in saved["rows"]] == ["second"]
