"""`meshformer convert`: a checkpoint in another format, in one process."""

from __future__ import annotations

from pathlib import Path

from meshformer.checkpoint.read import read_rest, read_tensors
from meshformer.checkpoint.single_file import tied_weights, write_single, write_weights
from meshformer.checkpoint.weights import weights_of
from meshformer.checkpoint.write import write_folder
from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.printing import say


def convert(source: Path, target: Path, to: str) -> None:
    """Writes the checkpoint `source` (a folder or a .ckpt file) to the path `target`, which must be free, and prints how to use it.

    `to`: sharded (a folder), single (one file), safetensors (the weights only). Tensors keep dtype and bits. Needs memory for the whole checkpoint.
    ConfigError if the target cannot be written.
    """
    tensors, rest = read_tensors(source), read_rest(source)
    step = rest.get("step")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if to == "sharded":
            write_folder(target, tensors, rest)
        elif to == "single":
            write_single(target, tensors, rest)
        else:
            about = {"step": step, "model": _model_settings(run_of(source))}
            tied, weights = tied_weights(tensors, rest), {f"model.{name}": x for name, x in weights_of(tensors).items()}
            write_weights(target, weights, tied, {k: v for k, v in about.items() if v is not None})
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        raise ConfigError(f"it cannot be written ({error})", "output", str(target)) from error
    say(_usage(target, to, step))


def _model_settings(run: Path) -> dict | None:
    """The `model` node of the run, or None if the run has no config.yaml: parameter names alone do not determine the model."""
    return read_config(run)["model"] if (run / "config.yaml").is_file() else None


def _usage(target: Path, to: str, step: int | None) -> str:
    files = list(target.iterdir()) if target.is_dir() else [target]
    size = sum(file.stat().st_size for file in files) / 1e6
    what = "weights" if to == "safetensors" else "weights, optimizer state and position"
    uses = {
        "safetensors": [("load", f"safetensors.torch.load_file({str(target)!r})")],
        "single": [
            ("load", f"torch.load({str(target)!r}, weights_only=True)"),
            ("in a run", "move it to checkpoints/ of the run folder; resume, evaluate, generate and finetune read it there"),
        ],
        "sharded": [("in a run", "move it to checkpoints/ of the run folder; resume, evaluate, generate and finetune read it there")],
    }
    lines = [f"{target}", f"  {what} of step {step}, {size:.1f} MB"]
    return "\n".join([*lines, *(f"  {name:<9} {how}" for name, how in uses[to])])
