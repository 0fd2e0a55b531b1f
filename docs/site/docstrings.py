"""Docstrings as Markdown takes them: our lists of settings, `name: what it is` line by line, become lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"[\w`]+(?:, [\w`]+)*: ")


class Lists(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(text: str) -> str:
    """A paragraph in which two lines or more begin with `name: ` is a list of them; what goes on below an entry is indented there already."""
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        lines = paragraph.splitlines()
        if sum(ENTRY.match(line) is not None for line in lines) > 1 and ENTRY.match(lines[0]):
            paragraphs[i] = "\n".join(f"- {line}" if ENTRY.match(line) else line for line in lines)
    return "\n\n".join(paragraphs)
