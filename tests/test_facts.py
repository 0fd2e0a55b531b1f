"""Each fact stands once: what a class is or does is said in the class, not by its name elsewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import meshformer
from meshformer.command.compose import compose
from meshformer.config import ConfigError, schema
from meshformer.config.degrees import AXES
from meshformer.config.paths import conf_dir
from meshformer.config.signature import defaults, signature
from meshformer.model import Transformer
from meshformer.model.settings import HEAD_PARAMETERS, PARTS, SHAPES
from meshformer.parallel.check import OF_AXIS, OF_MESH, UNSET

ROOT = Path(meshformer.__file__).parent
DOTTED = re.compile(r"(?:[a-z_]\w*\.)*([A-Z]\w*)")
COMPONENTS = ("model/", "tasks/", "callbacks/", "data/", "optim/", "parallel/")  # the rooms of what a configuration may name
# Files that may name classes of ours in strings, and why.
NAMES_CLASSES = {
    "huggingface/bert.py": ({"embeddings.LayerNorm"}, "the name of a tensor in BERT"),
    "huggingface/parts.py": ({*(f"meshformer.model.{kind}Transformer" for kind in ("", "Vision", "Speech")), "Learned", "Rotary"},
        "foreign weights become a node as in conf/model/, whose `_target_` is such a name"),
    "config/foreign.py": ({"meshformer.callbacks.Pruning"}, "the `_target_` that a search writes"),
    "config/schema.py": ({"meshformer.model.layout.Plan"}, "the settings of `model.plan` are read from that class, without torch"),
    "command/lightning_parts.py": ({"meshformer.tasks.PlainTask"}, "the task that a user's LightningModule becomes in a configuration"),
    "command/stock.py": ({"Checkpoint", "ProgressBar"}, "Lightning's classes of these names"),
}  # fmt: skip


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def class_names_in_strings(tree: ast.Module, classes: set[str]) -> set[str]:
    """Strings that are, as a whole, the name of one of our classes, with or without its module; annotations in quotes are no strings here."""
    exported = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    annotations = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation]
    annotations += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.returns]
    quoted = {id(part) for annotation in exported + annotations for part in ast.walk(annotation)}
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quoted]
    return {text for text in texts if (found := DOTTED.fullmatch(text)) and found[1] in classes}


def test_no_class_of_ours_is_known_by_its_name():
    parsed = dict(trees())
    components = [tree for file, tree in parsed.items() if file.startswith(COMPONENTS)]
    classes = {node.name for tree in components for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert {"Transformer", "LanguageModelling", "Checkpoint"} <= classes
    # An __init__ lists what the room exports.
    found = {file: class_names_in_strings(tree, classes) for file, tree in parsed.items() if not file.endswith("__init__.py")}
    assert {file: names for file, names in found.items() if names} == {file: names for file, (names, _) in NAMES_CLASSES.items()}


# --- a default


def differing(node: dict[str, Any], usual: dict[str, Any], key: str) -> dict[str, Any]:
    """What a YAML file gives that its class, or the schema, has another default for. An interpolation gives nothing of its own."""
    given = {name: value for name, value in node.items() if name in usual and not str(value).startswith("${")}
    return {f"{key}.{name}": value for name, value in given.items() if value != (list(u) if isinstance(u := usual[name], tuple) else u)}


def nodes(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from nodes(child, f"{key}.{name}" if key else str(name))


# What the recipes choose in conf/ where the code's default is another, by the file: for a network, a run and an experience of this size.
CHOSEN = {
    "model/custom.yaml": {"model.zero_init"}, "model/vit_tiny.yaml": {"model.zero_init", "model.pooling"},
    "model/speech_nano.yaml": {"model.zero_init"},
    "optimizer/adamw.yaml": {"optimizer.lr", "optimizer.betas"}, "optimizer/muon.yaml": {"optimizer.lr", "optimizer.adamw_lr"},
    "schedule/cosine.yaml": {"schedule.warmup_steps", "schedule.min_ratio"}, "schedule/linear.yaml": {"schedule.warmup_steps"},
    "schedule/wsd.yaml": {"schedule.warmup_steps", "schedule.decay_fraction"},
    "logger/wandb.yaml": {"logger.wandb.project"},
    "model/position/rotary_llama3.yaml": {"model/position.base"},
    "trainer/default.yaml": {"trainer.gradient_clip_val", "trainer.compile"},  # a recorded run may be older than compile=auto
    "stage/finetune.yaml": {"stage.init_from", "stage.lr_scale"},
}  # fmt: skip


def test_a_default_that_a_file_repeats_is_the_codes():
    found: dict[str, set[str]] = {}
    sections = {"strategy": schema.Strategy, "trainer": schema.Trainer, "stage": schema.Stage}
    for file in sorted(conf_dir().rglob("*.yaml")):
        group, content = file.parent.relative_to(conf_dir()).as_posix(), yaml.safe_load(file.read_text(encoding="utf-8"))
        differences: dict[str, Any] = {}
        for key, node in nodes(content, "" if group in (".", "task") else group):
            differences |= differing(node, defaults(node["_target_"]), key)
        if group in sections:
            differences |= differing(content, values(sections[group]), group)
        for section in ("data", "launch", "sweep") if file.name == "train.yaml" else ():
            differences |= differing(content[section], values(getattr(schema, section.capitalize())), section)
        if group == "strategy":  # a file of it is its degrees
            differences = {key: value for key, value in differences.items() if key.partition(".")[2] not in AXES}
        if differences:
            found[file.relative_to(conf_dir()).as_posix()] = set(differences)
    assert found == CHOSEN


def values(section: Any) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(section) if field.default is not dataclasses.MISSING]
    made = {f.name: f.default_factory() for f in dataclasses.fields(section) if f.default_factory is not dataclasses.MISSING}
    return {field.name: field.default for field in fields} | made


def test_the_layouts_of_the_schema_are_the_files(monkeypatch, tmp_path):
    assert {"single", "mesh", "fsdp_tensor"} <= set(schema.layouts())
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "spiral.yaml").write_text("name: spiral\n")
    monkeypatch.setattr(schema, "conf_dir", lambda: tmp_path)
    section = schema._section({"name": "spiral"}, schema.Strategy, "strategy", ())
    assert section["name"] == "spiral" and section["tensor"] == 1
    with pytest.raises(ConfigError, match=r"strategy\.name=mesh: expected spiral"):
        schema._section({"name": "mesh"}, schema.Strategy, "strategy", ())


def test_what_a_layout_does_without_is_what_it_gets_unasked():
    """The mesh's file and the check that refuses ignored settings mean the same by a default: `auto` is what resolve makes of it."""
    asked = yaml.safe_load((conf_dir() / "strategy" / "mesh.yaml").read_text(encoding="utf-8"))
    settled = compose(["strategy=mesh"])["strategy"]
    for setting in (*OF_AXIS, *OF_MESH):
        assert UNSET[setting] == settled[setting], setting
        assert asked[setting] in ("auto", UNSET[setting]), setting


# --- a number, and names of tensors


def test_facts_of_the_models_stand_once():
    """The target that is not counted, the width of SwiGLU, the names of a tied matrix, what a new head is drawn anew."""
    once = {r"(?<![\d.\w])-100\b": {"checkpoint/write.py", "model/settings.py"}, r"8 \* \w+ // 3|8 \* \w+\[.d_model.\] // 3": {"model/settings.py"},
            r"\"head\.weight\": \"embedding": {"model/settings.py"}, r"norm\.dense\.": {"model/settings.py"}}  # fmt: skip
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in sorted(ROOT.rglob("*.py"))}
    for pattern, places in once.items():
        assert {file for file, text in texts.items() if any(re.search(pattern, line) for line in code(text))} == places, pattern


def code(text: str) -> list[str]:
    """The lines of a file without docstrings, where facts are explained."""
    tree, lines = ast.parse(text), text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for line in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[line] = ""
    return lines


def test_what_a_new_head_draws_anew_is_the_end_of_the_models_plan():
    with torch.device("meta"):
        model = Transformer(7, 1, 2, 8, 4, tie_embeddings=False, norm_position="post", head_transform=True, head_bias=True)
    drawn = {name for name, _ in model.named_parameters() if any(fnmatchcase(name, one) for one in HEAD_PARAMETERS)}
    assert drawn == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{part}." for part in Transformer.plan.head))}
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} <= set(PARTS)
    known = {name for kind in ("Transformer", "SpeechTransformer") for name in signature(f"meshformer.model.{kind}").parameters}
    assert set(SHAPES) - {"_target_"} <= known


# --- a room's exports


@pytest.mark.parametrize("room", ["model", "tasks"])
def test_what_a_room_exports_is_listed_alike_for_people_and_for_python(room):
    module = importlib.import_module(f"meshformer.{room}")
    (listed,) = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    found: dict[str, tuple[str, ...]] = {}
    for node in listed.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        found[node.module] = found.get(node.module, ()) + tuple(alias.name for alias in node.names)
    assert found == module._HOME
    assert all(getattr(module, name).__name__ == name and name in dir(module) for names in module._HOME.values() for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


# --- a function is read in one sitting

LINES, BRANCHES = 60, 15
BRANCH = ast.If | ast.For | ast.While | ast.ExceptHandler | ast.match_case


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """What is inside a function, without the functions and classes in it, which are counted by themselves."""
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from own_nodes(child)


def too_long(tree: ast.Module) -> set[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno >= LINES}
    return lines | {f.name for f in functions if sum(isinstance(node, BRANCH) for node in own_nodes(f)) > BRANCHES}


def test_no_function_is_too_long():
    found = {file: too_long(tree) for file, tree in trees()}
    assert not {file: names for file, names in found.items() if names}


def test_a_function_that_is_too_long_is_seen():
    def of(lines: int, branches: int) -> str:
        return "def f():\n" + "    if x:\n        pass\n" * branches + "    pass\n" * (lines - 1 - 2 * branches)

    assert not too_long(ast.parse(of(60, 15)))
    assert too_long(ast.parse(of(61, 0))) == too_long(ast.parse(of(60, 16))) == {"f"}


def test_every_name_that_is_imported_inside_a_function_is_there():
    """Imports at the top fail at once; those in functions only when the function runs, in a notebook or a benchmark, say."""
    missing = []
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("meshformer"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name) and importlib.util.find_spec(f"{node.module}.{alias.name}") is None:
                        missing.append(f"{file}:{node.lineno} {node.module}.{alias.name}")
    assert missing == []
