"""The one exception that means "the user can mend this": shown as a sentence, without a stack trace, exit code 2."""

from __future__ import annotations

from typing import Any


class ConfigError(Exception):
    """A mistake in the configuration or in what the command was given.

    Args:
        message: what is wrong, in words; it may already name the key and the value.
        key: dotted path of the setting at fault, for example ``trainer.devices``.
        value: the offending value; left out of the sentence when None.
        fix: what to write instead.

    ``str()`` is one or two sentences on one line: ``trainer.devices=2: one process only. Use strategy=ddp.``
    """

    def __init__(self, message: str, key: str | None = None, value: Any = None, fix: str | None = None) -> None:
        # All four go to Exception's args, so that the error survives pickling between processes.
        super().__init__(message, key, value, fix)
        self.message = message
        self.key = key
        self.value = value
        self.fix = fix

    def __str__(self) -> str:
        what = _sentence(self.message)
        place = self.key or ""
        if self.key and self.value is not None:
            place = f"{self.key}={_short(self.value)}"
        if place and not what.startswith(place):
            what = f"{place}: {what}"
        return f"{what} {_sentence(self.fix)}" if self.fix else what


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!")) else text + "."


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 120 else text[:117] + "..."
