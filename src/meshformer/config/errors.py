"""The exceptions that decide the exit code: ConfigError for a mistake the user can fix (2), Stopped for a run ended by a signal (75 or 130)."""

from __future__ import annotations

from typing import Any, ClassVar


class ConfigError(Exception):
    """A mistake in the configuration or in the command's arguments.

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


class Stopped(Exception):
    """Training stopped at a step boundary after a signal. `reason` is preempted or interrupted (Ctrl-C).

    `saved`: whether a checkpoint of this step exists; if not, `why` gives the reason.
    """

    CODES: ClassVar[dict[str, int]] = {"preempted": 75, "interrupted": 130}  # 75 is EX_TEMPFAIL in sysexits.h: try again later

    def __init__(self, reason: str, step: int, saved: bool, why: str = "callbacks.checkpoint is off") -> None:
        super().__init__(reason, step, saved, why)
        self.reason, self.step, self.saved, self.why = reason, step, saved, why

    @property
    def exit_code(self) -> int:
        return self.CODES[self.reason]

    def __str__(self) -> str:
        why = "Ctrl-C" if self.reason == "interrupted" else "a signal to stop"
        return f"stopped by {why} after step {self.step}, {'saved' if self.saved else f'not saved: {self.why}'}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!")) else text + "."


def _short(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 120 else text[:117] + "..."
