"""Each fact stands once: what a class is or does is said in the class, not by its name elsewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import meshformer

ROOT = Path(meshformer.__file__).parent
DOTTED = re.compile(r"(?:[a-z_]\w*\.)*([A-Z]\w*)")
COMPONENTS = ("model/", "tasks/", "callbacks/", "data/", "optim/", "parallel/")  # the rooms of what a configuration may name
# Files that may name classes of ours in strings, and why.
NAMES_CLASSES = {
    "checkpoint/pretrained/bert.py": ({"embeddings.LayerNorm"}, "the name of a tensor in BERT"),
    "checkpoint/pretrained/parts.py": ({"meshformer.model.Transformer", "meshformer.model.VisionTransformer", "Learned", "Rotary"},
        "foreign weights become a node as in conf/model/, whose `_target_` is such a name"),
    "config/foreign.py": ({"meshformer.callbacks.Pruning"}, "the `_target_` that a search writes"),
    "config/schema.py": ({"meshformer.model.layout.Plan"}, "the settings of `model.plan` are read from that class, without torch"),
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
