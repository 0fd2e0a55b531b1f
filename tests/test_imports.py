"""The arrows of the house: which room may import which, read from the source without running it."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "meshformer"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

# Rooms by floor. A file at the top of the package is a room of its own, but for the command's.
FLOORS = {
    "compat": -1,  # private names of libraries
    "config": 0,
    "importing": 0,
    "model": 0,
    "printing": 0,
    "record": 0,
    "data": 1,
    "checkpoint": 1,
    "optim": 1,
    "huggingface": 2,  # adds its formats to the readers of checkpoint
    "training": 2,  # one step: tasks call it, strategies take part in it
    "parallel": 3,
    "profile": 3,  # reads what callbacks/profile.py recorded
    "tasks": 4,
    "callbacks": 4,
    "job": 5,
    "runs": 6,
    "plan": 6,  # predicts what the layouts of parallel would cost, and builds the job's own to count their memory
    "command": 7,
    "hydra_plugins": 7,
    "bench": 8,  # measures from outside, as a user would: nothing imports it
}
# The one arrow that points up: formats of other programs plug themselves into the readers of checkpoint/, which look for them at their first use,
# so that `load_weights` reads such a folder in a notebook that has imported nothing else.
PLUGGED_IN = {("checkpoint/find.py", "meshformer.huggingface")}
COMMAND = {"cli", "__main__"}  # files at the top of the package that are the command's
HEAVY = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers"}
NOT_IN_MODEL = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "torch.distributed")
KNOWS_HYDRA = {"job", "command", "compat", "hydra_plugins"}


@dataclass(frozen=True)
class Import:
    name: str  # dotted; for `from a import b` both `a` and `a.b` are reported
    line: int
    at_import_time: bool  # outside functions and `if TYPE_CHECKING`


def imports_of(path: Path, module: str) -> Iterator[Import]:
    """Every import statement in the file, inside functions too, and every `torch.distributed` or `hydra.utils` reached by attribute."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, early: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            yield Import(base, node.lineno, early)
            yield from (Import(f"{base}.{alias.name}", node.lineno, early) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in ("torch", "hydra"):
                yield Import(".".join([inner.id, *reversed(parts)]), node.lineno, False)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            early = False
        type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, early and not (type_only and name == "body"))

    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    yield from visit(tree, True)
    if any(isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") for node in ast.walk(tree)):
        for node in ast.walk(tree):  # names that it may be given
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
                yield Import(node.value, node.lineno, False)


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, root: Path) -> str | None:
    """The room of `meshformer.x.y`; None for the package's own `__init__`."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    if (root / parts[1]).is_dir() or parts[1] in FLOORS:
        return parts[1]
    return "command" if parts[1] in COMMAND else parts[1]


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(root: Path) -> list[str]:
    """One line for each import that breaks a rule of the house."""
    known = modules(root)
    found = []
    for module, path in known.items():
        room = room_of(module, root)
        if room is not None and room not in FLOORS:
            found.append(f"{module}: the room {room}/ stands on no floor")
            continue
        for imported in imports_of(path, module):
            where = f"{path.relative_to(root)}:{imported.line}"
            top = imported.name.partition(".")[0]
            if top == PACKAGE:
                target = room_of(imported.name, root) if imported.name in known or imported.name.rpartition(".")[0] in known else None
                if target is None or target == room:
                    continue
                if (path.relative_to(root).as_posix(), imported.name) in PLUGGED_IN:
                    continue
                if target in FLOORS and (room is None or FLOORS[target] >= FLOORS[room]):
                    found.append(f"{where}: {room or 'the package itself'} imports {imported.name}, which is not on a lower floor")
                continue
            if room == "record" and top not in sys.stdlib_module_names:
                found.append(f"{where}: record/ is for the standard library alone, not {imported.name}")
            if room == "config" and top in HEAVY:
                found.append(f"{where}: config/ imports {imported.name}")
            if room == "model" and any(below(imported.name, name) for name in NOT_IN_MODEL):
                found.append(f"{where}: model/ imports {imported.name}")
            if top == "hydra" and room not in KNOWS_HYDRA:
                found.append(f"{where}: {room} knows Hydra ({imported.name})")
            if module != f"{PACKAGE}.job.build" and below(imported.name, "hydra.utils"):
                found.append(f"{where}: only job/build.py may call instantiate")
    for start in known:
        room = room_of(start, root)
        checks = start.rpartition(".")[2] in ("check", "settings")  # run before a job starts
        if room in ("config", "record") or start == f"{PACKAGE}.cli" or checks:
            found += heavy_at_import(start, known, root)
    return list(dict.fromkeys(found))


def heavy_at_import(start: str, known: dict[str, Path], root: Path) -> list[str]:
    """What importing `start` would load of torch and its like, through our own modules and their packages' `__init__`."""
    found, waiting, seen = [], [start], set()
    while waiting:
        module = waiting.pop()
        for parent in (module.rsplit(".", depth)[0] for depth in range(module.count(".") + 1)):
            if parent not in known or parent in seen:
                continue
            seen.add(parent)
            for imported in imports_of(known[parent], parent):
                if not imported.at_import_time:
                    continue
                if imported.name.partition(".")[0] in HEAVY:
                    found.append(f"{known[parent].relative_to(root)}:{imported.line}: importing {start} loads {imported.name}")
                elif imported.name.startswith(PACKAGE):
                    waiting.append(imported.name)
    return found


def test_every_import_points_down():
    assert modules(ROOT), "no source found"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("model/block.py", "import meshformer.optim.groups", "not on a lower floor"),
        ("model/block.py", "def f():\n    from meshformer.config.errors import ConfigError", "not on a lower floor"),
        ("config/schema.py", "from ..data import corpus", "not on a lower floor"),
        ("data/windows.py", "from meshformer.optim import groups", "not on a lower floor"),
        (
            "tasks/language.py",
            "def f():\n    from meshformer.parallel import mesh\n    import meshformer.callbacks.speed",
            "callbacks.speed",
        ),
        ("job/build.py", "from meshformer import cli", "not on a lower floor"),
        ("__init__.py", "from meshformer.config import errors", "the package itself"),
        ("model/block.py", "def f():\n    from torch import distributed", "model/ imports torch.distributed"),
        ("model/block.py", "import torch\n\ndef f():\n    return torch.distributed.get_rank()", "model/ imports torch.distributed"),
        ("model/block.py", "from lightning.pytorch import LightningModule", "model/ imports lightning"),
        ("record/run_json.py", "def f():\n    import numpy", "standard library alone"),
        ("config/schema.py", "def f():\n    import torch", "config/ imports torch"),
        ("cli.py", "import torch", "importing meshformer.cli loads torch"),
        ("optim/check.py", "from torch import nn", "importing meshformer.optim.check loads torch"),
        ("data/check.py", "", "data/__init__.py:1: importing meshformer.data.check loads torch"),
        ("cli.py", "from meshformer.data import corpus", "data/__init__.py:1: importing meshformer.cli loads torch"),
        ("tasks/language.py", "from hydra.core.hydra_config import HydraConfig", "tasks knows Hydra"),
        ("cli.py", "import hydra\n\ndef f(c):\n    return hydra.utils.instantiate(c)", "only job/build.py may call instantiate"),
        ("attic/old.py", "x = 1", "stands on no floor"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, expected):
    house = {
        "__init__.py": "",
        "config/__init__.py": "",
        "config/errors.py": "",
        "data/__init__.py": "from torch import nn",
        "data/corpus.py": "",
        "optim/__init__.py": "",
        "optim/groups.py": "",
        "parallel/mesh.py": "",
        "callbacks/speed.py": "",
        "cli.py": "def main():\n    import torch\n    from meshformer.data import corpus",
    }
    for name, text in house.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == [], "the house is sound before the violation is planted"
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    found = violations(tmp_path)
    assert any(expected in line for line in found), found


def test_allowed_imports_are_allowed(tmp_path):
    for name, text in {
        "tasks/language.py": "from meshformer.model import block\nfrom meshformer.parallel import mesh\nimport lightning",
        "model/block.py": "from meshformer.model import attention\nfrom .attention import attend\nimport torch",
        "model/attention.py": "",
        "parallel/mesh.py": "import torch.distributed",
        "job/build.py": "from hydra.utils import instantiate\nfrom meshformer.tasks import language",
        "cli.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nfrom meshformer.command.launch import go",
        "command/launch.py": "def go():\n    import torch\n    from meshformer.job.train import train",
        "job/train.py": "from meshformer.job.build import instantiate",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == []
