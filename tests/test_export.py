"""`meshformer export`, and fine-tuning from what it and others write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from jobs import TINY, run_tiny, text_file
from meshformer.checkpoint.read import read_tensors
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config.errors import ConfigError
from meshformer.data import load_tokenizer
from meshformer.huggingface import derive, load_pretrained
from meshformer.huggingface.check import layout_for
from meshformer.job.export import exported
from meshformer.job.train import train
from meshformer.model import Learned, Transformer, VisionTransformer
from meshformer.record.metrics_csv import read_metrics

LLAMA = ["model=llama_nano", "model.n_kv_heads=2", "data.tokenizer=bpe", "data.vocab_size=300"]
OURS = [words for words in TINY if not words.startswith("model")]  # of a run whose model comes with its weights


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of two steps: `llama`, which fits a layout, and `ours`, which does not."""
    folder = tmp_path_factory.mktemp("export")
    text_file(folder)
    short = ["trainer.max_steps=2", "callbacks.checkpoint.every_n_steps=1", "model.zero_init=false"]
    run_tiny(folder, "llama", *short, *LLAMA)
    run_tiny(folder, "ours", *short)
    return folder


@pytest.fixture(scope="module")
def llama(work: Path) -> Path:
    """The run `llama` as a Hugging Face folder."""
    assert main(["export", f"run={work}/llama", "format=huggingface", f"output={work}/hf"]) == 0
    return work / "hf"


def tokens_for(model: Transformer) -> torch.Tensor:
    return torch.randint(model.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_transformers_reads_the_folder_with_the_same_logits_and_ids(work: Path, llama: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    ours = load_pretrained(work / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    tokens = tokens_for(ours)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    text = (work / "text.txt").read_text()[:200]
    expected = load_tokenizer(work / "llama" / "tokenizer.json").encode(text).tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    assert tokenizer(text)["input_ids"] == expected and tokenizer.decode(expected) == text


def test_the_small_llama_fits_as_it_is_and_the_default_model_does_not() -> None:
    assert layout_for(compose(["model=llama_nano"])["model"]).NAME == "Llama"
    with pytest.raises(ConfigError, match="train model=llama_nano"):
        layout_for(compose()["model"])


def test_back_from_the_folder_every_bit_is_the_runs(work: Path, llama: Path) -> None:
    run, back = (load_pretrained(path).state_dict() for path in (work / "llama", llama))
    assert run.keys() == back.keys() and all(torch.equal(run[k], back[k]) for k in run)


def test_a_character_tokenizer_goes_along(work: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from meshformer.job.export import _tokenizer

    ours = load_tokenizer(work / "ours" / "tokenizer.json")
    theirs = Tokenizer.from_str(_tokenizer(work / "ours" / "tokenizer.json"))
    text = (work / "text.txt").read_text()
    assert theirs.encode(text).ids == ours.encode(text).tolist()
    assert theirs.decode(theirs.encode(text).ids) == text


def test_safetensors_and_earlier_checkpoints(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"run={work}/ours", "format=safetensors", "checkpoint=1"]) == 0
    file = work / "ours" / "exports" / "step-00000001.safetensors"
    model = load_pretrained(file)
    saved = read_tensors(work / "ours" / "checkpoints" / "step-00000001", "model.")
    assert all(torch.equal(x, saved[f"model.{name}"]) for name, x in model.state_dict().items())
    torch.testing.assert_close(model.state_dict(), load_pretrained(work / "ours" / "checkpoints" / "step-00000001").state_dict())


def test_what_fits_no_layout_is_refused_by_option_before_anything_is_written(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"run={work}/ours", "format=huggingface", f"output={work}/no"]) == 2
    message = capsys.readouterr().err
    assert "the nearest is Llama, but for model.activation=gelu (there: swiglu), model.qk_norm=true (there: false)" in message
    assert "or train model=llama_nano, which fits Llama" in message
    assert not (work / "no").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run={work}/llama", "format=onxx"], "Did you mean onnx"),
        (["run={work}/hf", "format=safetensors"], "output: is needed"),
        (["run={work}/hf", "format=safetensors", "output=x.safetensors", "checkpoint=1"], "weights that have no steps"),
        (["run={work}/llama", "format=onnx", "output={work}/x.pt2"], "what format=onnx writes ends in .onnx"),
        (["run={work}/llama", "format=huggingface", "output={work}/ours"], "it is there already"),
        (["run={work}/llama", "format=onnx", "checkpoint=7"], "no such checkpoint"),
        (["run={work}/nothing", "format=onnx"], "nothing"),
        (["-m", "run={work}/llama", "format=onnx,safetensors"], "--multirun"),
    ],
)
def test_mistakes_are_one_sentence(work: Path, llama: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *(word.format(work=work) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error


@torch.no_grad()
def test_onnx_agrees_at_other_sizes(work: Path) -> None:
    import onnxruntime

    assert main(["export", f"run={work}/llama", "format=onnx", f"output={work}/model.onnx"]) == 0
    session, model = onnxruntime.InferenceSession(work / "model.onnx"), load_pretrained(work / "llama")
    for shape in ((1, 16), (3, 1), (2, 9)):
        tokens = torch.randint(model.vocab_size, shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(tokens), atol=1e-4, rtol=0)


@torch.no_grad()
def test_torch_export_agrees_at_other_sizes(work: Path) -> None:
    assert main(["export", f"run={work}/ours", "format=torch_export", f"output={work}/model.pt2"]) == 0
    program, model = torch.export.load(work / "model.pt2").module(), load_pretrained(work / "ours")
    for shape in ((1, 16), (3, 1)):
        tokens = torch.randint(model.vocab_size, shape)
        torch.testing.assert_close(program(tokens), model(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_encoders_are_exported_with_a_mask_and_vision_models_for_any_batch() -> None:
    encoder = Transformer(
        19,
        1,
        2,
        16,
        12,
        causal=False,
        position=Learned,
        norm="layer",
        norm_position="post",
        bias=True,
        embedding_norm=True,
        token_types=2,
        head=False,
    ).eval()
    program: Any = exported(encoder).module()
    tokens, mask = torch.randint(19, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    found = program(tokens, documents_BT=mask)
    torch.testing.assert_close(found, encoder(tokens, documents_BT=mask), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, :4], encoder(tokens[:1, :4])[0], atol=1e-5, rtol=0)

    vision = VisionTransformer(8, 4, 1, 2, 16, colours=1, classes=3).eval()
    images = torch.randn(5, 8, 8, 1)
    torch.testing.assert_close(exported(vision).module()(images), vision(images), atol=1e-5, rtol=0)


# --- fine-tuning from it


def finetuned(work: Path, name: str, source: Path | str, *overrides: str) -> list[dict[str, Any]]:
    run = work / name
    run.mkdir(exist_ok=True)
    settings = [
        f"data.files=[{work}/text.txt]",
        f"paths.data={work}/cache",
        f"paths.runs={work}/runs",
        "stage=finetune",
        f"stage.init_from={source}",
    ]
    train(compose([*OURS, *settings, "optimizer=sgd", "schedule=constant", "trainer.max_steps=3", *overrides]), run)
    return read_metrics(run / "metrics.csv") if (run / "metrics.csv").is_file() else []


def test_finetuning_takes_model_weights_and_tokenizer_from_the_folder(work: Path, llama: Path) -> None:
    finetuned(work, "kept", llama, "optimizer.lr=1e-12")
    before, after = load_pretrained(llama).state_dict(), load_pretrained(work / "kept").state_dict()
    torch.testing.assert_close(after, before, atol=1e-7, rtol=0)
    ours, theirs = (load_tokenizer(path / "tokenizer.json") for path in (work / "kept", work / "llama"))
    text = (work / "text.txt").read_text()
    assert ours.encode(text).tolist() == theirs.encode(text).tolist()
    assert main(["generate", f"run={work}/kept", "prompt=abc", "max_tokens=3"]) == 0


def test_every_layout_starts_from_the_folder_alike(work: Path, llama: Path) -> None:
    expected = finetuned(work, "single", llama, "optimizer.lr=0.5")
    for strategy in ("fsdp", "tensor", "pipeline"):
        overrides = ["optimizer.lr=0.5", f"strategy={strategy}", "trainer.devices=2"]
        found = run_ranks(2, finetuned, work, strategy, llama, *overrides)[0]
        for name in ("train/loss", "train/grad_norm"):
            got, wanted = ([row[name] for row in rows] for rows in (found, expected))
            assert got == pytest.approx(wanted, abs=5e-6, rel=5e-6 if "norm" in name else 0), (strategy, name)


def test_finetuning_from_a_safetensors_file_of_ours(work: Path) -> None:
    assert main(["export", f"run={work}/llama", "format=safetensors"]) == 0
    file = work / "llama" / "exports" / "step-00000002.safetensors"
    rows = finetuned(work, "from-file", file, "optimizer.lr=0.5")
    assert rows[0]["train/loss"] == pytest.approx(
        finetuned(work, "from-run", work / "llama", "optimizer.lr=0.5")[0]["train/loss"], abs=1e-6
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=micro"], "model=micro: fine-tuning takes the model from the weights it starts from"),
        (["model.n_layers=5"], "model.n_layers=5: the weights in .* have 2"),
        (["model/position=learned"], "model.position: the weights in .* have Rotary"),
        (["model.norm_eps=1e-4"], "model.norm_eps=0.0001"),
        (["data.tokenizer=char"], "data.tokenizer=char: finetuning keeps the tokenizer"),
        (["data.context_length=64"], "model.context_length=16: the model sees fewer tokens"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused_by_key(work: Path, llama: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*OURS, f"data.files=[{work}/text.txt]", "stage=finetune", f"stage.init_from={llama}", *overrides])


def test_free_settings_stay_free(work: Path, llama: Path) -> None:
    config = compose(
        [
            *OURS,
            f"data.files=[{work}/text.txt]",
            "stage=finetune",
            f"stage.init_from={llama}",
            "model.dropout=0.1",
            "model/attention=reference",
        ]
    )
    assert config["model"]["dropout"] == 0.1 and config["model"]["attention"]["_target_"].endswith("attend_reference")
    assert config["model"]["n_kv_heads"] == 2 and derive(llama)["n_kv_heads"] == 2


def test_weights_without_a_tokenizer_are_refused_for_text(work: Path, llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    with pytest.raises(ConfigError, match="no tokenizer comes with these weights"):
        finetuned(work, "without", tmp_path)
