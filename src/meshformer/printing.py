"""The one place where the program prints. What a folder from elsewhere says, its name among it, reaches a terminal or a spreadsheet as text."""

from __future__ import annotations

import io
import re
import shlex
import sys
from typing import Any

# Control characters (a terminal obeys those after ESC), marks that turn the direction of writing, and halves of characters, which no stream takes.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
BREAKS = re.compile(r"[\t\n]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet takes what begins so for a formula, or for what follows the blank


def print_anything() -> None:
    """Lets stdout and stderr write out what their encoding lacks: a job under cron (LC_ALL=C) shall not end by a character of its own text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def say(text: object = "", *, error: bool = False, end: str = "\n", one_line: bool = False) -> None:
    """Prints `text`, made `visible`, to stdout, or to stderr where it is an `error` or other news of the command."""
    print(visible(text, lines=not one_line), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def visible(text: object, lines: bool = True) -> str:
    """`text` with what is not to be seen written out, as Python writes it: an ESC as \\x1b. `lines`: keep tabs and line breaks."""
    shown = UNPRINTABLE.sub(_written_out, str(text).replace("\r\n", "\n"))
    return shown if lines else BREAKS.sub(_written_out, shown)


def csv_cell(value: Any) -> Any:
    """`value` for a cell of a CSV file: None is empty, numbers stay, and no text is a formula to a spreadsheet."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return value if isinstance(value, (bool, int, float)) else csv_cell(str(value))
    if NUMBER.fullmatch(value):
        return value
    return visible(f"'{value}" if value.startswith(FORMULA) else value)


def argument(key: str, value: object) -> str:
    """`key=value` as it is typed at a shell, whatever the value holds."""
    return shlex.quote(f"{key}={value}")


def _written_out(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1] if not match[0].isprintable() else f"\\u{ord(match[0]):04x}"
