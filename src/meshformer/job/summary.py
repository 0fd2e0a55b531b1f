"""The text printed at the end of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from meshformer.checkpoint.find import checkpoints
from meshformer.data import TextData
from meshformer.job.loggers import logs_into_runs
from meshformer.printing import argument
from meshformer.record.run_folder import find_run
from meshformer.tasks import Evaluated, PlainTask

Config = dict[str, Any]
PROMPT = re.compile(r"\w{2,12}(?: \w{2,12})?")


def summary(task: Any, text: str | None, folder: Path, final: dict[str, float], config: Config, data: Any) -> str:
    """The result, a sample `text` if there is one, and commands to use the run, which run as printed."""
    headline = task.headline(final) if isinstance(task, Evaluated | PlainTask) else f"validation loss {final.get('val/loss', float('nan')):.4f}"
    lines = ["", headline, ""]
    if text is not None:
        lines += [text.strip(), ""]
    lines.append(f"run folder  {folder}")
    if not checkpoints(folder):  # callbacks.checkpoint is off, so nothing can be loaded
        return "\n".join(lines)
    run = _short(folder, config["paths"]["runs"])
    limit = "max_epochs" if config["trainer"]["max_epochs"] is not None else "max_steps"
    lines += [
        f"  continue  {resume_command(run, config)} trainer.{limit}={2 * config['trainer'][limit]}",
        f"  evaluate  meshformer evaluate {argument('run', run)}",
    ]
    if text is not None:
        lines.append(f"  generate  meshformer generate {argument('run', run)} {argument('prompt', prompt_from(data, text))}")
    return "\n".join(lines)


def resume_command(run: str | Path, config: Config) -> str:
    """The command that continues a run, up to its settings."""
    more = f" {argument('paths.runs', Path(config['paths']['runs']).absolute())}" if logs_into_runs(config) else ""
    return f"meshformer train {argument('resume', run)}{more}"


def _short(folder: Path, runs: str) -> str:
    """`last` where the commands of this folder find the run by it; else its path."""
    if Path(runs) != Path("runs") or Path("runs").absolute() not in folder.parents:
        return str(folder)
    return "last" if find_run("last", runs).absolute() == folder.absolute() else str(folder)


def prompt_from(data: Any, text: str) -> str:
    """A few characters of the validation text, or of the sample `text` where the data is no running text: a prompt that the tokenizer knows."""
    if isinstance(data, TextData):
        text = data.tokenizer.decode(data.prepared.tokens("val")[:200].tolist())
    found = PROMPT.search(text)
    return found[0] if found else text.strip()[:1] or "a"
