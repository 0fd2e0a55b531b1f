"""Whether `export format=litert` gives the models' own outputs, for each kind of model. `make litert` runs it."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meshformer.checkpoint.single_file import write_weights
from meshformer.command.conversion import export_source_and_target
from meshformer.data import CharTokenizer
from meshformer.huggingface.load import build, load_pretrained
from meshformer.job.export import export
from meshformer.job.litert import example_inputs
from meshformer.model import Learned, Rotary, Transformer, VisionTransformer, generate
from meshformer.model.settings import SECOND_NAME

LETTERS = "\n abcdefghijklmnopqrstuvwxyz.,?"
SIZES = {"vocab_size": len(LETTERS), "n_layers": 4, "n_heads": 4, "d_model": 128, "context_length": 48, "zero_init": False, "init_std": 0.1}
LEARNED, ROTARY = ({"_target_": f"meshformer.model.{kind.__name__}"} for kind in (Learned, Rotary))
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {**SIZES, "position": LEARNED, "norm": "layer", "bias": True, "activation": "gelu_tanh", "qk_norm": False, "tie_embeddings": True},
    "llama": {**SIZES, "position": ROTARY, "activation": "swiglu", "n_kv_heads": 2, "qk_norm": False, "tie_embeddings": False},
    "bert": {
        **SIZES, "vocab_size": len(LETTERS) + 1, "position": LEARNED, "causal": False, "norm": "layer", "norm_position": "post", "bias": True,
        "activation": "gelu", "qk_norm": False, "embedding_norm": True, "token_types": 2, "head_transform": True, "head_bias": True,
        "tie_embeddings": True,
    },
    "vit": {"image_size": 8, "patch_size": 2, "n_layers": 4, "n_heads": 4, "d_model": 128, "classes": 10, "init_std": 0.1},
}  # fmt: skip
PROMPT, TOKENS = "the rain. ", 64
CLOSE = 2e-6  # of the largest output: fp32 has 24 bits, and sums of some hundred numbers lose a few of them
TEXT = "first came the seed, then the rain. who sees a leaf fall? the wind, and the stone that waits for it. so it goes on, year by year.\n"
RUN = (
    "import sys, json, numpy as np; from ai_edge_litert.interpreter import Interpreter; m = Interpreter(sys.argv[1]); "
    "r = m.get_signature_runner('serving_default'); x = dict(np.load(sys.argv[2])); np.savez(sys.argv[3], **r(**x)); "
    "print(json.dumps(m.get_signature_list())); print(sorted(set(n.partition('.')[0] for n in sys.modules) & {'torch', 'meshformer', 'tensorflow'}))"
)


def report_litert(options: argparse.Namespace) -> None:
    """Exit with a sentence where a file's outputs differ from the model's by more than CLOSE, or its greedy tokens are others."""
    for name in MODELS:
        for line in compare(name):
            print(line)


def compare(name: str) -> Iterator[str]:
    """Export one of MODELS and run it without torch. Yields lines to print; raises SystemExit where it differs from the model."""
    kind = VisionTransformer if name == "vit" else Transformer
    node = {"_target_": f"meshformer.model.{kind.__name__}", **MODELS[name]}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "model.safetensors", Path(scratch) / "out"
        model = build({**node, "seed": 3})
        if name in ("gpt2", "llama"):
            _train(model)
        tied = SECOND_NAME if node.get("tie_embeddings") else {}
        write_weights(source, {f"model.{key}": x for key, x in model.state_dict().items()}, tied, {"model": node})
        CharTokenizer(LETTERS, mask=name == "bert").save(source.with_name("tokenizer.json"))
        asked = {"run": str(source), "format": "litert", "checkpoint": None, "output": str(target), "litert": {"python": None, "length": None}}
        asked["paths"] = {"data": scratch, "runs": scratch}
        begun = time.perf_counter()
        export(*export_source_and_target(asked), "litert", asked["litert"])
        seconds, python, model = time.perf_counter() - begun, asked["litert"]["python"], load_pretrained(source)
        file = target / "model.tflite"
        yield f"{name:<6} exported in {seconds:.0f} s, {file.stat().st_size / 1e6:.2f} MB; weights {_megabytes(model):.2f} MB"
        difference, rounding, largest, signature = _difference(python, file, model)
        yield f"  {json.dumps(signature)}"
        yield f"  outputs up to {largest:.1f}; largest difference {difference:.1e}; of the model in fp32 from itself in fp64 {rounding:.1e}"
        if not difference <= CLOSE * largest:
            raise SystemExit(f"{name}: the outputs differ by {difference:.1e}, more than {CLOSE * largest:.0e}")
        found, wanted = _script(python, target, model, name)
        yield f"  run.py: {found!r}"
        if found != wanted:
            raise SystemExit(f"{name}: run.py gives {found!r}, and the model {wanted!r}")


def _train(model: Any) -> None:
    """60 steps on one sentence, so that the likeliest tokens are not always the same one."""
    ids, draw = torch.tensor([LETTERS.index(letter) for letter in TEXT * 20]), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        starts = torch.randint(len(ids) - SIZES["context_length"] - 1, (16,), generator=draw)
        rows = ids[starts[:, None] + torch.arange(SIZES["context_length"] + 1)]
        model(rows[:, :-1], targets_BT=rows[:, 1:]).div(rows[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _difference(python: str, file: Path, model: Any) -> tuple[float, float, float, Any]:
    """Over ten random inputs: the largest difference of the file from the model, of the model from itself in fp64, the largest output; and the
    file's signatures."""
    difference, rounding, largest, said, exact = 0.0, 0.0, 0.0, "", copy.deepcopy(model).double()
    for seed in range(10):
        inputs = example_inputs(model, None, seed)
        given, got = file.with_name("in.npz"), file.with_name("out.npz")
        np.savez(given, **{key: x.numpy() for key, x in inputs.items()})  # pyright: ignore[reportArgumentType]
        said = _outside(python, ["-c", RUN, str(file), str(given), str(got)])
        (found,) = dict(np.load(got)).values()
        expected, true = (_outputs(m, inputs) for m in (model, exact))
        difference = max(difference, float(np.abs(found - expected.numpy()).max()))
        rounding = max(rounding, float((expected - true).abs().max()))
        largest = max(largest, float(true.abs().max()))
    signature, foreign = said.splitlines()[-2:]
    if foreign != "[]":
        raise SystemExit(f"it took {foreign} to run the file")
    return difference, rounding, largest, json.loads(signature)


def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    first, *mask = (x.to(next(model.parameters()).dtype) if x.is_floating_point() else x for x in inputs.values())
    return model(first, documents_BT=mask[0]) if mask else model(first)


@torch.no_grad()
def _script(python: str, target: Path, model: Any, name: str) -> tuple[str, str]:
    """What run.py prints, and what it should."""
    if name == "vit":
        image = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
        np.save(target / "image.npy", image.numpy())
        return _outside(python, [str(target / "run.py"), str(target / "image.npy")]).strip(), str(int(model(image[None]).argmax()))
    tokenizer = CharTokenizer(LETTERS, mask=name == "bert")
    ids = [int(i) for i in tokenizer.encode(PROMPT)]
    if name == "bert":
        ids[4] = ids[7] = len(LETTERS)
        wanted = model(torch.tensor([ids]))[0].argmax(dim=-1).tolist()
        filled = [wanted[i] if token == len(LETTERS) else token for i, token in enumerate(ids)]
        shown = "".join("[MASK]" if token == len(LETTERS) else LETTERS[token] for token in ids)
        return _outside(python, [str(target / "run.py"), shown]).removesuffix("\n"), "".join([*LETTERS, "[MASK]"][i] for i in filled)
    tokens = generate(model, torch.tensor([ids]), TOKENS, temperature=0)[0]
    return _outside(python, [str(target / "run.py"), PROMPT, str(TOKENS)]).removesuffix("\n"), tokenizer.decode(tokens.tolist())


def _outside(python: str, arguments: list[str]) -> str:
    return subprocess.run([python, "-I", *arguments], check=True, capture_output=True, text=True).stdout


def _megabytes(model: Any) -> float:
    return sum(p.numel() for p in model.parameters()) * 4 / 1e6
