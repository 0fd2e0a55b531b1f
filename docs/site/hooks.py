"""What the site takes from the code when it is built, so that no page can fall behind it: options and keys from conf/ and the schema, the
commands' help, the floors of the house. MkDocs calls the functions named `on_…`; the tests call the others."""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from meshformer.command import helptext
from meshformer.config import schema, types
from meshformer.config.signature import TargetNotFound, signature

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
# The options that have all keys of their groups.
WHOLE = {"stage": "finetune", "strategy": "mesh", "trainer": "default", "model": "custom", "callbacks": "default"}
Config = dict[str, Any]


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, text in {"options": options(), "configuration": configuration(), "commands": commands()}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    if "{{ floors }}" in markdown:
        markdown = markdown.replace("{{ floors }}", floors())
    return re.sub(r"{{ source: (\S+)(?: (\S+))? }}", lambda match: f"```python\n{source(*match.groups())}\n```", markdown)


# --- reference/options.md: the groups


def options() -> str:
    """Every option of every group, with the comment on top of its file."""
    parts = ["# Options\n\n`GROUP=OPTION` on the command line chooses one. The comment on top of each file in `conf/` says when.\n"]
    for folder in sorted(path for path in CONF.rglob("*") if path.is_dir() and path != CONF / "hydra"):
        group = folder.relative_to(CONF).as_posix()
        parts.append(f"## {group}\n\n| option | when to pick it |\n|---|---|")
        parts += [f"| `{file.stem}` | {_purpose(file)} |" for file in sorted(folder.glob("*.yaml"))]
        parts.append("")
    return "\n".join(parts)


def _purpose(file: Path) -> str:
    text = helptext._purpose(file)
    return _cell(text[:1].upper() + text[1:])


# --- reference/configuration.md: the keys


def configuration() -> str:
    """Every key: what it may hold, what it holds by default, and the comment behind it in conf/."""
    shown, said = _defaults(), _comments()
    parts = [
        "# Configuration keys\n",
        "`meshformer train --cfg job` prints them all with the values of a command. `???` must be given.\n",
        "## Of `meshformer train`\n",
        *_section(schema.Root, "", shown, said),
        "## Of sweeps (`-m`)\n",
        *_section(schema.SweepOptions, "", shown, said),
    ]
    for name in ("Evaluate", "Generate", "Convert", "Export"):
        file = CONF / f"{name.lower()}.yaml"
        parts += [f"## Of `meshformer {name.lower()}`\n"]
        parts += _section(getattr(schema, name), "", _flat(_read(file)), _comments_of(file, ""))
    parts.append(
        "## Parts\n\nEach of these is built by the class or function that its `_target_` names. Its arguments are the keys; "
        "arguments that a file does not set may be added with `+`.\n"
    )
    for title, key, node, file in _targets():
        parts += _part(title, key, node, said | _comments_of(file, _prefix(file)))
    return "\n".join(parts)


def keys(kind: type, path: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Dotted name and field of every setting of a section of the schema and of the sections inside it."""
    for spec in dataclasses.fields(kind):
        key = f"{path}.{spec.name}" if path else spec.name
        if str(spec.type) in schema.SECTIONS:
            yield from keys(schema.SECTIONS[str(spec.type)], key)
        else:
            yield key, spec


def _section(kind: type, path: str, shown: Config, said: dict[str, str]) -> list[str]:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, spec in keys(kind, path):
        if str(spec.type) in ("Target", "Targets"):
            words, default = "a part: see [below](#parts)", ""
        else:
            words = types.describe(types.parse(str(spec.type)))
            default = _code(shown[key] if key in shown else _default(spec))
        rows.append(f"| `{key}` | {_cell(words)} | {default} | {_cell(said.get(key, ''))} |")
    return [*rows, ""]


def _part(title: str, key: str, node: Config, said: dict[str, str]) -> list[str]:
    target = node["_target_"]
    try:
        parameters = signature(target).parameters
    except TargetNotFound:
        parameters = {}
    rows = []
    for name in dict.fromkeys([*(n for n in node if not n.startswith("_")), *(p for p in parameters if p in node)]):
        annotation = parameters[name].annotation if name in parameters else None
        value = node[name]
        words = "a part" if isinstance(value, dict) else types.describe(annotation)
        default, comment = "" if isinstance(value, dict) else _code(value), said.get(f"{key}.{name}", "")
        rows.append(f"| `{key}.{name}` | {_cell(words)} | {default} | {_cell(comment)} |")
    others = [f"`{name}`" for name in parameters if name not in node]
    table = ["| key | value | default | |", "|---|---|---|---|", *rows, ""] if rows else []
    return [f"### {title}\n", f"`{target}`\n", *table, *([f"Further arguments: {', '.join(others)}.\n"] if others else [])]


def _targets() -> Iterator[tuple[str, str, Config, Path]]:
    """(option, dotted key, node, file) of every node with a `_target_` in the files of the groups."""
    for file in sorted(CONF.rglob("*/*.yaml")):
        option = f"{file.parent.relative_to(CONF).as_posix()}={file.stem}"
        stack = [(_prefix(file), _read(file))]
        while stack:
            key, node = stack.pop(0)
            if "_target_" in node:
                yield option if key == _prefix(file) else f"{option}: {key}", key, node, file
            inside = [(name, inner) for name, inner in node.items() if isinstance(inner, dict) and name != "hydra"]
            stack += [(f"{key}.{name}" if key else name, inner) for name, inner in inside]


def _read(file: Path) -> Config:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _prefix(file: Path) -> str:
    """The key under which the settings of a file are placed."""
    if "@package _global_" in file.read_text(encoding="utf-8") or file.parent == CONF:
        return ""
    return file.parent.relative_to(CONF).as_posix().replace("/", ".")


def _flat(node: Config, path: str = "") -> Config:
    found: Config = {}
    for name, value in node.items():
        key = f"{path}.{name}" if path else str(name)
        found |= _flat(value, key) if isinstance(value, dict) and value else {key: value}
    return found


def _defaults() -> Config:
    """What the keys hold unless a command says otherwise: train.yaml, the options that it names, and the default recipe."""
    train = _read(CONF / "train.yaml")
    chosen = {name: option for entry in train["defaults"] if isinstance(entry, dict) for name, option in entry.items()}
    found: Config = {}
    for group in ("stage", "strategy", "trainer"):
        for option in (WHOLE[group], chosen[group]):
            found |= _flat(_read(CONF / group / f"{option}.yaml"), group)
    found |= _flat({key: value for key, value in train.items() if key != "defaults"})
    return found | _flat(_read(CONF / "experiment" / f"{chosen['experiment']}.yaml"))


def _comments() -> dict[str, str]:
    """Key -> the comment behind it in train.yaml, else in the file of its group that has all of its keys, else in any other file of the group."""
    whole = [CONF / "train.yaml", *(CONF / group / f"{option}.yaml" for group, option in WHOLE.items())]
    found: dict[str, str] = {}
    for file in [*whole, *sorted(CONF.rglob("*/*.yaml"))]:
        if file.parent.name not in ("experiment", "sweep") and "hydra" not in file.parts:
            found = _comments_of(file, _prefix(file)) | found
    return found


def _comments_of(file: Path, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)([\w/]+):(?: .*?)??(?:\s#\s?(.*))?$", line)
        if match is None:
            continue
        indent, name, comment = len(match[1]), match[2], match[3]
        path = [(depth, outer) for depth, outer in path if depth < indent] + [(indent, name)]
        if comment:
            found[".".join(([prefix] if prefix else []) + [outer for _, outer in path])] = comment.strip()
    return found


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return schema.MISSING if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def _code(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value) if value in ("", "\n") else str(value)
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# --- reference/commands.md, design/house.md


def commands() -> str:
    """What `meshformer --help` and `meshformer COMMAND --help` say."""
    parts = ["# Commands\n", f"```text\n{helptext.overview()}\n```\n", "\n".join(helptext.WORDS.values()) + "\n"]
    for name, (arguments, purpose) in helptext.COMMANDS.items():
        usage = f"meshformer {name} {arguments}".rstrip()
        text = "\n".join([usage, f"  {purpose}", *([f"\n{helptext.EXAMPLES[name]}"] if name in helptext.EXAMPLES else [])])
        parts.append(f"## {name}\n\n```text\n{text}\n```\n")
    return "\n".join([*parts, f"## Flags\n\n```text\n{helptext.FLAGS}\n```\n"])


def floors() -> str:
    """The table of tests/test_imports.py, which fails on an import that points up."""
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    (table,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(name, ast.Name) and name.id == "FLOORS" for name in node.targets)
    ]
    rooms = {floor: ", ".join(f"`{room}`" for room, at in table.items() if at == floor) for floor in table.values()}
    return "\n".join(["| floor | rooms |", "|---|---|", *(f"| {floor} | {rooms[floor]} |" for floor in sorted(rooms, reverse=True))])


def source(file: str, name: str | None = None) -> str:
    """The code of a file in src/meshformer, or of a function or method (`Class.method`) in it."""
    text = (ROOT / "src" / "meshformer" / file).read_text(encoding="utf-8")
    if name is None:
        return text.strip()
    node: Any = ast.parse(text)
    for part in name.split("."):
        node = next((one for one in node.body if getattr(one, "name", None) == part), None)
        if node is None:
            raise LookupError(f"a page shows {name} of {file}, which is not there")
    return textwrap.dedent("\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]))
