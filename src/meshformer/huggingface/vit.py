"""ViT (Dosovitskiy et al. 2021) for square images: pre-norm, a class token, learned positions, patches by a convolution.

Our model returns logits if the folder has a classifier, else the last hidden state of the class token. The pooler is not loaded.
"""

from __future__ import annotations

import re
from typing import Any

from meshformer.config.errors import ConfigError

from .parts import GELU_NAMES, GELUS, LEARNED, VISION, Model, Part, differences, expect, linear, norm, position, size

NAME, TYPES, CLASS = "ViT", ("vit",), VISION
LEFT_OUT = re.compile(r"pooler\..*|embeddings\.mask_token|decoder\..*")  # the last two: of pretraining by masked patches
TIED: dict[str, str] = {}


def canonical(name: str) -> str:
    return name.removeprefix("vit.")


def stored_name(name: str, model: Model) -> str:
    return name if model["classes"] is None or name.startswith("classifier.") else f"vit.{name}"


def settings(config: dict[str, Any], names: set[str]) -> Model:
    expect(config, "qkv_bias", True)
    image, patch = size(config, "image_size"), size(config, "patch_size")
    if image % patch:
        raise ConfigError(f"config.json has image_size={image}, which does not divide by patch_size={patch}")
    classes = None
    if "classifier.weight" in names:
        classes = config.get("num_labels") or len(config.get("id2label") or (0, 1))
    return {
        "_target_": VISION,
        "image_size": image,
        "patch_size": patch,
        "colours": config.get("num_channels", 3),
        "classes": classes,
        "pooling": "cls",
        "n_layers": size(config, "num_hidden_layers"),
        "n_heads": size(config, "num_attention_heads"),
        "d_model": size(config, "hidden_size"),
        "d_ff": size(config, "intermediate_size"),
        "position": position(LEARNED),
        "norm": "layer",
        "norm_eps": float(config.get("layer_norm_eps", 1e-12)),
        "activation": GELUS[expect(config, "hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")],
        "bias": True,
        "qk_norm": False,
    }


def parts(model: Model) -> dict[str, Part]:
    width, patch, colours = model["d_model"], model["patch_size"], model["colours"]
    tokens = (model["image_size"] // patch) ** 2 + 1
    found = {
        "embedding.class_token": Part("embeddings.cls_token", stored=(1, 1, width), ours=(1, width)),
        "embedding.patches.weight": Part(
            "embeddings.patch_embeddings.projection.weight",
            stored=(width, colours, patch, patch),
            ours=(width, colours * patch**2),
        ),
        "embedding.patches.bias": Part("embeddings.patch_embeddings.projection.bias"),
        "position.table.weight": Part("embeddings.position_embeddings", stored=(1, tokens, width), ours=(tokens, width)),
    }
    for i in range(model["n_layers"]):
        block, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        found |= norm(f"{block}.attention_norm", f"{theirs}.layernorm_before")
        for ours, name in zip("qkv", ("query", "key", "value"), strict=True):
            found |= linear(f"{block}.attention.{ours}", f"{theirs}.attention.attention.{name}")
        found |= linear(f"{block}.attention.o", f"{theirs}.attention.output.dense")
        found |= norm(f"{block}.mlp_norm", f"{theirs}.layernorm_after")
        found |= linear(f"{block}.mlp.up", f"{theirs}.intermediate.dense")
        found |= linear(f"{block}.mlp.down", f"{theirs}.output.dense")
    found |= norm("norm", "layernorm")
    return found if model["classes"] is None else found | linear("head", "classifier")


def unfit(model: Model) -> Model:
    required = {
        "position": LEARNED, "norm": "layer", "bias": True, "qk_norm": False, "activation": ("gelu", "gelu_tanh"),
        "pooling": "cls",
    }  # fmt: skip
    return differences(model, required)


def config(model: Model) -> dict[str, Any]:
    classes = model["classes"]
    about = {
        "architectures": ["ViTModel" if classes is None else "ViTForImageClassification"],
        "model_type": "vit",
        "image_size": model["image_size"],
        "patch_size": model["patch_size"],
        "num_channels": model["colours"],
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": model["n_heads"],
        "hidden_size": model["d_model"],
        "intermediate_size": model["d_ff"],
        "hidden_act": GELU_NAMES[model["activation"]],
        "layer_norm_eps": model["norm_eps"],
        "hidden_dropout_prob": model["dropout"],
        "attention_probs_dropout_prob": model["dropout"],
        "qkv_bias": True,
    }
    labels = {str(i): f"LABEL_{i}" for i in range(classes or 0)}
    return about | ({"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}} if labels else {})
