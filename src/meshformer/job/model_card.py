"""README.md of an exported folder: where the model comes from, how it was trained, what it reaches, and how to load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshformer.checkpoint.find import step_of
from meshformer.config.foreign import read_config
from meshformer.config.paths import CHECKPOINT, run_of
from meshformer.config.signature import attribute
from meshformer.record.run_json import read_run

UNKNOWN = "unknown # say it before you publish"
LAYOUT = ("replicate", "shard", "context", "tensor", "pipeline")


def model_card(source: Path, load: str) -> str:
    """The card of the checkpoint or foreign weights `source`, as Markdown with the hub's YAML fields. `load`: how to load the folder in Python."""
    run = run_of(source)
    if not (run / "config.yaml").is_file():
        return _page({"license": UNKNOWN}, "Exported weights", [("Origin", f"`{source}`, which belongs to no run of meshformer."), _loading(load)])
    config = read_config(run)
    try:
        record = read_run(run)
    except (OSError, ValueError):
        record = {}
    task = str(config["task"].get("_target_", "")).rpartition(".")[2]
    start = config["stage"].get("init_from")
    fields: dict[str, str] = {"license": UNKNOWN, "library_name": "transformers", "tags": "[meshformer]"}
    if (tag := attribute(str(config["task"].get("_target_", "")), "hub_tag")) is not None:
        fields["pipeline_tag"] = tag
    if start:
        fields["base_model"] = json.dumps(Path(str(start)).name)
    sections = [
        ("Training", _table(_training(source, config, record))),
        ("Results", _results(record, config)),
        ("Command", f"```bash\n{_command(run)}\n```\n\nThe environment: {_versions(record)}."),
        _loading(load),
    ]
    title = f"{config['experiment']}: {_kind(config)}"
    return _page(fields, title, [("What it is", _what(task, config, record, start)), ("Licence", _licence(start)), *sections])


def _what(task: str, config: Mapping[str, Any], record: Mapping[str, Any], start: Any) -> str:
    size = f" with {record['parameters']:,} parameters" if isinstance(record.get("parameters"), int) else ""
    origin = f", fine-tuned from `{start}`" if start else ", trained from scratch"
    return f"A {_kind(config)} model{size}{origin} for {task or 'a task of the user’s'}."


def _kind(config: Mapping[str, Any]) -> str:
    model = config["model"]
    return (model.get("config") or {}).get("model_type") or str(model["_target_"]).rpartition(".")[2]


def _licence(start: Any) -> str:
    base = f", and so may that of the weights it started from (`{start}`)" if start else ""
    return f"Not stated. The licence of the training data may bind this model{base}. Fill in `license` above before you publish it."


def _training(source: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    data, trainer, layout = config["data"], config["trainer"], record.get("layout") or {}
    text = data.get("files") or data.get("file") or str(data["source"].get("_target_", "")).rpartition(".")[2]
    degrees = " × ".join(f"{axis} {layout[axis]}" for axis in LAYOUT if layout.get(axis, 1) > 1)
    steps = step_of(source) if CHECKPOINT.fullmatch(source.name) else "unknown"
    device = record.get("device") or {}
    return {
        "data": ", ".join(Path(str(file)).name for file in text) if isinstance(text, list) else str(text),
        "tokenizer": str(data["tokenizer"]),
        "steps": f"{steps}, each of {data['batch_size']} samples of up to {data['context_length']} tokens",
        "optimizer": str(config["optimizer"].get("_target_", "")).rpartition(".")[2],
        "learning rate": str(config["optimizer"].get("lr")),
        "precision": str(trainer["precision"]),
        "layout": f"{layout.get('name', config['strategy']['name'])}, processes: {layout.get('processes', 1)}" + (f" ({degrees})" if degrees else ""),
        "device": str(device.get("accelerator", "unknown")),
        "seed": str(config["seed"]),
        "adapters": str((config["stage"].get("lora") or {}).get("rank") or "none"),
    }


def _results(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    final = {name: value for name, value in (record.get("final") or {}).items() if name.startswith(("val/", "test/"))}
    if not final:
        return "The run recorded none."
    shown = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in final.items()}
    return _table(shown, ("metric", "last value of the run"))


def _command(run: Path) -> str:
    file = run / "overrides.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    last = {line.partition("=")[0]: line for line in lines if line.strip()}  # a resumed run repeats settings; the last one counts
    return " \\\n  ".join(["meshformer train", *map(shlex.quote, last.values())])


def _versions(record: Mapping[str, Any]) -> str:
    versions, git = record.get("versions") or {}, record.get("git") or {}
    named = [f"{name} {versions[name]}" for name in ("meshformer", "torch", "lightning") if name in versions]
    if git.get("commit"):
        named.append(f"commit {str(git['commit'])[:12]}" + (" with changes" if git.get("dirty") else ""))
    return ", ".join(named) or "not recorded"


def _loading(load: str) -> tuple[str, str]:
    return "Loading", f"```python\n{load}\n```"


def _table(rows: Mapping[str, str], head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _page(fields: Mapping[str, str], title: str, sections: list[tuple[str, str]]) -> str:
    front = "\n".join(["---", *(f"{name}: {value}" for name, value in fields.items()), "---"])
    return "\n\n".join([front, f"# {title}", *(f"## {name}\n\n{text}" for name, text in sections)]) + "\n"


