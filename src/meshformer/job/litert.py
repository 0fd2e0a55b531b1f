"""`meshformer export format=litert`: a folder with a `.tflite` file, its tokenizer, and a script that runs it without this project.

torch writes the graph here; the environment of litert-torch, which pins other packages, reads and converts it there (on_device/convert.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.config.signature import attribute
from meshformer.data.images import PIXELS
from meshformer.huggingface.source import TOKENIZER
from meshformer.model import Attention, Transformer, VisionTransformer, attend_reference
from meshformer.record.run_folder import new_folder

SCRIPTS = Path(__file__).parent / "on_device"
LARGEST_FILE = 2**31 - 1  # bytes of a .tflite file, whose offsets have 32 bits
TOLERANCE = 1e-4  # of the largest output: more is a mistake of the conversion


class Served(nn.Module):
    """The model with named inputs and outputs, as the signature of the file has them: `tokens` (1, T) and for an encoder `mask` (1, T; 1 for tokens,
    0 for padding), both int32, or `images` (1, H, W[, colours]). Outputs: `logits`, or without a head `hidden` or `features`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        without = "features" if isinstance(model, VisionTransformer) else "hidden"
        self.output = "logits" if model.head is not None else without

    def forward(self, tokens: Tensor | None = None, mask: Tensor | None = None, images: Tensor | None = None) -> dict[str, Tensor]:
        if images is not None:
            return {self.output: self.model(images)}
        return {self.output: self.model(tokens, documents_BT=mask)}


def write_litert(model: Transformer, source: Path, target: Path, tokenizer: str | None, python: str, length: int | None) -> float:
    """Write the folder `target` whole or not at all, and return the largest difference between the file's outputs and the model's.

    `python`: the interpreter of the environment with litert-torch. `length`: T of the file; None: the model's context length. ConfigError where
    the conversion fails, or its result differs from the model.
    """
    size = sum(p.numel() for p in model.parameters()) * 4
    if size > LARGEST_FILE:
        raise ConfigError(f"a .tflite file holds at most 2 GB, and these weights have {size / 1e9:.1f} GB", "format", "litert")
    with new_folder(target) as aside:
        difference = _convert(model, aside / "model.tflite", python, length)
        _write_beside(model, source, aside, tokenizer)
    return difference


def _convert(model: Transformer, file: Path, python: str, length: int | None) -> float:
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_reference  # matrix products and softmax
    served, inputs = Served(model).eval(), example_inputs(model, length)
    with torch.no_grad():
        outputs = served(**inputs)
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        graph, data = Path(name) / "graph.pt2", Path(name) / "data.npz"
        torch.export.save(torch.export.export(served, (), inputs), graph)
        arrays = {f"in.{k}": x.numpy() for k, x in inputs.items()} | {f"out.{k}": x.numpy() for k, x in outputs.items()}
        np.savez(data, **arrays)  # pyright: ignore[reportArgumentType]  # names of arrays, none of them an option
        # -I: nothing of this environment, or of the folder the command runs in, is imported there.
        command = [python, "-I", str(SCRIPTS / "convert.py"), str(graph), str(file), str(data)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=_environment())
    lines = [line for line in done.stdout.splitlines() if line.startswith("largest difference ")]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise ConfigError(f"litert-torch could not convert the model ({said[-1].strip()[:300]})", "format", "litert", "Use format=onnx.")
    difference = float(lines[-1].rpartition(" ")[2])
    largest = max(1.0, *(float(x.abs().max()) for x in outputs.values()))
    if not difference <= TOLERANCE * largest:
        raise ConfigError(f"the converted model's outputs differ from the model's by {difference:.1e}", "format", "litert", "Use format=onnx.")
    return difference


def example_inputs(model: Transformer, length: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the file's shapes."""
    draw = torch.Generator().manual_seed(seed)
    if isinstance(model, VisionTransformer):
        colours = model.embedding.colours
        size = (1, model.image_size, model.image_size) + ((colours,) if colours > 1 else ())
        return {"images": torch.randn(size, generator=draw)}
    T = length or model.context_length
    tokens = torch.randint(model.vocab_size, (1, T), generator=draw, dtype=torch.int32)
    if model.causal:
        return {"tokens": tokens}
    return {"tokens": tokens, "mask": (torch.arange(T)[None] < max(1, T * 3 // 4)).int()}


def _write_beside(model: Transformer, source: Path, folder: Path, tokenizer: str | None) -> None:
    """The tokenizer, the names of the classes, the scale of the pixels, and run.py, where it has all that it needs."""
    images, task, names = isinstance(model, VisionTransformer), {}, None
    if (run_of(source) / "config.yaml").is_file():
        config = read_config(run_of(source))
        task = config.get("task") or {}
        names = config["data"].get("classes") or (config["data"].get("source") or {}).get("classes")
    if names and (images or attribute(str(task.get("_target_", "")), "pooled")):
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    if images and (run_of(source) / PIXELS).is_file():
        shutil.copyfile(run_of(source) / PIXELS, folder / PIXELS)
    if tokenizer is not None:
        (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    if images or tokenizer is not None:
        script = "run_images.py" if images else "run_decoder.py" if model.causal else "run_encoder.py"
        text = (SCRIPTS / script).read_text(encoding="utf-8").partition("\n")[2]  # without the line for the type checker
        if task.get("pooling") == "first":
            text = text.replace('POOLING = Path(__file__).parent, "mean"', 'POOLING = Path(__file__).parent, "first"')
        (folder / "run.py").write_text(text, encoding="utf-8")


def _environment() -> dict[str, str]:
    """This environment without what points Python at packages of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
