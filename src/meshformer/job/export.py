"""`meshformer export`: writes a model for other programs, in one process."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from meshformer.checkpoint.find import is_foreign
from meshformer.checkpoint.single_file import write_weights
from meshformer.checkpoint.weights import merge_adapters, settings_of, write_adapters
from meshformer.config.errors import ConfigError
from meshformer.data import load_tokenizer
from meshformer.huggingface import derive, load_pretrained
from meshformer.huggingface.source import TOKENIZER, tokenizer_of
from meshformer.huggingface.tensors import laid_out, save
from meshformer.huggingface.transformers_config import is_transformers
from meshformer.job.convert import convert
from meshformer.job.model_card import model_card
from meshformer.model import Attention, SpeechTransformer, Transformer, VisionTransformer, attend_reference
from meshformer.model.settings import HEAD_PARAMETERS, SECOND_NAME
from meshformer.printing import argument, say
from meshformer.record.run_folder import new_folder

Write = Callable[[Path], None]  # writes the prepared model to a path


def export(source: Path, target: Path, form: str, litert: dict[str, Any] | None = None) -> None:
    """Writes the model of `source` (a checkpoint, or foreign weights) to the path `target`, which must be free, and prints how to use it.

    `form`: adapter writes the LoRA adapters (and a new head) only; all other forms merge adapters into the weights. huggingface (a folder) and
    safetensors keep every tensor's dtype and bits; onnx and torch_export hold the graph in fp32, for any batch size and any length up to the
    context length; litert writes a folder with a .tflite file for one text of a fixed length (or one image), by the settings `litert` (`python`,
    `length`). ConfigError if the target cannot be written.
    """
    try:
        if form == "safetensors" and not is_foreign(source) and settings_of(source) is None:
            convert(source, target, "safetensors")
            return
        prepare = {
            "huggingface": _huggingface,
            "safetensors": _safetensors,
            "onnx": _onnx,
            "torch_export": _torch_export,
            "adapter": _adapter,
            "litert": partial(_litert, settings=litert or {}),
        }[form]
        write = prepare(source)  # reads and checks everything before anything is written
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"it cannot be written ({error})", "output", str(target)) from error
    say(_usage(target, form, is_transformers(derive(source)) if form in ("huggingface", "safetensors") else False))


def _weights(source: Path) -> dict[str, Tensor]:
    return merge_adapters(source)


def _adapter(source: Path) -> Write:
    return lambda target: write_adapters(source, target, trained=HEAD_PARAMETERS)


def _huggingface(source: Path) -> Write:
    model = derive(source)
    if is_transformers(model):
        from meshformer.huggingface.transformers_model import stored_form  # imports transformers

        config, tensors = stored_form(model, _weights(source))
    else:
        config, tensors = laid_out(model, _weights(source))

    def write(target: Path) -> None:
        loading = f"import transformers\n\nmodel = transformers.{_auto_class(config)}.from_pretrained({target.name!r})"
        card = model_card(source, loading)
        _write_folder(target, config, tensors, tokenizer_of(source), model.get("context_length"), card)

    return write


def _auto_class(config: dict[str, Any]) -> str:
    """The Auto class of transformers that builds the class in `architectures`."""
    architecture = next(iter(config.get("architectures") or ()), "")
    kind = re.search(r"For(\w+)$", architecture.replace("LMHeadModel", "ForCausalLM"))
    return f"AutoModelFor{kind[1]}" if kind else "AutoModel"


def _write_folder(
    target: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Path | None, length: int | None, card: str
) -> None:
    with new_folder(target) as aside:
        save(aside, config, tensors)
        (aside / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            (aside / TOKENIZER).write_text(_tokenizer(tokenizer), encoding="utf-8")
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
            (aside / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _tokenizer(file: Path) -> str:
    """Our tokenizer in the JSON format of the `tokenizers` library; a character tokenizer becomes a WordLevel model of single characters,
    and ids without a text one of numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    saved = json.loads(file.read_text(encoding="utf-8"))
    if saved.get("kind") == "ids":
        numbers = Tokenizer(models.WordLevel({str(i): i for i in range(saved["size"])}, unk_token="0"))
        numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if saved.get("mask"):
            numbers.add_special_tokens(["[MASK]"])
        return numbers.to_str()
    if saved.get("kind") != "char":
        return json.dumps(saved["model"] if "kind" in saved else saved, ensure_ascii=False)
    ours: Any = load_tokenizer(file)
    stand_in = "?" if "?" in ours.characters else ours.characters[0]  # CharTokenizer's replacement for unknown characters
    theirs = Tokenizer(models.WordLevel({character: i for i, character in enumerate(ours.characters)}, unk_token=stand_in))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    theirs.decoder = decoders.Fuse()
    if ours.mask_id is not None:
        theirs.add_special_tokens(["[MASK]"])
    return theirs.to_str()


def _safetensors(source: Path) -> Write:
    model, weights = derive(source), _weights(source)
    tied = SECOND_NAME if model.get("tie_embeddings") and model.get("head", True) else {}
    return lambda target: write_weights(target, {f"model.{name}": x for name, x in weights.items()}, tied, {"model": model})


def _torch_export(source: Path) -> Write:
    program = exported(load_pretrained(source))
    return lambda target: torch.export.save(program, target)


def _onnx(source: Path) -> Write:
    # torch's exporter warns about optional packages, such as torchvision.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(exported(load_pretrained(source)), dynamo=True, verbose=False)
    assert program is not None
    return program.save


def _litert(source: Path, settings: dict[str, Any]) -> Write:
    from meshformer.job.litert import write_litert

    model, file = load_pretrained(source), tokenizer_of(source)
    tokenizer = None if file is None or isinstance(model, VisionTransformer) else _tokenizer(file)

    def write(target: Path) -> None:
        difference = write_litert(model, source, target, tokenizer, settings["python"], settings.get("length"))
        say(f"largest difference from the model's outputs: {difference:.1e}")

    return write


def exported(model: Transformer) -> torch.export.ExportedProgram:
    """The exported graph, for any batch size and any length up to the context length. Arguments: a decoder takes tokens_BT; an encoder tokens_BT and
    documents_BT (1 for tokens, 0 for padding); a vision model images; a speech model features and documents_BT (0 for sound, -1 for padding)."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_reference  # matrix products and softmax, which every runtime supports
    batch = torch.export.Dim("batch", min=1, max=2**16)
    if isinstance(model, VisionTransformer):
        images = torch.zeros(2, model.image_size, model.image_size, model.embedding.colours)
        return torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
    if isinstance(model, SpeechTransformer):
        T = min(model.context_length, 64)
        given = torch.zeros(2, T * model.subsampling, model.mels), torch.zeros(2, T, dtype=torch.int64)
        tokens = torch.export.Dim("tokens", min=2, max=model.context_length)
        shapes = {"features": {0: batch, 1: model.subsampling * tokens}, "documents_BT": {0: batch, 1: tokens}}
        return torch.export.export(model, given[:1], {"documents_BT": given[1]}, dynamic_shapes=shapes)
    both = {0: batch, 1: torch.export.Dim("time", min=1, max=model.context_length)}
    tokens_BT = torch.ones(2, max(model.context_length - 1, 1), dtype=torch.int64)
    if model.causal:
        return torch.export.export(model, (tokens_BT,), dynamic_shapes={"tokens_BT": both})
    return torch.export.export(
        model, (tokens_BT,), {"documents_BT": tokens_BT.clone()}, dynamic_shapes={"tokens_BT": both, "documents_BT": both}
    )


def _usage(target: Path, form: str, of_transformers: bool) -> str:
    """What was written, and how to load it. `of_transformers`: its model is model=transformers."""
    files = list(target.iterdir()) if target.is_dir() else [target]
    size = sum(file.stat().st_size for file in files) / 1e6
    kind = _auto_class(json.loads((target / "config.json").read_text(encoding="utf-8"))) if form == "huggingface" else ""
    here = f"stage=finetune {argument('stage.init_from', target)}"
    uses = {
        "huggingface": f"transformers.{kind}.from_pretrained({str(target)!r}), or here: {'model=transformers ' * of_transformers}{here}",
        "safetensors": f"{'safetensors.torch.load_file' if of_transformers else 'meshformer.huggingface.load_pretrained'}({str(target)!r})",
        "adapter": f"peft.PeftModel.from_pretrained(model, {str(target)!r}), or meshformer.checkpoint.weights.load_adapters(model, …)",
        "onnx": f"onnxruntime.InferenceSession({str(target)!r})",
        "litert": f"ai_edge_litert.interpreter.Interpreter({str(target / 'model.tflite')!r}), or {target}/run.py",
        "torch_export": f"torch.export.load({str(target)!r}).module()",
    }
    return f"{target}\n  {size:.1f} MB\n  load      {uses[form]}"
