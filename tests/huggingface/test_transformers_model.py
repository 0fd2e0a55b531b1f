"""Models of the transformers library: what they compute, start with, read and write."""

from __future__ import annotations

import ctypes
import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import jobs
from harness import run_ranks
from jobs import labelled_file, run_tiny, text_file
from meshformer.checkpoint.find import latest_checkpoint
from meshformer.checkpoint.read import read_tensors
from meshformer.checkpoint.weights import load_adapters, load_weights
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config import ConfigError
from meshformer.huggingface.transformers_config import TARGET, model_types
from meshformer.huggingface.transformers_model import TransformersModel
from meshformer.huggingface.transformers_plan import plan_for
from meshformer.job.build import build_model
from meshformer.job.export import export
from meshformer.model import add_adapters, generate
from meshformer.runs.models import load_model
from small_transformers import CONFIGS, LM

TOKENS = torch.arange(24).view(2, 12) % 11
PADDED = torch.tensor([[0] * 12, [0] * 7 + [-1] * 5])  # documents: the second text has seven tokens


def config_of(name: str, **more: Any) -> dict[str, Any]:
    return {**CONFIGS[name], "vocab_size": 11, **more}


def build(name: str, auto_class: str = "AutoModelForCausalLM", **more: Any) -> Any:
    return TransformersModel(config_of(name), auto_class, vocab_size=11, **more).eval()


# --- what it computes


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_transformers_and_padding_changes_none(name: str) -> None:
    model = build(name, "AutoModelForMaskedLM" if name == "bert" else "AutoModelForCausalLM")
    torch.testing.assert_close(model(TOKENS), model.net(input_ids=TOKENS).logits)
    padded, alone = model(TOKENS, documents_BT=PADDED), model(TOKENS[1:, :7])
    torch.testing.assert_close(padded[1:, :7], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_texts_that_share_a_sample_do_not_see_each_other(name: str) -> None:
    model = build(name)
    positions_BT = torch.tensor([[*range(7), *range(5)]] * 2)
    packed = model(TOKENS, positions_BT=positions_BT, documents_BT=torch.tensor([[0] * 7 + [1] * 5] * 2))
    torch.testing.assert_close(packed[:, 7:], model(TOKENS[:, 7:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("llama", (2, 3)), ("gpt2", (2, 3)), ("bert", (2, 3))])
@torch.no_grad()
def test_a_classified_text_is_judged_by_its_last_real_token(name: str, shape: tuple[int, int]) -> None:
    model = build(name, "AutoModelForSequenceClassification", outputs=3)
    judged = model(TOKENS, documents_BT=PADDED)
    assert judged.shape == shape
    torch.testing.assert_close(judged[1:], model(TOKENS[1:, :7], documents_BT=PADDED[1:, :7]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_with_their_cache_writes_what_it_writes_without() -> None:
    model = build("llama", context_length=64)
    with_cache, without = (generate(model, TOKENS[:, :3], 20, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)
    theirs = model.net.generate(TOKENS[:, :3], attention_mask=torch.ones(2, 3), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(with_cache, theirs)


# --- what it starts with


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_initial_weights_follow_the_models_own_rule_and_depend_on_seed_and_name_only(name: str) -> None:
    model = build(name, seed=3)
    deeper = TransformersModel({**config_of(name), "num_hidden_layers": 6, "n_layer": 6}, vocab_size=11, seed=3)
    mine, more = dict(model.named_parameters()), dict(deeper.named_parameters())
    for key in mine:
        if name == "gpt2" and key.endswith("c_proj.weight"):  # its rule divides these by the number of layers
            continue
        assert torch.equal(mine[key], more[key]), key
    blocks = [p for key, p in mine.items() if p.ndim == 2 and "c_proj" not in key and p.numel() > 500]
    assert all(0.018 < float(p.std()) < 0.022 for p in blocks) and len(blocks) >= 4
    assert not any(torch.equal(p, q) for i, p in enumerate(blocks) for q in blocks[:i] if p.shape == q.shape)
    if name == "gpt2":
        writes = [p for key, p in mine.items() if key.endswith("c_proj.weight")]
        assert all(float(p.std()) < 0.0085 for p in writes)  # 0.02 / sqrt(2 * 4 layers)


def test_buffers_that_the_constructor_computes_are_right_after_allocation() -> None:
    with torch.device("meta"):
        model = TransformersModel(config_of("llama"), vocab_size=11)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config_of("llama")))
    assert all(torch.equal(x, dict(theirs.named_buffers())[name]) for name, x in build("llama").net.named_buffers())


# --- folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the small models as transformers writes them, with one tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = tmp_path_factory.mktemp("folders")
    text = text_file(made)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["[UNK]", "[MASK]", "[PAD]"])
    tokenizer.train_from_iterator([text.read_text()], trainer)
    for name, config in CONFIGS.items():
        settings = transformers.AutoConfig.for_model(**{**config, "vocab_size": tokenizer.get_vocab_size()})
        kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
        torch.manual_seed(4)
        kind.from_config(settings).save_pretrained(made / name)
        tokenizer.save(str(made / name / "tokenizer.json"))
    return made


def tune(base: Path, name: str, run: str, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    jobs.TINY[:] = [setting for setting in jobs.TINY if not setting.startswith("model")]
    task = ["task=masked_language_modelling"] if name == "bert" else []
    command = [o for o in LM if not o.startswith("~callbacks")]
    return run_tiny(base, run, *command, *task, f"model.path={base / name}", "callbacks.checkpoint.every_n_steps=2", *overrides, resume=resume)


def resumed(*arguments: Any) -> Any:
    return tune(*arguments, resume=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_comes_back_bit_for_bit(folder: Path, tmp_path: Path, name: str, capsys: Any) -> None:
    """Read, untouched by a step of rate 0, written, and read by transformers: the same logits, and the same tensors under the same names."""
    run_ranks(1, tune, folder, name, f"kept_{name}", "optimizer.lr=1e-60", "trainer.max_steps=2")
    export(latest_checkpoint(folder / f"kept_{name}"), tmp_path / "out", "huggingface")
    auto = "AutoModelForMaskedLM" if name == "bert" else "AutoModelForCausalLM"
    hint = f"{auto}.from_pretrained('{tmp_path}/out'), or here: model=transformers stage=finetune stage.init_from={tmp_path}/out"
    assert hint in capsys.readouterr().out
    stored, written = (load_file(place / "model.safetensors") for place in (folder / name, tmp_path / "out"))
    assert stored.keys() == written.keys() and all(torch.equal(stored[key], written[key]) for key in stored)
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, load_model(folder / f"kept_{name}").model(TOKENS))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    said = (
        "license: ", "base_model: ", "| data | text.txt |", "| steps | 2,", "| layout | single", "val/loss", "meshformer train", ".from_pretrained(",
    )
    for wanted in said:
        assert wanted in card, wanted


def test_a_run_from_a_folder_continues_in_another_layout_as_if_it_had_not_stopped(folder: Path) -> None:
    run_ranks(2, tune, folder, "llama", "stopped", "trainer.max_steps=4", "strategy=fsdp", "trainer.devices=2")
    run_ranks(2, resumed, folder, "llama", "stopped", "trainer.max_steps=6", "strategy=tensor", "trainer.devices=2")
    (rows,) = run_ranks(1, tune, folder, "llama", "straight", "trainer.max_steps=6")
    continued = [row for row in jobs.read_metrics(folder / "stopped" / "metrics.csv") if row["step"] > 4]
    assert [row["step"] for row in continued] == [5, 6]
    for a, b in zip(continued, rows[-2:], strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < 5e-6


def test_freezing_rates_by_layer_and_averages_know_its_names(folder: Path) -> None:
    frozen = 'stage.freeze=["net.model.embed_tokens.*"]'
    tuned = ["stage=finetune", "stage.lr_scale=1", "stage.layer_decay=0.5", frozen, "callbacks.ema.decay=0.5", "trainer.max_steps=4"]
    run_ranks(1, tune, folder, "llama", "frozen", *tuned)
    weights = read_tensors(latest_checkpoint(folder / "frozen"), "")
    stored = load_file(folder / "llama" / "model.safetensors")
    assert torch.equal(weights["model.net.model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert (weights["average.net.model.norm.weight"] - weights["model.net.model.norm.weight"]).abs().max() > 0
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    moved = [float((weights[f"model.net.{name}"] - stored[name]).norm()) for name in names]
    assert moved == sorted(moved) and moved[3] > 3 * moved[0]


def test_a_run_is_fine_tuned_for_another_task_evaluated_and_continued_as_text(folder: Path, capfd: Any) -> None:
    data = [f"data.file={labelled_file(folder)}", "data=csv", "task=sequence_classification", "data.label_column=label", "data.context_length=16"]
    start = folder / "stopped"
    if not start.exists():
        run_ranks(2, tune, folder, "llama", "stopped", "trainer.max_steps=4", "strategy=fsdp", "trainer.devices=2")
    config = compose(["stage=finetune", f"stage.init_from={start}", *data])
    assert (config["model"]["auto_class"], config["model"]["outputs"]) == ("AutoModelForSequenceClassification", None)
    own = [f"paths.runs={folder}/runs", f"paths.data={folder}/cache", f"hydra.run.dir={folder}/judging", "trainer.max_steps=2", "logger=csv"]
    common = ["trainer.precision=32-true", "trainer.progress=false", "data.batch_size=8", "optimizer=sgd", "callbacks.checkpoint.every_n_steps=2"]
    assert main(["train", "stage=finetune", f"stage.init_from={start}", *data, *own, *common]) == 0
    weights, before = (read_tensors(latest_checkpoint(place), "model.") for place in (folder / "judging", start))
    assert "model.net.score.weight" in weights and "model.net.lm_head.weight" not in weights
    assert (weights["model.net.model.embed_tokens.weight"] - before["model.net.model.embed_tokens.weight"]).abs().max() < 1e-2
    capfd.readouterr()
    assert main(["evaluate", f"run={folder}/judging", f"paths.data={folder}/cache"]) == 0
    assert "val/accuracy" in capfd.readouterr().out
    assert main(["generate", f"run={start}", "prompt=abc", "max_tokens=4", "temperature=0"]) == 0
    assert capfd.readouterr().out.startswith("abc")
    assert "has a model of ours" in refusal_of_own_run(folder)


def refusal_of_own_run(folder: Path) -> str:
    run_ranks(1, run_tiny, folder, "ours", "trainer.max_steps=2")
    with pytest.raises(ConfigError) as caught:
        compose(["model=transformers", "stage=finetune", f"stage.init_from={folder / 'ours'}", "data.context_length=16"])
    return str(caught.value)


def test_parameters_outside_of_modules_are_drawn_without_the_modules_below(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rooted(transformers.LlamaForCausalLM):
        def __init__(self, config: Any):
            super().__init__(config)
            self.gate = torch.nn.Parameter(torch.empty(3))

        def _init_weights(self, module: Any) -> None:
            super()._init_weights(module)
            if module is self or type(module) is Rooted:
                torch.nn.init.normal_(module.gate)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", lambda settings, **how: Rooted(settings))
    one, other = build("llama", seed=1), build("llama", seed=2)
    assert one.net.gate.shape == (3,) and not torch.equal(one.net.gate, other.net.gate)
    assert torch.equal(one.net.gate, build("llama", seed=1).net.gate)


ADAPTED = {"llama": "[q_proj,v_proj,down_proj]", "bert": "[query,value]", "gpt2": "[c_attn,c_fc,c_proj]"}


@pytest.mark.parametrize(("name", "strategy"), [("llama", "single"), ("llama", "fsdp"), ("llama", "tensor"), ("bert", "fsdp"), ("gpt2", "fsdp")])
def test_adapters_are_trained_alone_and_peft_reads_their_folder(folder: Path, tmp_path: Path, name: str, strategy: str, capsys: Any) -> None:
    peft = pytest.importorskip("peft")
    run, processes = f"lora_{name}_{strategy}", 1 if strategy == "single" else 2
    tuned = ["stage=finetune", "stage.lora.rank=3", f"stage.lora.targets={ADAPTED[name]}", "stage.lr_scale=1", "trainer.max_steps=4"]
    run_ranks(processes, tune, folder, name, run, *tuned, f"strategy={strategy}", f"trainer.devices={processes}")
    checkpoint = latest_checkpoint(folder / run)
    export(checkpoint, tmp_path / "adapter", "adapter")
    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    base = kind.from_pretrained(folder / name).eval()
    with torch.no_grad():
        before, trained = base(TOKENS).logits, load_model(folder / run).model(TOKENS)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits
        torch.testing.assert_close(theirs, trained, atol=1e-6, rtol=1e-5)
        assert (before - trained).abs().max() > 1e-4
        alone = build_model({**compose_from(folder, name), "stage": {"name": "pretrain"}}).eval()
        load_weights(alone, folder / name)
        load_adapters(alone, tmp_path / "adapter")
        torch.testing.assert_close(alone(TOKENS), trained, atol=1e-6, rtol=1e-5)
        export(checkpoint, tmp_path / "merged.safetensors", "safetensors")
        assert "safetensors.torch.load_file(" in capsys.readouterr().out, "a file of transformers' weights"
        export(checkpoint, tmp_path / "merged", "huggingface")
        torch.testing.assert_close(kind.from_pretrained(tmp_path / "merged").eval()(TOKENS).logits, trained, atol=1e-5, rtol=1e-5)


def compose_from(folder: Path, name: str) -> dict[str, Any]:
    task = ["task=masked_language_modelling"] if name == "bert" else []
    data = ["data=text", f"data.files=[{folder / 'text.txt'}]", "data.context_length=16"]
    return compose([*data, "model=transformers", f"model.path={folder / name}", *task])


def test_an_adapter_as_large_as_its_layer_is_refused() -> None:
    with torch.device("meta"):
        model = TransformersModel({**CONFIGS["gpt2"], "vocab_size": 11})
    with pytest.raises(ValueError, match="the rank 32 is not less than the 32 inputs"):
        add_adapters(model, 32, 1.0, ["c_attn"], seed=0)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_new_head_is_drawn_and_every_other_weight_read(folder: Path, name: str) -> None:
    model = TransformersModel(json.loads((folder / name / "config.json").read_text()), "AutoModelForSequenceClassification", outputs=3)
    start = {key: p.clone() for key, p in model.named_parameters()}
    load_weights(model, folder / name, new=tuple(model.head_parameters))
    kept = {key for key, p in model.named_parameters() if torch.equal(p, start[key]) and p.ndim == 2}
    assert kept == {key for key in kept if "score" in key or "classifier" in key or "pooler" in key} and kept
    with pytest.raises(ConfigError, match=r"(score|classifier)\.weight: missing"):
        load_weights(model, folder / name)


def test_a_tensor_without_a_place_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "llama" / "model.safetensors")
    save_file({**tensors, "model.layers.0.gate.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "llama" / "config.json").read_text())
    model = TransformersModel(json.loads((tmp_path / "config.json").read_text()))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.gate\.weight: unknown to the model"):
        load_weights(model, tmp_path)


def test_folders_without_a_prefix_and_with_old_names_are_read(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "bert" / "model.safetensors")
    old = {"bert.": "", "LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for key, x in tensors.items():
        for now, before in old.items():
            key = key.replace(now, before)
        renamed[key] = x
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "bert" / "config.json").read_text())
    one, other = (TransformersModel(json.loads((tmp_path / "config.json").read_text()), "AutoModelForMaskedLM") for _ in range(2))
    load_weights(one, folder / "bert")
    load_weights(other, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# --- memory


def anonymous() -> int:
    """Bytes of this process that are not pages of files, which the system can drop at any time."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def peak_while_loading(base: Path, name: str) -> float:
    """The largest growth of this rank's memory from the start of the job to its first step."""
    from meshformer.job import train as job

    jobs.TINY[:] = [setting for setting in jobs.TINY if not setting.startswith("model")]
    ctypes.CDLL(None).malloc_trim(0)  # else the model could lie in memory that earlier tests freed
    before, peak, over = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous() - before)

    def no_fit(*arguments: Any) -> None:
        trainer, task = arguments[:2]
        trainer.strategy.connect(task)
        trainer.strategy.setup_environment()
        trainer.strategy._build(task)
        raise Stop

    class Stop(Exception):
        pass

    job.fit = no_fit
    watcher = threading.Thread(target=watch)
    watcher.start()
    with suppress(Stop):
        run_tiny(base, f"memory_{name}", *LM, f"model.path={base / name}", "strategy=fsdp", "trainer.devices=2")
    over.set()
    watcher.join()
    return peak


def test_no_rank_holds_the_whole_model_while_it_reads_a_folder(folder: Path) -> None:
    config = {**CONFIGS["llama"], "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 16, "num_key_value_heads": 4}
    settings = transformers.AutoConfig.for_model(**{**config, "vocab_size": 280})
    model = transformers.AutoModelForCausalLM.from_config(settings)
    whole = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(folder / "larger")
    (folder / "larger" / "tokenizer.json").write_text((folder / "llama" / "tokenizer.json").read_text())
    del model
    shares = [peak / whole for peak in run_ranks(2, peak_while_loading, folder, "larger")]
    assert all(0.4 < share <= 0.7 for share in shares), shares


# --- plans and refusals


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("gemma2", {"embed": ["net.model.embed_tokens"], "head": ["net.model.norm", "net.lm_head"]}),
        ("granite", {"blocks": "net.model.layers"}),
        ("phi", {"head": ["net.model.final_layernorm", "net.lm_head"]}),
        ("starcoder2", {"blocks": "net.model.layers"}),
    ],
)
def test_the_plan_is_read_from_transformers_not_from_a_list_of_models(kind: str, plan: dict[str, Any]) -> None:
    settings = transformers.AutoConfig.for_model(kind, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    with torch.device("meta"):
        found = plan_for(transformers.AutoModelForCausalLM.from_config(settings))
    assert {key: getattr(found, key) if key == "blocks" else list(getattr(found, key)) for key in plan} == plan
    assert found.style("net.model.layers.1.self_attn.q_proj") == "columns" and "sequence" in found.tensor.values()


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(["model=transformers", "data.context_length=16", *overrides])
    return str(caught.value)


def test_what_cannot_be_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    def written(**config: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return f"model.config={tmp_path / 'config.json'}"

    gpt2, bert, llama = (f"model.path={folder / name}" for name in ("gpt2", "bert", "llama"))
    assert "needs one of path and config" in refusal()
    assert "hf download" in refusal("model.path=somewhere/else")
    assert "declares no tensor plan for gpt2" in refusal(gpt2, "strategy=tensor")
    assert "declares no pipeline plan for bert" in refusal(bert, "strategy=pipeline", "task=masked_language_modelling")
    assert "attend within one process" in refusal(llama, "strategy=context")
    assert "bert sees the next token" in refusal(bert)
    assert "no AutoModelForMaskedLM for llama" in refusal(llama, "task=masked_language_modelling")
    assert "num_key_value_heads=2 does not divide" in refusal(llama, "strategy=tensor", "strategy.tensor=4", "trainer.devices=4")
    assert "Use at most 64" in refusal(llama, "data.context_length=65")
    assert "names other weights" in refusal(llama, "stage=finetune", f"stage.init_from={folder / 'gpt2'}")
    assert "Did you mean llama" in refusal(written(model_type="lama"))
    assert "code of its own, which is never run" in refusal(written(model_type="mine", auto_map={"AutoModel": "x.Y"}))
    assert "quantised" in refusal(written(model_type="llama", quantization_config={"quant_method": "gptq"}))
    assert "plan for qwen3_moe needs moe_tp_experts" in refusal(f"model.path={folder / 'qwen3_moe'}", "strategy=tensor")
    assert "plan for phi3 needs" in refusal(written(model_type="phi3", num_attention_heads=4), "strategy=tensor")
    texts = ["data=csv", f"data.file={tmp_path / 'a.csv'}", "data.packing=true"]
    (tmp_path / "a.csv").write_text("text\na b\nc d\n" * 9)
    assert "does not keep apart" in refusal(bert, "task=masked_language_modelling", *texts)
    assert "does not keep apart" in refusal(written(model_type="bloom"), *texts)
    assert compose(["model=transformers", llama, "data.context_length=16", *texts])["data"]["packing"]
    assert "0 blocks" in refusal(written(model_type="llama", num_hidden_layers=0), "strategy=pipeline")


@torch.no_grad()
def test_an_encoder_without_a_head_reads_a_folder_with_one(folder: Path) -> None:
    config = json.loads((folder / "bert" / "config.json").read_text())
    bare, whole = TransformersModel(config, "AutoModel").eval(), TransformersModel(config, "AutoModelForMaskedLM").eval()
    for model in (bare, whole):
        load_weights(model, folder / "bert")
    assert not any("pooler" in name for name, _ in bare.named_parameters())
    hidden_BTC = bare(TOKENS, documents_BT=PADDED)
    torch.testing.assert_close(whole.net.cls(hidden_BTC), whole(TOKENS, documents_BT=PADDED))


def test_settings_replace_those_of_the_file_and_wrong_ones_are_refused(folder: Path) -> None:
    chosen = ["model=transformers", f"model.config={folder / 'qwen3' / 'config.json'}", "data.context_length=16"]
    config = compose([*chosen, "model.settings={num_hidden_layers: 2}"])
    config["model"]["vocab_size"] = 11
    assert len(build_model(config).net.model.layers) == 2
    config = compose([*chosen, "model.settings={num_attention_heads: three}"])
    config["model"]["vocab_size"] = 11
    with pytest.raises(ConfigError, match="transformers refuses these settings of qwen3"):
        build_model(config)
    gpt2 = compose(["model=transformers", f"model.path={folder / 'gpt2'}", "data.context_length=16", "stage=finetune", "stage.lora.rank=2"])
    gpt2["model"]["vocab_size"] = 280
    with pytest.raises(ConfigError, match="no linear layer in the blocks is called q, v: they are c_attn, c_fc, c_proj"):
        build_model(gpt2)
    assert "the data is images" in refusal(f"model.path={folder / 'llama'}", "data=digits", "task=image_classification")


def test_no_code_of_a_folder_runs(folder: Path, tmp_path: Path) -> None:
    evil = {**json.loads((folder / "llama" / "config.json").read_text()), "auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_target_": "os.system"}
    (tmp_path / "config.json").write_text(json.dumps(evil))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = compose(["model=transformers", f"model.config={tmp_path / 'config.json'}", "data.context_length=16"])
    assert config["model"]["_target_"] == TARGET and not {"auto_map", "_target_"} & config["model"]["config"].keys()
    config["model"]["vocab_size"] = 11
    assert isinstance(build_model(config), TransformersModel)


def test_transformers_knows_the_models_whose_source_is_read() -> None:
    assert {"llama", "qwen3", "mistral", "gpt2", "bert"} <= model_types().keys()
