"""The messages of docs/troubleshooting.md that come from accidents: each accident is caused here, and what is said is compared with the page."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs import run_tiny, text_file
from meshformer.callbacks import Rows
from meshformer.callbacks.nonfinite import NonFiniteError
from meshformer.checkpoint import single_file
from meshformer.checkpoint.write import write_folder
from meshformer.command.launch import _first_cause
from meshformer.command.slurm import requeue
from meshformer.config.errors import ConfigError, Stopped
from meshformer.data.base import SampledData
from meshformer.huggingface import derive
from meshformer.record.metrics_csv import MetricsCsv
from meshformer.tasks import LanguageModelling

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
Patch = pytest.MonkeyPatch
Say = pytest.CaptureFixture[str]
ACCIDENTS: dict[str, Callable[[Path, Patch, Say], str]] = {}


def accident(beginning: str) -> Callable[[Any], Any]:
    """Registers what causes the page's message that contains `beginning`."""

    def register(cause: Any) -> Any:
        ACCIDENTS[beginning] = cause
        return cause

    return register


def stopped(folder: Path, patch: Patch, *overrides: str) -> str:
    text_file(folder)
    after = Rows.on_train_batch_end

    def signalled(self: Any, trainer: Any, *rest: Any) -> None:
        after(self, trainer, *rest)
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Rows, "on_train_batch_end", signalled)
    with pytest.raises(Stopped) as raised:
        run_tiny(folder, "run", "trainer.max_steps=9", *overrides)
    return str(raised.value)


@accident("step 412, saved")
def _(folder: Path, patch: Patch, said: Say) -> str:
    return stopped(folder, patch)


@accident("not saved: the save failed")
def _(folder: Path, patch: Patch, said: Say) -> str:
    patch.setattr("meshformer.checkpoint.write._check_space", refuse)
    return stopped(folder, patch, "callbacks.checkpoint.on_failure=warn")


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@accident("not enough disk space")
def _(folder: Path, patch: Patch, said: Say) -> str:
    patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(Exception, match="space") as raised:
        write_folder(folder / "step-00000001", {"model.a": torch.ones(4)}, {})
    return str(raised.value)


@accident("metrics.csv could not be written")
def _(folder: Path, patch: Patch, said: Say) -> str:
    text_file(folder)
    row, refused = MetricsCsv.row, []

    def refuse_once(self: Any, step: int, **values: Any) -> None:
        if not refused:
            refused.append(True)
            refuse()
        row(self, step, **values)

    patch.setattr(MetricsCsv, "row", refuse_once)
    run_tiny(folder, "run", "trainer.max_steps=2", "callbacks.checkpoint.on_failure=warn")
    return said.readouterr().err


def not_finite(folder: Path, patch: Patch, spoil: Callable[..., Any]) -> str:
    text_file(folder)
    score = LanguageModelling.score
    patch.setattr(LanguageModelling, "score", lambda self, output, batch, phase: spoil(score(self, output, batch, phase)))
    with pytest.raises(NonFiniteError) as raised:
        run_tiny(folder, "run", "trainer.max_steps=3")
    return str(raised.value)


@accident("the gradient of")
def _(folder: Path, patch: Patch, said: Say) -> str:
    return not_finite(folder, patch, lambda scored: (scored[0] * float("nan"), scored[1]))


@accident("the loss is not finite (")
def _(folder: Path, patch: Patch, said: Say) -> str:
    return not_finite(folder, patch, lambda scored: (scored[0] + float("inf"), scored[1]))


def cause(folder: Path, *notes: tuple[int, str, str]) -> str:
    for rank, kind, message in notes:
        note = {"rank": rank, "type": kind, "message": message, "time": rank, "traceback": "", "config": None}
        (folder / f"{rank}.json").write_text(json.dumps(note))
    return str(_first_cause(folder, RuntimeError("a rank"), 2))


@accident("failed: RuntimeError")
def _(folder: Path, patch: Patch, said: Say) -> str:
    return cause(folder, (1, "RuntimeError", "no such thing"))


@accident("died without an error message")
def _(folder: Path, patch: Patch, said: Say) -> str:
    return cause(folder, (0, "RuntimeError", "Connection closed by peer [127.0.0.1]:1"))


@accident("longer than strategy.timeout")
def _(folder: Path, patch: Patch, said: Say) -> str:
    return cause(folder, (0, "RuntimeError", "Timed out waiting 30000ms for recv operation to complete"))


@accident("launch.requeue=true")
def _(folder: Path, patch: Patch, said: Say) -> str:
    patch.setenv("SLURM_JOB_ID", "7")
    patch.setenv("PATH", str(folder))
    requeue()
    return said.readouterr().err


@accident("trained on other text")
def _(folder: Path, patch: Patch, said: Say) -> str:
    patch.setattr(SampledData, "identity", "new")
    with pytest.raises(ConfigError) as raised:
        SampledData(8, 1).load_state_dict({"identity": "old", "seed": 1, "samples": 0})
    return str(raised.value)


@accident("quantised weights")
def _(folder: Path, patch: Patch, said: Say) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ConfigError) as raised:
        derive(folder)
    return str(raised.value)


class Maker:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


@accident("is no checkpoint of ours")
def _(folder: Path, patch: Patch, said: Say) -> str:
    torch.save({"tensors": {}, "rest": Maker()}, folder / "step-00000001.ckpt")
    with pytest.raises(ConfigError) as raised:
        single_file.load(folder / "step-00000001.ckpt")
    return str(raised.value)


def pattern(message: str) -> str:
    """The page's message with any number for a number, any parameter for norm.weight, and any text for `…`."""
    text = re.sub(r"\d[\d,]*(\.\d+)?", "NUMBER", message)
    text = re.escape(text).replace("NUMBER", r"\d[\d,.e-]*").replace("…", ".*")
    return text.replace(re.escape("norm.weight"), r"[\w.]+").replace(r"\ \(rank\ \d[\d,.e-]*,\ where", r"\ \(rank\ \d+,\ where")


def test_every_message_of_the_table_has_its_accident() -> None:
    assert len(MESSAGES) == len(ACCIDENTS) == 13
    assert all(sum(beginning in message for message in MESSAGES) == 1 for beginning in ACCIDENTS)


@pytest.mark.parametrize("beginning", ACCIDENTS)
def test_an_accident_is_told_in_the_words_of_the_page(beginning: str, tmp_path: Path, monkeypatch: Patch, capsys: Say) -> None:
    (message,) = (message for message in MESSAGES if beginning in message)
    said = ACCIDENTS[beginning](tmp_path, monkeypatch, capsys)
    assert re.search(pattern(message), said), (message, said)
    assert not re.search(pattern(message), "another text")
