"""The pages of docs/ and the README as tests read them: their blocks, their commands, and a folder in which the commands make sense."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import TINY, labelled_file, text_file
from meshformer.bench.tones import texts, write_table
from meshformer.cli import main
from meshformer.command import helptext
from spoken import tiny_whisper

ROOT = Path(__file__).parents[1]
DAMAGED = ("one", "all", "swapped", "linked")  # runs: one checkpoint, or all; those of another model; a folder that leads out
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str  # bash, console, python, …
    text: str


def blocks(*kinds: str) -> Iterator[Block]:
    """The fenced blocks of all pages that are of one of the kinds; of no kind given, all."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if not kinds or match[1] in kinds:
                yield Block(page.relative_to(ROOT).as_posix(), text[: match.start()].count("\n") + 1, match[1], match[2])


def commands() -> Iterator[tuple[str, str]]:
    """(where, command) of every line of a bash block, and of every `meshformer …`, `make …` or `python -m …` in a sentence or a table."""
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield block.page, line
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"(?<!`)`((?:meshformer|make|python)(?: -m)? [^`]+)`(?!`)", prose):
            if "…" not in span and not re.search(r"\b[A-Z]{3,}\b(?!=)", span.replace("ARGS", "")):
                yield page.relative_to(ROOT).as_posix(), span


def help_commands() -> Iterator[str]:
    """The examples of `meshformer COMMAND --help`, which are on the page of the commands."""
    for text in helptext.EXAMPLES.values():
        yield from re.findall(r"^  (meshformer .*?)(?: {2,}.*)?$", text, re.MULTILINE)


def dialogues() -> Iterator[tuple[str, str, str]]:
    """(page, command, lines that it prints, among others) of the console blocks; `…` in a line stands for anything."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield block.page, command, printed.strip()


def words_of(command: str) -> list[str]:
    """As bash splits it, without what stands behind a #."""
    return shlex.split(command, comments=True)


def workplace(folder: Path) -> None:
    """What the commands of the pages name, each as small as it can be: texts, tables, runs, one of them damaged."""
    (folder / "texts").mkdir()
    text = text_file(folder)
    shutil.copy(text, folder / "texts" / "a.txt")
    (folder / "a.txt").write_bytes(b"caf\xe9 and more\n")
    with labelled_file(folder).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, columns in {"mails": ("text", "label:folder"), "names": ("text", "tags"), "pairs": ("text", "other:answer")}.items():
        names = [column.split(":") for column in columns]
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[n[-1] for n in names], *([row[n[0]] for n in names] for row in rows)])
    (folder / "commas.csv").write_text("text,label\nshort,a\nlong, with a comma,b\n")
    speech(folder)
    (folder / "records").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "tensorflow" / "plain.tfrecord", folder / "records")
    (folder / "used").mkdir()
    (folder / "used" / "notes.txt").write_text("mine")
    run = folder / "runs" / "my_sweep" / "2026-11-24_10-00-00-3f0a"
    as_llama = ["model.qk_norm=false", "model.activation=swiglu", "model.zero_init=false", "model.context_length=128"]
    train(folder, run, "callbacks.checkpoint.every_n_steps=2", "callbacks.profile.steps=[2,3]", *as_llama)
    for name in ("runs/my_sweep/2026-11-24_10-00-05-81c2", "runs/shakespeare_char/2026-11-24_11-00-00-5e1d", *(f"damaged/{n}" for n in DAMAGED)):
        shutil.copytree(run, folder / name)
    damaged = folder / "damaged"
    for checkpoint in [damaged / "one" / "checkpoints" / "step-00000004", *(damaged / "all" / "checkpoints").glob("step-*")]:
        piece = next(checkpoint.glob("*.distcp"))
        piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    train(folder, damaged / "wide", "model.d_model=64")
    shutil.rmtree(damaged / "swapped" / "checkpoints")
    (damaged / "wide" / "checkpoints").rename(damaged / "swapped" / "checkpoints")
    (damaged / "linked" / "samples").symlink_to(folder / "texts")
    assert main(["convert", f"run={run}", "to=single", f"output={folder}/step-00000500.ckpt"]) == 0
    assert main(["export", f"run={run}", "format=huggingface", f"output={folder}/models/gpt2"]) == 0
    shutil.copytree(folder / "models" / "gpt2", folder / "models" / "llama")
    start = ["model=transformers", f"model.path={folder}/models/llama", "stage=finetune", "stage.lora.rank=2", "stage.lora.targets=[q_proj]"]
    train(folder, folder / "adapted", "callbacks.checkpoint.every_n_steps=2", *start)
    assert main(["export", f"run={folder}/adapted", "format=adapter", f"output={folder}/adapters"]) == 0


def speech(folder: Path) -> None:
    """Recordings, a run that reads them, and a tiny model of Whisper's form."""
    write_table(folder / "calls", texts(30)).rename(folder / "calls" / "calls.csv")
    for file in (folder / "calls").iterdir():
        file.rename(folder / file.name)
    (folder / "calls").rmdir()
    shutil.copy(folder / "0.wav", folder / "hello.wav")
    kind = ["task=speech_recognition", "model=speech_nano", "data=audio_csv", f"data.file={folder}/calls.csv", f"paths.data={folder}/cache"]
    small = ["model.d_model=16", "model.n_layers=1", "trainer.max_steps=1", "trainer.progress=false", "logger=csv"]
    assert main(["train", *kind, *small, f"hydra.run.dir={folder}/heard/speech_prompts/2026-11-30_10-00-00-7ae8"]) == 0
    tiny_whisper(folder / "models" / "whisper")


def train(folder: Path, run: Path, *overrides: str) -> None:
    own = [f"data.files=[{folder}/text.txt]", f"paths.data={folder}/cache", f"hydra.run.dir={run}", "trainer.max_steps=4"]
    tiny = [o for o in TINY if not o.startswith("model")] if "model=transformers" in overrides else TINY
    assert main(["train", *tiny, *own, *overrides]) == 0
