"""All printing goes through here, so that untrusted text (names, recorded settings) cannot control a terminal or become a spreadsheet formula."""

from __future__ import annotations

import io
import re
import shlex
import sys
from typing import Any

# Control characters (ESC starts terminal commands), bidirectional marks, and lone surrogates, which cannot be encoded.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
BREAKS = re.compile(r"[\t\n]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # spreadsheets evaluate cells that start with these


def escape_unencodable() -> None:
    """Make stdout and stderr escape characters that their encoding lacks, so that printing cannot fail a job under cron (LC_ALL=C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def say(text: object = "", *, error: bool = False, end: str = "\n", one_line: bool = False) -> None:
    """Print `text`, with control characters escaped (see `visible`), to stdout, or to stderr with `error`."""
    print(visible(text, lines=not one_line), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def visible(text: object, lines: bool = True) -> str:
    """Return `text` with unprintable characters escaped as in Python: an ESC as \\x1b. `lines` keeps tabs and line breaks."""
    shown = UNPRINTABLE.sub(_written_out, str(text).replace("\r\n", "\n"))
    return shown if lines else BREAKS.sub(_written_out, shown)


def csv_cell(value: Any) -> Any:
    """Return `value` for a CSV cell: None becomes empty, numbers stay, and text that a spreadsheet would evaluate is quoted."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return value if isinstance(value, (bool, int, float)) else csv_cell(str(value))
    if NUMBER.fullmatch(value):
        return value
    return visible(f"'{value}" if value.startswith(FORMULA) else value)


def argument(key: str, value: object) -> str:
    """Return `key=value` quoted for a shell."""
    return shlex.quote(f"{key}={value}")


def _written_out(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1] if not match[0].isprintable() else f"\\u{ord(match[0]):04x}"
