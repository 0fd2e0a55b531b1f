"""Folders that look like a model of transformers, and are something else: say what, and what to do."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from meshformer.config.errors import ConfigError
from meshformer.huggingface.source import derive

LLAMA = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "embed_tokens": (8, 4), "norm": (4,), "layers.0.input_layernorm": (4,), "layers.0.post_attention_layernorm": (4,),
    "layers.0.self_attn.q_proj": (4, 4), "layers.0.self_attn.k_proj": (2, 4), "layers.0.self_attn.v_proj": (2, 4),
    "layers.0.self_attn.o_proj": (4, 4), "layers.0.mlp.gate_proj": (8, 4), "layers.0.mlp.up_proj": (8, 4), "layers.0.mlp.down_proj": (4, 8),
}  # fmt: skip


def folder(path, shapes=None, **changes):
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    tensors = {f"model.{name}.weight": np.zeros(shape, np.float32) for name, shape in {**SHAPES, **(shapes or {})}.items()}
    save_file(tensors, path / "model.safetensors")
    return path


def test_the_plain_folder_is_read(tmp_path):
    assert derive(folder(tmp_path))["vocab_size"] == 8


def test_quantised_weights_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"quantised weights \(bitsandbytes\).*dequantize"):
        derive(folder(tmp_path, quantization_config={"quant_method": "bitsandbytes"}))


def test_a_vocabulary_resized_without_its_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has 10 rows, and its config\.json says vocab_size=8.*write vocab_size=10"):
        derive(folder(tmp_path, {"embed_tokens": (10, 4)}))


def test_an_adapter_is_named_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"holds an adapter.*\(some/model\).*merge_and_unload"):
        derive(tmp_path)
