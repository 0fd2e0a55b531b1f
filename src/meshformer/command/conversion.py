"""Find the file or folder that `meshformer convert` and `export` read, and the one they write. Without torch, so that mistakes show at once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

from meshformer.checkpoint.find import MANIFEST, PARTS, SINGLE, WEIGHTS, candidates, damage, latest_checkpoint, step_of
from meshformer.command import compose
from meshformer.config import ConfigError, did_you_mean
from meshformer.config.paths import run_of
from meshformer.config.signature import attribute
from meshformer.data.tfrecord import check_installed
from meshformer.huggingface.check import layout_for
from meshformer.huggingface.source import derive
from meshformer.huggingface.transformers_config import is_transformers

SUFFIX = {"sharded": "", "single": SINGLE, "safetensors": WEIGHTS}
EXPORTED = {"huggingface": "", "safetensors": WEIGHTS, "adapter": "", "onnx": ".onnx", "torch_export": ".pt2", "litert": ""}
TFLITE = ".tflite"


def source_and_target(options: dict[str, Any]) -> tuple[Path, Path]:
    """Return (checkpoint to read, path to write) for the options of `meshformer convert`. Raises ConfigError if either is unusable."""
    source = _source(options["run"], options["checkpoint"], options["paths"]["runs"])
    if source.suffix == WEIGHTS:
        raise ConfigError(
            "it holds weights alone, and a checkpoint also holds the optimizer's state and the position in the data",
            "run",
            options["run"],
            fix="Name the run, checkpoint folder or .ckpt file that it was made from.",
        )
    return source, _target(source, SUFFIX[options["to"]], f"to={options['to']}", options["output"])


def run_and_target(options: dict[str, Any]) -> tuple[Path, Path]:
    """Return (run whose data is written, folder to write) for `meshformer convert to=tfrecord`. Raises ConfigError if either is unusable."""
    check_installed("to")
    if options["checkpoint"] is not None:
        raise ConfigError("to=tfrecord writes the run's data, not its weights", "checkpoint", options["checkpoint"], fix="Leave it out.")
    run = run_of(compose.locate_weights(options["run"], options["paths"]["runs"], "run"))
    return run, _target(run, "", "to=tfrecord", options["output"] or str(run / "exports" / "tfrecord"))


def export_source_and_target(options: dict[str, Any]) -> tuple[Path, Path]:
    """Return (run, checkpoint or foreign weights to read; path to write) for the options of `meshformer export`.

    Raises ConfigError if either is unusable.
    """
    form, spec = options["format"], options["run"]
    source = compose.locate_foreign(spec, options["paths"]["data"])
    if source is None:
        source = _source(spec, options["checkpoint"], options["paths"]["runs"])
    elif options["checkpoint"] is not None:
        raise ConfigError("run= names weights that have no steps", "checkpoint", options["checkpoint"], fix="Leave it out.")
    try:
        model = derive(source)
        if form == "huggingface" and not is_transformers(model):
            layout_for(model, lambda: _weight_names(source))
    except ConfigError as error:
        raise ConfigError(error.message, error.key or "run", error.value, error.fix) from None
    if options["output"] is None and run_of(source) == source:
        raise ConfigError("is needed, because these weights belong to no run folder", "output", fix=f"Add output=NAME{EXPORTED[form]}.")
    for package in ("onnx", "onnxscript") if form == "onnx" else ():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"it takes the package {package}", "format", form, fix="Run `pip install 'meshformer[export]'`.")
    if form == "litert":
        options["litert"] = _litert(model, options["litert"])
    output = options["output"] or (run_of(source) / "exports" / f"{source.name.removesuffix(SINGLE)}{EXPORTED[form] or f'-{form}'}")
    return source, _target(source, EXPORTED[form], f"format={form}", str(output))


def _litert(model: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of format=litert with the interpreter's path. ConfigError where it, a package there, or the length is of no use."""
    if attribute(str(model["_target_"]), "reads") == "speech":
        raise ConfigError("is for models of text and images; this one reads speech", "format", "litert", fix="Use format=onnx.")
    length, longest = settings["length"], model.get("context_length")
    if length is not None and isinstance(longest, int) and length > longest:
        raise ConfigError(f"the model sees {longest} tokens", "litert.length", length, fix=f"Use {longest} at most.")
    # Not below the current folder, which may be anyone's.
    python = Path(settings["python"] or Path(__file__).parents[3] / ".venv-litert" / "bin" / "python").expanduser().absolute()
    fix = "Make it in a checkout with `make litert`, or name another: litert.python=…."
    if not os.access(python, os.X_OK) or python.is_dir():
        message = "litert-torch pins other packages, so it needs an environment of its own, and there is no Python at that place"
        raise ConfigError(message, "litert.python", str(python), fix=fix)
    ask = "from importlib.metadata import version as v; print(v('torch'), v('litert-torch'), v('ai-edge-litert'))"
    try:
        told = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"it does not run ({error})", "litert.python", str(python), fix=fix) from error
    if told.returncode:
        message = "it has no torch, litert-torch and ai-edge-litert"
        raise ConfigError(message, "litert.python", str(python), fix=fix)
    theirs, ours = told.stdout.split()[0].partition("+")[0], importlib.metadata.version("torch").partition("+")[0]
    if theirs != ours:
        message = f"it has torch {theirs}, which may not read the graph that torch {ours} writes"
        raise ConfigError(message, "litert.python", str(python), fix=fix)
    return {**settings, "python": str(python)}


def _weight_names(source: Path) -> list[str]:
    from meshformer.checkpoint.weights import weight_names  # imports torch

    return weight_names(source)


def _source(spec: str, checkpoint: int | str | None, runs: str) -> Path:
    path = Path(spec).expanduser().absolute()
    is_file = path.suffix in (SINGLE, WEIGHTS)
    if is_file and not path.is_file():
        raise ConfigError("there is no such file", "run", spec)
    named = is_file or any((path / part).is_file() for part in (MANIFEST, *PARTS))
    if not named:
        path = compose.locate_weights(spec, runs, "run")
        named = run_of(path) != path
    found = candidates(path)
    if named:
        if checkpoint is not None:
            raise ConfigError("run= names a checkpoint already", "checkpoint", checkpoint, fix="Leave it out.")
        return _whole(path, "run")
    if not found:
        raise ConfigError(f"there is no checkpoint in {path} to read", "run", spec)
    if checkpoint is None:
        return latest_checkpoint(path)
    chosen = [one for one in found if checkpoint in (step_of(one), one.name)]
    if not chosen:
        raise ConfigError(
            "the run has no such checkpoint",
            "checkpoint",
            checkpoint,
            fix=did_you_mean(str(checkpoint), [str(step_of(one)) for one in found]),
        )
    return _whole(chosen[-1], "checkpoint")


def _whole(checkpoint: Path, key: str) -> Path:
    problem = damage(checkpoint) if checkpoint.suffix != WEIGHTS else None
    if problem is not None:
        raise ConfigError(f"the checkpoint is damaged: {problem}", key, str(checkpoint), fix="Name another.")
    return checkpoint


def _target(source: Path, suffix: str, what: str, output: str | None) -> Path:
    if output is None:
        folder = run_of(source) / "exports" if run_of(source) != source else source.parent
        target = folder / (source.name.removesuffix(SINGLE) + suffix)
    else:
        target = Path(output).expanduser().absolute()
        if (target.suffix if target.suffix in {*SUFFIX.values(), *EXPORTED.values(), TFLITE} else "") != suffix:
            named = f"ends in {suffix}" if suffix else "is a folder, so it has no such ending"
            raise ConfigError(f"what {what} writes {named}", "output", output, fix=f"Use output={target.with_suffix(suffix)}.")
    if target.exists():
        raise ConfigError("it is there already", "output", str(target), fix="Name another with output=…, or remove it.")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file", "output", str(target))
    return target
