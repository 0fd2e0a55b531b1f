"""A run's recorded steps for `meshformer profile` and `meshformer report`: the table, the advice, the pictures. Plain Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import leads_out
from meshformer.config.schema import Strategy
from meshformer.parallel.check import check_batch, check_cut, check_settings
from meshformer.parallel.compilation import check_compile
from meshformer.profile.advice import advise, compared, sentences
from meshformer.profile.figure import pictures
from meshformer.profile.parts import FOLDER, MEMORY, PASSES, SUM, TABLE, Part, analyse, mean, means, read_parts, table
from meshformer.profile.trace import trace_files
from meshformer.record import read_run

Row = dict[str, Any]
CAPTIONS = {
    "parts": "Where a step's time goes, by rank.",
    "pipeline": "The passes of micro-batches through the pipeline's stages in one step.",
    "memory": "Memory over the recorded steps.",
}


@dataclass(frozen=True)
class Recorded:
    """`rows` and `columns` are the table: one row a part, milliseconds a step. `told` are the sentences. `pictures`: name -> SVG text."""

    steps: list[int]
    ranks: int
    rows: list[Row]
    columns: list[str]
    told: list[str]
    pictures: dict[str, str]


def recorded(run: Path) -> Recorded | None:
    """What RUN/profile/ holds; None if nothing was recorded. ConfigError if it is damaged or leads out of the run's folder."""
    folder = run / FOLDER
    if not folder.is_dir():
        return None
    if any(leads_out(folder / name, run) for name in (TABLE, PASSES, MEMORY) if (folder / name).exists()):
        raise ConfigError(f"{folder} holds a link that leads out of the run's folder")
    try:
        parts = _parts(folder)
        drawn = pictures(folder)
    except (OSError, ValueError) as error:
        fix = f"Delete {folder / TABLE} to have it made anew from the traces."
        raise ConfigError(f"the recorded steps cannot be read: {error}", fix=fix) from None
    of_rank, config = means(parts), read_config(run)
    try:
        advice = advise(of_rank, _complete(config), lambda settings: usable(config, settings))
        told = sentences(of_rank, config, advice)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run / 'config.yaml'} is damaged, or of another program ({error!r})", fix="Restore it from a copy.") from None
    told += compared(mean(of_rank, SUM), _record(run))
    rows = table(of_rank)
    return Recorded(sorted({part.step for part in parts}), len(of_rank), rows, list(rows[0]), told, drawn)


def _parts(folder: Path) -> list[Part]:
    if (folder / TABLE).is_file():
        return read_parts(folder / TABLE)
    if any(leads_out(file, folder) for file in trace_files(folder).values()):
        raise ValueError("a trace is a link that leads out of the run's folder")
    return analyse(folder)


def _record(run: Path) -> Mapping[str, Any]:
    """run.json, with what strategy=auto chose (plan.json) as `plan`."""
    try:
        record = read_run(run)
    except (OSError, ValueError):
        return {}
    try:
        return {**record, "plan": json.loads((run / "plan.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return record


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of the strategy's settings, which a record of an older version may lack."""
    usual = {name: getattr(Strategy, name, None) for name in Strategy.__dataclass_fields__}
    return {**config, "strategy": {**usual, **config["strategy"]}}


def usable(config: dict[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the run could start with `settings` changed, as far as the checks of layouts, batches and compilation tell."""
    changed = deepcopy(config)
    for key, value in settings.items():
        if key == "strategy":  # hsdp, from fsdp
            changed["strategy"] |= {"name": value, "replicate": 2, "shard": changed["strategy"]["shard"] // 2}
            continue
        *groups, name = key.split(".")
        node = changed
        for group in groups:
            node = node.get(group)
            if not isinstance(node, dict):
                return False
        node[name] = value
    try:
        for check in (check_settings, check_batch, check_cut, check_compile):
            check(changed)
    except (ConfigError, KeyError, TypeError):
        return False
    return True
