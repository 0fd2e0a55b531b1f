"""Weights from outside: folders that transformers writes, the two models that come as packages, and what is wrong with a source."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from meshformer.config.errors import ConfigError
from meshformer.huggingface import derive, load_pretrained, pinned
from meshformer.huggingface.tensors import foreign_tensors, write_folder

NO_END: Any = dict(bos_token_id=None, eos_token_id=None)
SMALL: Any = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=24
)
# name: (model class, configuration class, its options)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4, **NO_END)),
    "gpt2, untied, exact gelu": (
        "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=50, n_positions=20, n_embd=24, n_layer=3, n_head=3, n_inner=40, activation_function="gelu", layer_norm_epsilon=1e-3,
             tie_word_embeddings=False, **NO_END),
    ),
    "llama, grouped queries": ("LlamaForCausalLM", "LlamaConfig", dict(**SMALL, num_key_value_heads=2, rms_norm_eps=1e-5)),
    "llama, tied, one key head, head size, attention bias, theta": (
        "LlamaForCausalLM", "LlamaConfig",
        dict(**SMALL, num_key_value_heads=1, head_dim=12, attention_bias=True, tie_word_embeddings=True,
             rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    ),
    "llama, mlp bias": ("LlamaForCausalLM", "LlamaConfig", dict(**SMALL, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(**SMALL, num_key_value_heads=2, sliding_window=5, head_dim=None)),
    "bert with its masked-word predictor": ("BertForMaskedLM", "BertConfig", dict(SMALL)),
    "bert": ("BertModel", "BertConfig", dict(**SMALL, hidden_act="gelu_new", type_vocab_size=3, layer_norm_eps=1e-4)),
    "vit with classes": (
        "ViTForImageClassification", "ViTConfig",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=12, patch_size=4, num_labels=5),
    ),
    "vit": (
        "ViTModel", "ViTConfig",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2, num_channels=1),
    ),
}  # fmt: skip
Folders = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """name -> (a transformers model with random weights, the folder it was saved to)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            kind, config, options = MODELS[name]
            torch.manual_seed(list(MODELS).index(name))
            model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
            with torch.no_grad():  # biases and gains as well: zeros and ones would hide what is exchanged
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.2)
            folder = tmp_path_factory.mktemp("hf")
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@torch.no_grad()
def outputs(theirs: Any, ours: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both, for the same random input, at the places that are no padding."""
    config, draw = theirs.config, torch.Generator().manual_seed(0)
    if config.model_type == "vit":
        images = torch.randn(3, config.num_channels, config.image_size, config.image_size, generator=draw)
        found = theirs(images)
        return found.logits if "logits" in found else found.last_hidden_state[:, 0], ours(images.permute(0, 2, 3, 1))
    tokens = torch.randint(config.vocab_size, (3, 18), generator=draw)
    mask = torch.ones_like(tokens)
    if config.model_type == "bert":
        mask[0, 11:] = 0
        types = torch.randint(config.type_vocab_size, tokens.shape, generator=draw)
        found = theirs(input_ids=tokens, attention_mask=mask, token_type_ids=types)
        mine = ours(tokens, documents_BT=mask, token_types_BT=types)
    else:
        found, mine = theirs(input_ids=tokens), ours(tokens)
    expected = found.logits if "logits" in found else found.last_hidden_state
    return expected[mask.bool()], mine[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_transformers_gives_the_same_outputs_and_goes_back_bit_for_bit(name: str, folders: Folders, tmp_path: Path) -> None:
    theirs, folder = folders(name)
    ours = load_pretrained(folder)
    expected, mine = outputs(theirs, ours)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.2, "outputs that differ from each other"

    write_folder(tmp_path, derive(folder), ours.state_dict())
    again = type(theirs).from_pretrained(tmp_path).eval()
    returned = again.state_dict()
    lost = [k for k, x in theirs.state_dict().items() if not torch.equal(returned[k], x)]
    assert all("pooler" in k for k in lost), lost
    torch.testing.assert_close(outputs(again, ours)[0], expected, atol=0, rtol=0)
    before, after = (safetensors.torch.load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert {k for k in before if "pooler" not in k} == after.keys()


def test_shards_half_precision_and_names_without_a_prefix_are_read(folders: Folders, tmp_path: Path) -> None:
    theirs, _ = folders("llama, grouped queries")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    torch.testing.assert_close(*outputs(theirs, load_pretrained(tmp_path / "shards")), atol=1e-4, rtol=0)

    folder = copy_of(folders("bert with its masked-word predictor")[1], tmp_path / "old")
    old = safetensors.torch.load_file(folder / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x.half() for k, x in old.items()}
    safetensors.torch.save_file(old, folder / "model.safetensors")
    assert next(load_pretrained(folder, dtype=torch.float16).parameters()).dtype == torch.float16
    torch.testing.assert_close(*outputs(folders("bert with its masked-word predictor")[0], load_pretrained(folder)), atol=2e-2, rtol=0)

    folder = copy_of(folders("gpt2")[1], tmp_path / "bare")  # as the hub's own gpt2 is stored
    bare = {k.removeprefix("transformer."): x for k, x in safetensors.torch.load_file(folder / "model.safetensors").items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    safetensors.torch.save_file(bare, folder / "model.safetensors")
    torch.testing.assert_close(*outputs(folders("gpt2")[0], load_pretrained(folder)), atol=1e-4, rtol=0)


def test_the_version_4_way_to_write_theta_is_read(folders: Folders, tmp_path: Path) -> None:
    theirs, folder = folders("llama, tied, one key head, head size, attention bias, theta")
    folder = edited(copy_of(folder, tmp_path / "old"), rope_parameters=None, rope_theta=500.0, rope_scaling=None)
    torch.testing.assert_close(*outputs(theirs, load_pretrained(folder)), atol=1e-4, rtol=0)


# --- the two models that travel in packages


def test_the_decoder_matches_its_own_package() -> None:
    model, folder = load_pretrained("glassllm"), pinned.folder("glassllm")
    wheel = folder.parents[1] / "carriers" / pinned.MODELS["glassllm"].packages[0].filename
    text = "Alice was beginning to get very tired.\n\n“What,” thought  Alice: {42}!"
    script = (
        "import sys, json, numpy as np; sys.path.insert(0, sys.argv[1]); import glassllm; m, t = glassllm.load_pretrained('en'); "
        "x = np.random.default_rng(0).integers(0, 1024, (2, 128)); np.save(sys.argv[2], m(x).data); print(json.dumps(t.encode(sys.argv[3])))"
    )
    saved = folder.parent / f"logits-{os.getpid()}.npy"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(wheel), str(saved), text], capture_output=True, text=True, check=True, timeout=60
        )
        expected = np.load(saved)
    finally:
        saved.unlink(missing_ok=True)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1024, (2, 128)))
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens).numpy(), expected, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in model.parameters()) == 852_608

    from meshformer.data import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode(text)
    assert ids.tolist() == json.loads(done.stdout)
    assert tokenizer.decode(ids) == text


def test_minilm_gives_the_published_similarities() -> None:
    from tokenizers import Tokenizer

    model = load_pretrained("all-minilm-l6-v2")
    tokenizer = Tokenizer.from_file(str(pinned.folder("all-minilm-l6-v2") / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()  # to the longest: the others' padding must change nothing
    texts = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
        "and one that is longer than all of these others",
    ]
    encoded = tokenizer.encode_batch(texts)
    tokens, mask = torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
    with torch.no_grad():
        hidden = model(tokens, documents_BT=mask)
    assert hidden.shape == (4, tokens.shape[1], 384), "no language-model head: hidden states"
    means = torch.nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    assert (means[0] @ means[1]).item() == pytest.approx(0.666, abs=1e-3)
    assert (means[0] @ means[2]).item() == pytest.approx(0.105, abs=1e-3)


# --- what is wrong with a source: one message each


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def damaged(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def emptied(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another architecture": (
        lambda f: edited(f, model_type="t5"),
        r"is of the architecture 't5'. These are read: GPT-2 \(gpt2\); Llama \(llama, mistral\); BERT \(bert\); ViT \(vit\)",
    ),
    "no config": (lambda f: emptied(f, "config.json"), "holds no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{") and f, "config.json is damaged"),
    "config without a size": (lambda f: edited(f, n_layer=None), "config.json lacks n_layer"),
    "no weights": (lambda f: emptied(f, "model.safetensors"), "holds no model.safetensors"),
    "header cut off": (lambda f: damaged(f, (f / "model.safetensors").read_bytes()[:100]), "model.safetensors is damaged"),
    "header of nonsense": (lambda f: damaged(f, struct.pack("<Q", 8) + b"{{{{{{{{"), "model.safetensors is damaged"),
    "file cut off": (lambda f: damaged(f, (f / "model.safetensors").read_bytes()[:-4]), "model.safetensors is damaged"),
    "empty file": (lambda f: damaged(f, b""), "model.safetensors is damaged"),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin") and f,
        r"pytorch_model.bin, a pickle .* safe_serialization=True",
    ),
    "a tensor is missing": (
        lambda f: weights(f, lambda x: (x.pop("transformer.h.1.mlp.c_fc.bias"), x.pop("transformer.ln_f.weight"))),
        "lacks transformer.h.1.mlp.c_fc.bias, transformer.ln_f.weight, which a GPT-2 of its config.json has",
    ),
    "misfits": (
        lambda f: weights(f, lambda x: x.update({"extra.weight": torch.ones(2), "transformer.wpe.weight": torch.ones(7, 32)})),
        r"do not fit this model: extra.weight: unknown to the model; position.table.weight: \(7, 32\) in the checkpoint, \(24, 32\) in the model",
    ),
    "an option that is not read": (lambda f: edited(f, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    "an activation that is not read": (lambda f: edited(f, activation_function="relu"), "activation_function='relu'"),
    "a shard is missing": (
        lambda f: (
            (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
            )
            and f
        ),
        "lacks model-00001-of-00002.safetensors, model-00002-of-00002.safetensors of the 2 files",
    ),
    "no index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors") and f,
        "lacks model.safetensors.index.json, which belongs to model-00001-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_message(name: str, folders: Folders, tmp_path: Path) -> None:
    break_it, message = BAD[name]
    folder = break_it(copy_of(folders("gpt2")[1], tmp_path / "bad"))
    with pytest.raises(ConfigError, match=message) as caught:
        load_pretrained(folder)
    assert "bad" in str(caught.value) and "\n" not in str(caught.value)


def test_rope_scaling_is_refused_by_name(folders: Folders, tmp_path: Path) -> None:
    folder = copy_of(folders("llama, grouped queries")[1], tmp_path / "scaled")
    for changes in (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "llama3"}},
    ):
        with pytest.raises(ConfigError, match="rope scaling of type 'llama3'"):
            load_pretrained(edited(folder, **changes))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", "transformer.h.0.attn.gate_head.weight"), ("gpt2", "lm_head.bias"), ("gpt2", "transformer.h.0.crossattention.attn.bias"),
        ("llama, grouped queries", "model.layers.0.self_attn.gate.weight"), ("llama, grouped queries", "model.layers.0.self_attn.q_proj.bias"),
        ("bert", "encoder.layer.0.attention.self.gate.weight"), ("vit", "encoder.layer.0.attention.pooler.weight"),
    ],
)  # fmt: skip
def test_a_tensor_without_a_place_is_refused_by_name(name: str, extra: str, folders: Folders, tmp_path: Path) -> None:
    folder = weights(copy_of(folders(name)[1], tmp_path / "more"), lambda x: x.update({extra: torch.ones(2)}))
    with pytest.raises(ConfigError, match=f"{extra}: unknown to the model"):
        load_pretrained(folder)


def test_buffers_and_heads_of_other_tasks_are_left_behind(folders: Folders, tmp_path: Path) -> None:
    for name, spare in {
        "gpt2": ["transformer.h.1.attn.masked_bias", "multiple_choice_head.summary.weight", "score.weight"],
        "llama, grouped queries": ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "qa_outputs.bias"],
        "bert": ["embeddings.position_ids", "cls.seq_relationship.weight", "classifier.bias"],
        "vit": ["pooler.dense.weight", "embeddings.mask_token"],
    }.items():
        folder = copy_of(folders(name)[1], tmp_path / name)
        weights(folder, lambda x, spare=spare: x.update({key: torch.ones(2) for key in spare}))
        torch.testing.assert_close(*outputs(folders(name)[0], load_pretrained(folder)), atol=1e-4, rtol=0)


def test_the_second_copy_of_a_tensor_may_not_differ_from_the_first(folders: Folders, tmp_path: Path) -> None:
    table = safetensors.torch.load_file(folders("gpt2")[1] / "model.safetensors")["transformer.wte.weight"]
    for second in ("lm_head.weight", "wte.weight"):
        folder = weights(copy_of(folders("gpt2")[1], tmp_path / second), lambda x, second=second: x.update({second: table.clone()}))
        torch.testing.assert_close(*outputs(folders("gpt2")[0], load_pretrained(folder)), atol=1e-4, rtol=0)
        weights(folder, lambda x, second=second: x[second].add_(1))
        with pytest.raises(ConfigError, match=rf"holds both .*wte\.weight and .*{'lm_head' if second[0] == 'l' else 'wte'}.*they differ"):
            load_pretrained(folder)


def test_what_lies_beside_the_model_is_not_passed_over(folders: Folders, tmp_path: Path) -> None:
    folder = copy_of(folders("gpt2")[1], tmp_path / "shard")
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"holds model-00002-of-00002\.safetensors beside model\.safetensors"):
        load_pretrained(folder)
    folder = copy_of(folders("gpt2")[1], tmp_path / "adapter")
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"holds an adapter.*merge_and_unload"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update({"blocks.0.attention.gate.weight": torch.ones(2)}), r"Llama has no place for blocks\.0\.attention\.gate\.weight, .*lost"),
        (lambda x: x.update({"head.weight": x["head.weight"] + 1}), r"Llama has no place for head\.weight"),
        (lambda x: x.pop("norm.weight"), r"lack norm\.weight"),
    ],
)
def test_what_has_no_place_in_a_layout_is_refused_before_anything_is_written(
    change: Callable[[dict[str, Any]], Any], message: str, folders: Folders, tmp_path: Path
) -> None:
    folder = folders("llama, tied, one key head, head size, attention bias, theta")[1]
    held = dict(load_pretrained(folder).state_dict())
    change(held)
    with pytest.raises(ConfigError, match=message):
        write_folder(tmp_path, derive(folder), held)
    assert not list(tmp_path.iterdir())


def test_a_position_of_the_users_is_not_taken_for_ours_of_that_name(folders: Folders, tmp_path: Path) -> None:
    folder = folders("llama, grouped queries")[1]
    model = {**derive(folder), "position": {"_target_": "mine.Rotary", "_partial_": True}}
    with pytest.raises(ConfigError, match=r"model\.position=mine\.Rotary \(there: Rotary\)"):
        write_folder(tmp_path, model, load_pretrained(folder).state_dict())


def test_a_path_that_is_not_there_tells_what_may_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"no file or folder glasllm, and no such pretrained model\. Did you mean glassllm"):
        load_pretrained("glasllm")


def test_tensors_are_views_of_the_file(folders: Folders) -> None:
    found = foreign_tensors(folders("gpt2")[1])
    q, k = found["blocks.0.attention.q.weight"], found["blocks.0.attention.k.weight"]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr(), "parts of one stored matrix, not copies"


WITHOUT_IMPORT = """
import sys, torch
from meshformer.checkpoint.weights import load_weights
model, folder = torch.load(sys.argv[1], weights_only=False), sys.argv[2]
assert "meshformer.huggingface" not in sys.modules
expected = {name: p.clone() for name, p in model.state_dict().items()}
for p in model.parameters():
    p.data.zero_()
load_weights(model, __import__("pathlib").Path(folder))
assert all(torch.equal(p, expected[name]) for name, p in model.state_dict().items())
"""


def test_load_weights_reads_a_folder_without_an_import_of_huggingface(folders: Folders, tmp_path: Path) -> None:
    folder = folders("llama, mlp bias")[1]
    torch.save(load_pretrained(folder), tmp_path / "model.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT_IMPORT, str(tmp_path / "model.pt"), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
