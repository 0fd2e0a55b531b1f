"""What a stranger may plant in the files of a run or sweep folder, where it can be planted, and what it would do."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Thousands of files are written: libyaml's is faster, but not every build of PyYAML has it.
Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

MARKUP = '<meta http-equiv="refresh" content="0"><script>alert(1)</script>'
ESCAPE = "\x1b]0;planted\x07\x1b[2J\u202e"
FORMULA = '=HYPERLINK("http://x","y")'
KINDS = ("target", "evaluated", "outside", "markup", "escape")


@dataclass
class Plants:
    """`outside`: a folder that is none of the run's, with a file in it; `canary`: made when a planted target is called."""

    root: Path
    outside: Path = field(init=False)
    canary: Path = field(init=False)

    def __post_init__(self) -> None:
        self.outside, self.canary = self.root / "outside", self.root / "canary"
        self.outside.mkdir()
        (self.outside / "secret.txt").write_text("a secret " * 300)

    def value(self, kind: str) -> Any:
        call = {"_target_": "os.mkdir", "path": str(self.canary)}
        return {
            "target": call,
            "evaluated": f"${{oc.create:{{_target_:os.mkdir,path:'{self.canary}'}}}}",
            "outside": str(self.outside / "new"),
            "markup": MARKUP,
            "escape": ESCAPE,
        }[kind]

    def check(self) -> None:
        """Nothing ran and nothing was written."""
        assert not self.canary.exists(), "a planted target was called"
        assert [path.name for path in self.outside.rglob("*")] == ["secret.txt"], "something was written outside"


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value at any depth, of groups and lists too."""
    if path:
        yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


def planted(node: Any, path: tuple[Any, ...], value: Any) -> Iterator[Any]:
    """Copies of `node` with `value` at `path`: in place of what is there, and beside it under a new name or in a list."""
    old = node
    for key in path:
        old = old[key]
    instead = [value, [value]]
    if isinstance(old, dict):
        instead.append({**old, "planted": value})
        if isinstance(value, str):
            instead.append({**old, value: "planted"})
    if isinstance(old, list):
        instead.append([*old, value])
    for new in instead:
        made = copy.deepcopy(node)
        inner = made
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = copy.deepcopy(new)
        yield made


def refuse_raw(text: str) -> None:
    """Nothing that a terminal would obey."""
    found = [character for character in text if (ord(character) < 32 and character not in "\n\t") or character in "\x7f\u202e"]
    assert not found, (found, text)


def numbers(node: Any) -> Any:
    """JSON of `node` for a test's name."""
    return json.dumps(node, default=str)


class Watch:
    """Notes each file below `folder` that this process opens. Python keeps a hook for good, so there is one, and it looks at `watching`."""

    watching: Path | None = None
    opened: list[str] = []  # noqa: RUF012
    hooked = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> list[str]:
        if not Watch.hooked:
            sys.addaudithook(Watch._heard)
            Watch.hooked = True
        Watch.watching, Watch.opened = self.folder, []
        return Watch.opened

    def __exit__(self, *_: object) -> None:
        Watch.watching = None

    @staticmethod
    def _heard(event: str, arguments: Any) -> None:
        if Watch.watching is not None and event in (
            "open",
            "os.listdir",
            "os.scandir",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "sqlite3.connect",
        ):
            Watch.opened += [str(a) for a in arguments if isinstance(a, (str, Path)) and str(a).startswith(str(Watch.watching))]
