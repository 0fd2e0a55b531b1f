"""Measure how long `load_runs` takes on 2,000 synthetic run folders, with and without its cache."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from meshformer.command.compose import compose
from meshformer.record import RunRecord, read_run

RUNS, ROWS = 2000, 80


def make_runs(folder: Path, count: int, rows: int = ROWS) -> None:
    """Create `count` run folders like those of finished runs of the default recipe, with `rows` rows of metrics and no checkpoints."""
    config = compose(["seed=12345", "optimizer.lr=0.98765", "optimizer=adamw"])
    config["run"] = None
    text = yaml.safe_dump(config, sort_keys=False)
    header = "step,epoch,samples,train/loss,train/grad_norm,train/lr,train/tokens_per_second,val/loss,train/mfu"
    record = folder / "first"
    record.mkdir(parents=True)
    writer = RunRecord(record)
    writer.start(device={"accelerator": "cpu"}, layout={**config["strategy"], "processes": 1}, parameters=601664)
    writer.finish("finished")
    fields = read_run(record)
    (record / "run.json").unlink()
    record.rmdir()
    for index in range(count):
        run = folder / f"sweep_{index // 100}" / str(index % 100)
        run.mkdir(parents=True)
        rate = 10 ** (-4 + 3 * (index % 50) / 50)
        (run / "config.yaml").write_text(text.replace("12345", str(index // 50)).replace("0.98765", f"{rate:.6f}"))
        (run / "overrides.txt").write_text(f"optimizer=adamw\noptimizer.lr={rate:.6f}\n")
        lines, loss = [header], 0.0
        for row in range(1, rows + 1):
            loss = 1.5 + 2 / math.sqrt(row) + index * 1e-5
            val = repr(loss + 0.1) if row % 20 == 0 else ""
            lines.append(
                f"{10 * row},0,{160 * row},{loss!r},0.2898598909378052,{rate * row / rows!r},9936.262249591411,{val},0.505063094984614"
            )
        (run / "metrics.csv").write_text("\n".join(lines) + "\n")
        fields["final"] = {"val/loss": loss + 0.1}
        (run / "run.json").write_text(json.dumps(fields, indent=2))


def report_runs(options: argparse.Namespace) -> None:
    """Print seconds to read 2,000 runs cold, cached and after one change, to read their metrics, and for the command with start-up."""
    from meshformer.runs import load_metrics, load_runs

    before = os.environ.get("MESHFORMER_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MESHFORMER_DATA"] = f"{scratch}/cache"
        try:
            runs = Path(scratch) / "runs"
            make_runs(runs, RUNS)

            def timed(name: str, work: Callable[[], Any]) -> Any:
                start = time.perf_counter()
                result = work()
                print(f"  {name:<46}{time.perf_counter() - start:7.2f} s")
                return result

            print(f"  {RUNS:,} run folders, {ROWS} rows each")
            timed("load_runs, cold", lambda: load_runs(runs))
            frame = timed("load_runs, cached", lambda: load_runs(runs))
            (runs / "sweep_3" / "7" / "overrides.txt").write_text("optimizer=adamw\n")
            timed("load_runs, one run changed", lambda: load_runs(runs))
            timed("load_metrics", lambda: load_metrics(frame))
            command = [sys.executable, "-m", "meshformer.cli", "runs", str(runs), "val/loss<1.72", "--sort", "val/loss", "--limit", "10"]
            timed("`meshformer runs`, cached, filtered and sorted", lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        finally:
            if before is None:
                del os.environ["MESHFORMER_DATA"]
            else:
                os.environ["MESHFORMER_DATA"] = before
