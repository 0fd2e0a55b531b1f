"""Run folders written by hand: what training leaves, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_run(folder: Path, rows: list[str] | None = None, overrides: str = "", state: str = "finished", **config: Any) -> Path:
    """`config`: seed, lr, model, position, strategy, … of a small configuration; `rows` of step, samples, rate, training and validation loss."""
    folder.mkdir(parents=True)
    lr, strategy, layers = config.get("lr", 0.1), config.get("strategy", "single"), config.get("layers", 3)
    whole = {
        "seed": config.get("seed", 1),
        "experiment": "shakespeare_char",
        "paths": {"runs": str(folder.parent)},
        "data": {"context_length": 10, "batch_size": 2, "source": {"_target_": "meshformer.data.Shakespeare"}},
        "model": {
            "_target_": "meshformer.model.Transformer",
            "n_layers": layers,
            "position": {"_target_": config.get("position", "meshformer.model.position.Rotary")},
        },
        "optimizer": {"_target_": "meshformer.optim.muon", "lr": lr},
        "strategy": {"name": strategy},
        "stage": {"name": "pretrain"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / "overrides.txt").write_text(overrides)
    processes = 1 if strategy == "single" else 2
    record = {
        "state": state,
        "started": "2026-11-24T10:00:00+00:00",
        "ended": "2026-11-24T10:01:30+00:00",
        "git": {"commit": "c0ffee" * 6, "dirty": False},
        "device": {"accelerator": "cpu"},
        "layout": {"name": strategy, "replicate": processes, "processes": processes},
        "parameters": 1000,
        "final": {},
        "error": None,
        "segments": [{"started": "2026-11-24T09:00:00+00:00", "ended": "2026-11-24T09:00:30+00:00"}],
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = rows if rows is not None else ["1,2,10,3.0,", "2,4,20,2.0,2.5", "3,6,20,1.0,2.75"]
    (folder / "metrics.csv").write_text(
        "step,samples,train/tokens_per_second,train/loss,val/loss\n" + "".join(f"{line}\n" for line in lines)
    )
    return folder
