"""What the pages of docs/ and the README say is so: every command is one, every key is on its page, every dialogue is printed as it stands.
The pages of docs/make_it_yours are executed by test_make_it_yours.py and test_own_model.py, the messages by test_troubleshooting.py."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import pages
from meshformer.bench import __main__ as bench
from meshformer.bench import examples
from meshformer.cli import main
from meshformer.command import compose
from meshformer.command import jobs as commands
from meshformer.config import ConfigError, schema
from meshformer.huggingface import pinned
from pages import PAGES, ROOT

COMMANDS = sorted(set(pages.commands()))
SITE = yaml.load((ROOT / "docs" / "site" / "mkdocs.yml").read_text(), yaml.BaseLoader)


def load_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


# --- commands


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    pages.workplace(folder)
    for page in (ROOT / "docs" / "make_it_yours").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name, code in re.findall(r"`([\w/]+\.(?:py|yaml))`[^`]*?:?\n\n```(?:python|yaml)\n(.*?)```", text, re.DOTALL):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(code, encoding="utf-8")
    return folder


@pytest.fixture
def place(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace, to work in."""
    folder = tmp_path / "here"
    shutil.copytree(workplace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where no job starts: commands go as far as to its door."""
    monkeypatch.setattr("meshformer.command.jobs._launch", lambda config, folder: None)
    monkeypatch.setattr("meshformer.command.jobs._train_both", lambda argv, first: commands.run_command("train", first.arguments))
    monkeypatch.setattr("meshformer.command.sweep.run.run_sweep", check_sweep)
    known = pinned.folder  # the page needs no download of 140 MB
    whisper = place / "models" / "whisper"
    monkeypatch.setattr(pinned, "folder", lambda name, cache=None: whisper if name == "whisper-base" else known(name, cache))
    for name in ("convert", "export", "evaluate", "generate"):
        monkeypatch.setattr(f"meshformer.job.{name}.{name}", lambda *options: None)
    # An environment of its own, which `make litert` makes; tests/test_litert.py has what is said without it.
    monkeypatch.setattr("meshformer.command.conversion._litert", lambda model, settings: settings)
    return place


def check_sweep(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Composes as many points of a grid as it takes to meet each value of each axis once."""
    own, axes = {}, []
    searched = any(word.startswith(("sweep.search=", "sweep=search", "sweep=pareto")) for word in overrides)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, word = override.key_or_group, override.input_line or ""
        if key.startswith("sweep."):
            own[key.partition(".")[2]] = override.value()
        elif key == "sweep":
            assert (ROOT / "conf" / "sweep" / f"{override.value()}.yaml").is_file()
        elif override.is_sweep_override() and not searched:
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif key == "hydra/launcher":
            known = [file.stem for file in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml")]
            assert override.value() in [*known, "submitit_local"]
        elif key.startswith("hydra.launcher."):
            options = [set(yaml.safe_load(file.read_text())) for file in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml")]
            assert any(key.split(".")[2] in keys for keys in options), key
        elif not override.is_sweep_override():
            axes.append([word])
    schema.validate({"sweep": own}, schema.SweepOptions)
    for point in itertools.zip_longest(*axes) if axes else ():
        compose.compose([word or axis[-1] for word, axis in zip(point, axes, strict=True)], config_dir=args.config_dir)
    return 0


def check_meshformer(arguments: list[str]) -> None:
    if arguments[:1] == ["doctor"] or "--help" in arguments or "-sc" in arguments:
        assert len(arguments) <= 2
        return
    # Counting memory takes half a minute for each command; tests/plan/test_live_memory.py does it.
    assert main([*arguments, *["--quick"] * (arguments[:1] == ["plan"])]) == 0


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The option parsers are the real ones, what they call is not."""
    if arguments[0] == "-m" and arguments[1] == "meshformer.bench":
        for name in bench.MEASUREMENTS:
            monkeypatch.setitem(bench.MEASUREMENTS, name, lambda options: None)
        assert bench.main(arguments[2:]) == 0
    elif arguments[:2] == ["-m", "meshformer.bench.examples"]:
        monkeypatch.setattr(examples, "train_missing", lambda *about: None)
        monkeypatch.setattr(examples, "draw", lambda *about: None)
        assert examples.main(arguments[2:]) == 0
    elif arguments == ["-m", "build"]:  # tests/test_wheel.py builds with the backend that it calls
        assert 'build-backend = "hatchling.build"' in (ROOT / "pyproject.toml").read_text()
    else:
        assert arguments[0].endswith(".py") and (ROOT / arguments[0]).is_file()


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "meshformer":
        check_meshformer(arguments)
    elif program == "torchrun":
        at = arguments.index("meshformer.cli")
        assert arguments[at - 1] == "-m" and all(word.startswith("--") for word in arguments[: at - 1])
        across_nodes(arguments[at + 1 :], monkeypatch)
    elif program == "srun":
        at = arguments.index("meshformer")
        across_nodes(arguments[at + 1 :], monkeypatch)
    elif program in ("python", "python3"):
        check_python(arguments, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[:1] == [] or arguments[0] in targets
        for word in arguments[1:]:
            assert word.startswith("ARGS=")
            if arguments[0] == "train":
                check_meshformer(["train", *word.removeprefix("ARGS=").split()])
    elif words[-4:] == ["install", "torch==2.13.0", "-e", "."]:  # with pip or uv; the torch that the Makefile names
        assert words in (["pip", *words[-4:]], ["uv", "pip", *words[-4:]]) and "TORCH := torch==2.13.0" in (ROOT / "Makefile").read_text()
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2], re.MULTILINE)
        named = re.fullmatch(r"meshformer\[(\w+)\]", arguments[1])
        assert arguments[0] == "install" and named is not None and named[1] in extras
    elif program == "jupyter":
        assert (ROOT / arguments[-1]).is_dir()
    elif program == "eval":
        assert arguments == ["$(meshformer -sc install=bash)"]
    else:
        assert words == ["source", ".venv/bin/activate"], f"no check for {program}"


def across_nodes(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first of 32 processes on four nodes, of torchrun's or of a SLURM job's, in a folder that exists here."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    check_meshformer([word.replace("/shared", "shared") for word in arguments] + ["data.batch_size=32"])


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_every_command_of_the_pages_is_one(page: str, command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "docs/guides/speech.md":  # its last run reads recordings
        shutil.rmtree(here / "runs")
        (here / "heard").rename(here / "runs")
    check(pages.words_of(command), monkeypatch)


@pytest.mark.parametrize("command", pages.help_commands())
def test_every_example_of_the_help_is_a_command(command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The run here is shorter, and was trained on files of its own.
    command = command.replace("checkpoint=500", "checkpoint=2").replace(" data=kjv", "")
    check(pages.words_of(command), monkeypatch)


@pytest.mark.parametrize(("page", "command", "printed"), list(pages.dialogues()), ids=lambda text: text[:60])
def test_every_dialogue_is_printed_as_it_stands(
    page: str, command: str, printed: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = pages.words_of(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    assert words[0] == "meshformer"
    code = main(words[1:])
    told = capsys.readouterr()
    said, lines = told.out + told.err, [".*".join(re.escape(part) for part in line.split("…")) for line in printed.splitlines()]
    assert code == (2 if "error:" in printed else 0)
    assert "Traceback" not in said
    assert re.search(r"[\s\S]*".join(f"^{line}$" for line in lines), said, re.MULTILINE), said


def templates() -> list[re.Pattern[str]]:
    """The texts in the code as patterns: what a format string fills in may be anything. Those of a few letters alone would fit too much."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
            texts = [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None for part in parts]
            if len("".join(text or "" for text in texts)) >= 16:
                found.add("".join(".+" if text is None else re.escape(text) for text in texts))
    return [re.compile(pattern) for pattern in found]


def test_every_message_without_a_command_is_a_text_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    known = templates()
    assert len(messages) >= 13
    assert [message for message in messages if not any(pattern.fullmatch(message) for pattern in known)] == []
    assert not any(pattern.fullmatch("rank 1 died silently (killed, or out of memory)") for pattern in known)


def test_the_python_of_the_guides_runs(here: Path) -> None:
    """Blocks beside those of make_it_yours, one after the other, with small tensors for those that a page takes for granted."""
    tensors = {"tokens_BT": torch.zeros(2, 8, dtype=torch.long), "mask_BT": torch.zeros(2, 8, dtype=torch.long)}
    found = [block for block in pages.blocks("python") if "make_it_yours" not in block.page]
    assert {block.page for block in found} == {f"docs/guides/{name}.md" for name in ("analysis", "pretrained_weights", "transformers")}
    shutil.copytree(here / "adapters", here / "my-adapter")  # what the command above that block writes, which goes to the door only
    for block in found:
        exec(compile(block.text, block.page, "exec"), dict(tensors))
    shutil.rmtree(here / "my-adapter")
    assert (here / "curves.pdf").is_file() and (here / "curves.svg").is_file()


# --- what is generated


def keys_of(kind: type, path: str = "") -> Iterator[str]:
    for spec in dataclasses.fields(kind):
        inside = getattr(schema, str(spec.type), None)
        if isinstance(inside, type) and dataclasses.is_dataclass(inside):
            yield from keys_of(inside, f"{path}{spec.name}.")
        else:
            yield f"{path}{spec.name}"


def test_every_key_of_the_schema_is_on_its_page() -> None:
    page = hooks.configuration()
    kinds = (schema.Root, schema.SweepOptions, schema.Evaluate, schema.Generate, schema.Convert, schema.Export)
    keys = [key for kind in kinds for key in keys_of(kind)]
    assert len(keys) > 100 and "strategy.microbatches" in keys and "stage.lora.rank" in keys
    assert [key for key in keys if f"| `{key}` |" not in page] == []


def test_every_comment_in_conf_is_on_a_page() -> None:
    """In cells as Markdown takes them."""
    text = hooks.configuration() + hooks.options()
    files = [file for file in (ROOT / "conf").rglob("*.yaml") if not {"hydra", "experiment", "sweep", "cluster", "plan.yaml"} & set(file.parts)]
    behind = {comment for file in files for comment in hooks._comments_of(file, "").values()}
    lost = [comment for comment in behind if hooks._cell(comment) not in text]
    # Keys that stand in several files are told once, by the file that has all of them.
    assert len(lost) <= 6 and len(behind) > 80, lost


def test_every_key_and_file_of_a_cluster_is_on_its_page() -> None:
    page = (ROOT / "docs" / "guides" / "which_layout.md").read_text(encoding="utf-8")
    for file in (ROOT / "conf" / "cluster").glob("*.yaml"):
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert f"`{file.stem}`" in page and [key for key in keys if f"`cluster.{key}`" not in page] == []


def test_every_option_is_on_its_page() -> None:
    page = hooks.options()
    for file in (ROOT / "conf").rglob("*/*.yaml"):
        if "hydra" not in file.relative_to(ROOT / "conf").parts[:1]:
            assert f"| `{file.stem}` |" in page
    assert "| `alibi` | To run on longer texts than trained on" in page


def test_every_placeholder_of_a_page_is_filled() -> None:
    filled = {page.name: hooks.on_page_markdown(page.read_text(encoding="utf-8")) for page in PAGES}
    assert [name for name, text in filled.items() if "{{" in text] == []
    assert "def optimizer_step(" in filled["one_step.md"]


def test_the_house_is_that_of_the_test() -> None:
    from test_imports import FLOORS

    assert all(f"`{room}`" in hooks.floors() for room in FLOORS)
    assert "from hydra._internal" in hooks.source("compat/hydra.py")


# --- the pages


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    listed = set(re.findall(r"[\w/]+\.md", str(SITE["nav"])))
    generated = {"reference/options.md", "reference/configuration.md", "reference/commands.md"}
    written = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"}
    assert listed == written | generated
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                inside = (page.parent / target).resolve()
                assert inside.exists() or inside.relative_to(ROOT / "docs").as_posix() in generated, f"{page.name}: {target}"


def test_every_file_that_a_page_names_is_there() -> None:
    """By its name: files move between rooms."""
    known = {file.name for folder in ("src", "tests", "docs", "notebooks", "conf") for file in (ROOT / folder).rglob("*") if file.is_file()}
    mine = {"a.txt", "mails.csv", "names.csv", "pairs.csv", "sweep.html", "gpu.json", "events", "b.txt"}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(r"`(?:[\w./]*/)?(\w+\.py)`", text):
            assert name in known | mine or name.startswith("my_"), f"{page.name}: {name}"


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 160
    assert sum(line.startswith("![") for line in lines) == 1, "one figure"


def test_words_that_are_ours_alone_are_not_on_the_pages() -> None:
    for page in PAGES:
        words = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8")).lower()
        assert not re.search(r"\b(carriers?|levers?|asked freely|give back|outside's)\b", words), page


def test_the_site_takes_nothing_from_the_network() -> None:
    assert SITE["theme"]["font"] == "false"
    assert not re.search(r"https?://", (ROOT / "docs" / "site" / "mkdocs.yml").read_text())


def test_no_command_is_forgotten() -> None:
    assert len(COMMANDS) > 60 and {page for page, _ in COMMANDS} >= {"README.md", "docs/index.md", "docs/guides/sweeps.md", "docs/guides/slurm.md"}
    assert {block.kind for block in pages.blocks()} <= {"bash", "console", "python", "yaml", "text"}, "a block of another kind is not checked"


WRONG = [
    "meshformer train model=nanoo", "meshformer train -m seed=1,2 model=nano,nanoo", "meshformer train -m sweep.trails=3", "make trian",
    "python -m meshformer.bench spead", "pip install 'meshformer[slrum]'", "meshformer evaluate run=lost",
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_command_is_found(wrong: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ConfigError, SystemExit)):
        check(pages.words_of(wrong), monkeypatch)
