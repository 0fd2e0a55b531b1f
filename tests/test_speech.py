"""Speech recognition on the command line: train, evaluate, transcribe, resume, fine-tune from an encoder of Whisper's form; refusals."""

from __future__ import annotations

import csv
import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import save_file

import jobs
from harness import run_ranks
from meshformer.bench.tones import RATE, texts, tones, write_table
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config import ConfigError
from meshformer.data import load_tokenizer
from meshformer.huggingface import load_pretrained

SETTINGS = [
    "task=speech_recognition", "model=speech_nano", "data=audio_csv", "data.batch_size=16", "data.sample_rate=8000", "data.mels=32",
    "data.context_length=64", "data.mask_mels=2", "data.mask_frames=2", "data.speeds=[1.0]", "model.n_layers=2", "model.d_model=64",
    "model.n_heads=2", "trainer.threads=1", "trainer.precision=32-true", "trainer.progress=false", "optimizer.lr=0.02", "logger=csv",
]  # fmt: skip


SPOKEN = ["task=speech_recognition", "data=prompts", "model=speech_nano"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("tones"), texts(160))


def settings(table: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.file={table}", f"paths.data={table.parent / 'cache'}", f"paths.runs={table.parent / 'runs'}", *more]


def meshformer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in this process."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = main(list(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def run(table: Path) -> Path:
    done = meshformer("train", *settings(table, "trainer.max_steps=120", "trainer.val_check_interval=120"))
    assert done.returncode == 0, done.stderr
    (folder,) = (table.parent / "runs").glob("*/*")
    assert "validation characters wrong 0.0" in done.stdout and "nats a character" in done.stdout, done.stdout
    return folder


def test_a_model_learns_to_read_tones_and_transcribes_a_file(run: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    errors = [float(row["val/cer"]) for row in rows if row.get("val/cer")]
    assert errors[-1] < 0.05
    for text in ("head", "fade bed"):
        soundfile.write(tmp_path / f"{text}.wav", tones(text, 16000), 16000)  # another rate than the model's
    done = meshformer("generate", f"run={run}", f"audio={tmp_path / 'head.wav'}")
    assert (done.returncode, done.stdout.strip()) == (0, "head"), done.stderr
    both = meshformer("generate", f"run={run}", f"audio=['{tmp_path / 'head.wav'}','{tmp_path / 'fade bed.wav'}']")
    assert [line.split("\t")[1] for line in both.stdout.strip().splitlines()] == ["head", "fade bed"], both.stderr


def test_samples_show_what_was_said_beside_what_was_heard(run: Path) -> None:
    last = sorted((run / "samples").glob("*.txt"))[-1].read_text()
    pairs = [block.splitlines() for block in last.split("\n\n")]
    assert len(pairs) == 10 and all(said.startswith("said   ") and heard.startswith("heard  ") for said, heard in pairs)
    assert sum(said.split()[1:] == heard.split()[1:] for said, heard in pairs) >= 7


def test_texts_may_be_read_in_pieces_of_words(table: Path, tmp_path: Path) -> None:
    words = ["data.tokenizer=bpe", "data.vocab_size=290", "trainer.max_steps=3", "trainer.val_check_interval=3", f"hydra.run.dir={tmp_path / 'bpe'}"]
    done = meshformer("train", *settings(table, *words))
    assert done.returncode == 0 and "validation characters wrong" in done.stdout, done.stderr
    tokenizer = load_tokenizer(tmp_path / "bpe/tokenizer.json")
    ids = tokenizer.encode("head fade bed")
    assert len(ids) < 13 and tokenizer.decode(ids) == "head fade bed"
    said = [line.removeprefix("said   ") for line in sorted((tmp_path / "bpe/samples").glob("*.txt"))[-1].read_text().splitlines()[::3]]
    assert said and set("".join(said)) <= set("abcdefgh ")
    soundfile.write(tmp_path / "head.wav", tones("head", RATE), RATE)
    heard = meshformer("generate", f"run={tmp_path / 'bpe'}", f"audio={tmp_path / 'head.wav'}")
    assert heard.returncode == 0, heard.stderr


def test_an_evaluation_may_decode_with_a_beam(run: Path) -> None:
    done = meshformer("evaluate", f"run={run}", "task.decoding=beam")
    assert done.returncode == 0 and "val/cer" in done.stdout, done.stderr
    refused = meshformer("evaluate", f"run={run}", "task.decoding=guess")
    assert refused.returncode != 0 and "task.decoding=guess" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["audio=[]"], "audio: its model turns"),
        ([], "audio: its model turns recordings into text: name one. Add audio=FILE"),
        (["audio=absent.wav"], "audio=absent.wav: there is no such file"),
        (["audio={silent}"], "silent.wav is silent"),
        (["audio={long}"], "data.context_length leaves room for 2.56 s. Cut it into pieces"),
    ],
)
def test_a_recording_that_cannot_be_used_is_refused_in_a_sentence(run: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    silent, long = tmp_path / "silent.wav", tmp_path / "long.wav"
    soundfile.write(silent, 0 * tones("abc"), RATE)
    soundfile.write(long, tones("abcd" * 10), RATE)
    done = meshformer("generate", f"run={run}", *(argument.format(silent=silent, long=long) for argument in arguments))
    assert done.returncode != 0 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["task=speech_recognition"], r"task=speech_recognition: learns from recordings, .* running text\. Use data=prompts"),
        (["task=speech_recognition", "data=prompts"], r"reads tokens, and the task is about speech\. Use model=speech_nano"),
        (["model=speech_nano", "data.mels=8", "data.frames_per_token=4"], r"reads speech, and the task is about texts\. Use model=nano"),
        (["model=speech_nano"], r"model\.mels: is taken from the data, which has none\. Use task=speech_recognition data=prompts"),
        (["task=speech_recognition", "data=prompts", "model=speech_nano", "model.mels=80"], r"data\.mels=64: the model reads 80 bands"),
        ([*SPOKEN, "data.sample_rate=22050"], r"data\.sample_rate=22050: must be a multiple of 100"),
        ([*SPOKEN, "task.beam_width=0"], r"task\.beam_width=0"),
        ([*SPOKEN, "data.packing=true"], r"data\.packing=true: .* the task has a result for each text"),
        (["task=speech_recognition", "data=prompts", "model=speech_nano", "data.scaling=whisper"], r"data\.scaling=whisper: is that of Whisper"),
        (["task=speech_recognition", "data=prompts", "model=speech_nano", "data.speeds=[3.0]"], r"data\.speeds=\[3\.0\]: must be one or more speeds"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_start(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(overrides)


def steps(table: Path, name: str, overrides: list[str], resume: bool = False) -> list[dict[str, Any]]:
    return jobs._run(table.parent / name, compose(settings(table, "trainer.log_every_n_steps=1", *overrides)), resume)


def test_a_resumed_run_repeats_the_run_that_was_not_stopped(table: Path) -> None:
    augmented = ["data.speeds=[1.0,0.9]", "data.mask_mels=4", "callbacks.checkpoint.every_n_steps=5", "trainer.val_check_interval=10"]
    (whole,) = run_ranks(1, steps, table, "whole", [*augmented, "trainer.max_steps=10"])
    run_ranks(1, steps, table, "half", [*augmented, "trainer.max_steps=5"])
    (continued,) = run_ranks(1, steps, table, "half", [*augmented, "trainer.max_steps=10"], True)
    assert [row["train/loss"] for row in continued[-5:]] == [row["train/loss"] for row in whole[-5:]]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_whisper(tmp_path_factory.mktemp("whisper") / "tiny", 80)


def small_whisper(folder: Path, bands: int) -> Path:
    """A small model of Whisper's form, as transformers saves it."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = dict(encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    torch.manual_seed(0)
    marks: dict[str, Any] = {**dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0), "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **marks, d_model=32, num_mel_bins=bands, max_source_positions=150, vocab_size=99)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bands", [80, 128])  # 128: large-v3 and its turbo form
def test_whispers_encoder_is_transformers_encoder(tmp_path: Path, bands: int) -> None:
    from transformers import WhisperForConditionalGeneration

    folder = small_whisper(tmp_path, bands)
    theirs, ours = WhisperForConditionalGeneration.from_pretrained(folder).eval(), load_pretrained(folder)
    features = torch.randn(2, 300, bands)
    with torch.no_grad():
        difference = theirs.model.encoder(features.transpose(1, 2)).last_hidden_state - ours(features)
    assert difference.abs().max() < 1e-5


def test_fine_tuning_takes_the_features_that_whispers_encoder_reads(whisper: Path, table: Path) -> None:
    typed = [o for o in SETTINGS if not o.startswith(("model", "data.sample_rate", "data.mels", "data.context"))]
    start = ["stage=finetune", f"stage.init_from={whisper}", f"data.file={table}", f"paths.data={table.parent / 'cache'}"]
    config = compose([*typed, *start])
    data = config["data"]
    assert (data["sample_rate"], data["mels"], data["scaling"], data["frames_per_token"], data["context_length"]) == (16000, 80, "whisper", 2, 150)
    with pytest.raises(ConfigError, match=r"data\.frames_per_token=4: the model reads 2 frames for a token"):
        compose([*typed, *start, "data.frames_per_token=4"])
    first = run_ranks(1, steps_of, table, [*typed, *start, "stage.freeze=['blocks.0.*']"], "tuned")[0]
    lora = ["stage.lora.rank=2", "stage.layer_decay=0.9", "strategy=fsdp", "trainer.devices=2"]
    second = run_ranks(2, steps_of, table, [*typed, *start, *lora], "lora")[0]
    assert len(first) == len(second) == 3


def steps_of(table: Path, overrides: list[str], name: str) -> list[dict[str, Any]]:
    more = ["trainer.max_steps=3", "trainer.log_every_n_steps=1", "trainer.val_check_interval=3", "~callbacks.checkpoint", "optimizer=adamw"]
    return jobs._run(table.parent / name, compose([*overrides, *more]), False)


def test_a_damaged_encoder_is_refused(whisper: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(whisper / "model.safetensors")
    (tmp_path / "config.json").write_bytes((whisper / "config.json").read_bytes())
    del weights["model.encoder.conv1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks encoder\.conv1\.bias, which a Whisper of its config\.json has"):
        load_pretrained(tmp_path)


def test_an_encoder_of_speech_is_exported_as_a_graph(run: Path, tmp_path: Path) -> None:
    done = meshformer("export", f"run={run}", "format=torch_export", f"output={tmp_path / 'a.pt2'}")
    assert done.returncode == 0, done.stderr
    program, model = torch.export.load(tmp_path / "a.pt2").module(), load_pretrained(run)
    features, documents = torch.randn(3, 80, 32), torch.zeros(3, 20, dtype=torch.int64)
    with torch.no_grad():
        assert (program(features, documents_BT=documents) - model(features, documents_BT=documents)).abs().max() < 1e-5
    for words, told in (
        (["export", "format=litert"], "format=litert: is for models of text and images"),
        (["convert", "to=tfrecord"], "to=tfrecord: writes text and images, and the run's data is recordings"),
    ):
        refused = meshformer(*words, f"run={run}", f"output={tmp_path / 'other'}")
        assert refused.returncode != 0 and told in refused.stderr and not (tmp_path / "other").exists(), refused.stderr
    refused = meshformer("export", f"run={run}", "format=huggingface", f"output={tmp_path / 'hf'}")
    assert refused.returncode != 0 and "Whisper" in refused.stderr and not (tmp_path / "hf").exists()
