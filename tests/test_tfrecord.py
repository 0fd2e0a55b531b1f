"""`data=tfrecord` and `convert to=tfrecord`, from the command to the loss."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs import TINY, _run, labelled_file, run_labelled, run_tiny
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config.errors import ConfigError

THEIRS = Path(__file__).parent / "data" / "tensorflow"
PLAIN = f"data.files={THEIRS}/plain.tfrecord"
OURS = [word for word in TINY if word != "data=text"]
IMAGES = ["data.image_feature=image", "data.label_feature=label", "task=image_classification", "model=vit_tiny"]
SHORT = ["trainer.max_steps=3", "schedule=constant", "trainer.val_check_interval=3"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfrecord")


def train(work: Path, name: str, *overrides: str) -> list[dict]:
    return _run(work / name, compose([*OURS, "data=tfrecord", f"paths.data={work}/cache", f"paths.runs={work}/runs", *SHORT, *overrides]), False)


def files(folder: Path, *splits: str) -> list[str]:
    keys = {"train": "files", "val": "validation_files", "test": "test_files"}
    return [f"data.{keys[split]}={folder}/{split}-*.tfrecord" for split in splits]


def figures(rows: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [{name: value for name, value in row.items() if name.startswith(("train/loss", "train/grad", "val/"))} for row in rows]


def test_text_written_as_records_trains_to_the_same_losses(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = run_tiny(work, "text", *SHORT)
    assert main(["convert", f"run={work}/text", "to=tfrecord", f"paths.data={work}/cache"]) == 0
    folder = work / "text" / "exports" / "tfrecord"
    printed = capsys.readouterr().out
    assert str(folder) in printed and "data.tokens_feature=tokens" in printed and len(list(folder.glob("*.idx"))) == 3
    rows = train(work, "again", *files(folder, "train", "val", "test"), "data.tokens_feature=tokens")
    assert figures(rows) == figures(expected) and len(rows) == 3 and rows[-1]["val/bits_per_byte"] > 1
    (work / "text" / "exports" / "tfrecord" / "mine").write_text("x")
    assert main(["convert", f"run={work}/text", "to=tfrecord", f"paths.data={work}/cache"]) == 2
    assert "it is there already" in capsys.readouterr().err and (folder / "mine").read_text() == "x"


def test_labelled_texts_written_as_records_train_to_the_same_losses(work: Path) -> None:
    labelled_file(work)
    task = ["task=sequence_classification"]
    expected = run_labelled(work, "mails", *task, "data.label_column=label", *SHORT)
    assert main(["convert", f"run={work}/mails", "to=tfrecord", f"paths.data={work}/cache", f"output={work}/mails-records"]) == 0
    named = ["data.text_feature=text", "data.label_feature=label"]
    rows = train(work, "mails-again", *task, *files(work / "mails-records", "train", "val"), *named)
    assert figures(rows) == figures(expected)


def test_images_of_tensorflow_are_learnt_and_written_again(work: Path) -> None:
    vision = ["task=image_classification", "model=vit_tiny", "data.image_size=4", "model.patch_size=2", "data.batch_size=4"]
    named = ["data.image_feature=image", "data.label_feature=label"]
    own = [word for word in OURS if not word.startswith(("model", "data"))]
    common = ["data=tfrecord", *own, f"paths.data={work}/cache", f"paths.runs={work}/runs", *SHORT, *vision, *named]
    config = compose([*common, PLAIN, "data.classes=[light,dark]"])
    expected = _run(work / "images", config, False)
    assert main(["convert", f"run={work}/images", "to=tfrecord", f"paths.data={work}/cache"]) == 0
    again = compose([*common, *files(work / "images" / "exports" / "tfrecord", "train", "val"), "data.classes=[light,dark]"])
    assert figures(_run(work / "images-again", again, False)) == figures(expected)


def test_ids_without_a_tokenizer_are_learnt_and_shown_as_numbers(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["data.context_length=4", "data.batch_size=2", "callbacks.checkpoint.every_n_steps=3"]
    own = [word for word in OURS if word != "~callbacks.samples"]  # a sample is drawn from an empty prompt: its line end is no id
    settings = ["data=tfrecord", f"data.files={THEIRS}/*.tfrecord*", "data.tokens_feature=tokens", f"paths.data={work}/cache"]
    rows = _run(work / "ids", compose([*own, *settings, f"paths.runs={work}/runs", *SHORT, *small]), False)
    assert len(list((work / "ids" / "samples").iterdir())) == 1
    assert rows[-1]["val/loss"] > 0 and "val/bits_per_byte" not in rows[-1]
    assert main(["generate", f"run={work}/ids", "prompt=3 4", "max_tokens=3"]) == 0
    out = capsys.readouterr().out.split()
    assert out[-5:-3] == ["3", "4"] and all(word.isdecimal() for word in out[-5:])
    from tokenizers import Tokenizer

    from meshformer.job.export import _tokenizer

    theirs = Tokenizer.from_str(_tokenizer(work / "ids" / "tokenizer.json"))
    assert theirs.encode("3 14 15").ids == [3, 14, 15] and theirs.decode([3, 14]) == "3 14"


def test_a_run_whose_data_a_class_of_the_users_reads_is_written_only_if_it_is_allowed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(run_folder(work), work / "foreign"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("meshformer.data.TextFiles", "os.system"))
    assert main(["convert", f"run={run}", "to=tfrecord"]) == 2
    assert "os.system" in capsys.readouterr().err and not (run / "exports" / "tfrecord").exists()


def run_folder(work: Path) -> Path:
    if not (work / "plain").is_dir():
        run_tiny(work, "plain", *SHORT)
    return work / "plain"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([PLAIN], "data=tfrecord: says nothing about what the records hold"),
        ([PLAIN, "data.text_feature=text", "data.tokens_feature=tokens"], "data.tokens_feature=tokens: data.text_feature is given too"),
        ([PLAIN, "data.image_feature=image"], "data.label_feature: images are learnt with their classes"),
        ([PLAIN, "data.tokens_feature=tokens", "data.label_feature=label"], "data.label_feature=label: labels belong to texts or images"),
        ([PLAIN, "data.text_feature=txt"], "data.text_feature=txt: record 1 of .* has no such feature. Its features are: edges, empty"),
        ([PLAIN, "data.text_feature=text", "data.label_feature=nix"], "data.label_feature=nix: record 1 of"),
        (["data.files=nowhere/*.tfrecord", "data.text_feature=text"], "data.files=nowhere.*no file has a name like that"),
        ([PLAIN, "data.text_feature=text", "data.validation_files=nowhere*"], "data.validation_files=nowhere.*no file has a name like that"),
        ([f"data.files={THEIRS}", "data.text_feature=text"], "is a folder. Use data.files='.*tfrecord' for the records in it"),
        ([f"data.files={THEIRS}/write.py", "data.text_feature=text"], "it is no TFRecord file, or damaged"),
        ([PLAIN, *IMAGES], r"model.image_size: is taken from the data, which has none. .* or give data.image_size"),
        ([PLAIN, "data.text_feature=text", "task=sequence_classification"], r"is running text. Add data.label_feature=…"),
    ],
)
def test_mistakes_are_one_sentence_before_the_start(overrides: list[str], message: str) -> None:
    own = [word for word in OURS if not (word.startswith("model") and "model=vit_tiny" in overrides)]
    with pytest.raises(ConfigError, match=message):
        compose([*own, "data=tfrecord", *overrides])


def test_a_missing_package_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "google_crc32c" else real(name, *rest))
    with pytest.raises(ConfigError, match=r"pip install 'meshformer\[tfrecord\]'"):
        compose([*OURS, "data=tfrecord", PLAIN, "data.text_feature=text"])
    assert main(["convert", f"run={run_folder(work)}", "to=tfrecord"]) == 2
    assert "google-crc32c" in capsys.readouterr().err
