"""What Lightning's loggers are given by a run: a place, a name, the group of its sweep, and the logged run that a resumed run continues."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from meshformer.config.errors import ConfigError
from meshformer.printing import argument
from meshformer.record import atomic_write_text

Config = dict[str, Any]
IDS = "loggers.json"  # in the run folder: name of a logger in the configuration -> id of the run in it
SERVER, DATABASE = "MLFLOW_TRACKING_URI", "mlflow.db"  # the latter lies in paths.runs
SWEEP = "sweep.json"  # in the folder above that of a sweep's run


def given_by_run(name: str, node: Mapping[str, Any], config: Config, folder: Path) -> dict[str, Any]:
    """Arguments for the logger `name`, whose settings are `node`. A setting that is not null stays, but for the
    place of TensorBoard's events."""
    kind, sweep, known = str(node["_target_"]).rpartition(".")[2], _sweep_of(folder), _ids(folder).get(name)
    title = f"{sweep}/{folder.name}" if sweep else folder.name
    given: dict[str, Any] = {}
    if "TensorBoard" in kind:
        return {"save_dir": str(folder), "name": "", "version": name}
    if kind == "CSVLogger" and node.get("save_dir") is None:
        given = {"save_dir": str(folder), "name": "", "version": name}
    if kind == "WandbLogger":
        given = {"save_dir": str(folder), "name": title, "group": sweep, "id": known}
    if kind == "MLFlowLogger":
        given = {"run_name": title, "run_id": known, "tags": {**(node.get("tags") or {}), **({"sweep": sweep} if sweep else {})}}
        if node.get("tracking_uri") is None and (server := os.environ.get(SERVER)):
            given["tracking_uri"] = server  # Lightning reads it once, at import
        elif node.get("tracking_uri") is None:
            runs = Path(config["paths"]["runs"]).absolute()
            if known is not None and not (runs / DATABASE).is_file():
                raise _elsewhere(runs, folder)
            runs.mkdir(parents=True, exist_ok=True)
            given |= {"tracking_uri": f"sqlite:///{runs / DATABASE}", "artifact_location": str(runs / "mlflow")}
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow 3 reports its use over the network
        for library in ("mlflow", "alembic"):  # a new database is announced by forty lines
            logging.getLogger(library).setLevel(logging.WARNING)
    return {key: value for key, value in given.items() if value is not None and (key == "tags" or node.get(key) is None)}


def one_at_a_time(nodes: Iterable[Mapping[str, Any]], config: Config) -> AbstractContextManager[Any]:
    """Context in which loggers are made and opened: MLflow creates its tables and an experiment without a lock, so of two runs at once one fails."""
    if not any(str(node["_target_"]).endswith(".MLFlowLogger") for node in nodes):
        return nullcontext()
    runs = Path(config["paths"]["runs"]).absolute()
    runs.mkdir(parents=True, exist_ok=True)
    return FileLock(runs / ".mlflow.lock")


def logs_into_runs(config: Config) -> bool:
    """Whether MLflow's database lies in paths.runs, so that a command which resumes a run must name that folder too."""
    nodes = (config.get("logger") or {}).values()
    local = any(node and str(node["_target_"]).endswith(".MLFlowLogger") and node.get("tracking_uri") is None for node in nodes)
    return local and not os.environ.get(SERVER) and Path(config["paths"]["runs"]).absolute() != Path("runs").absolute()


def _elsewhere(runs: Path, folder: Path) -> ConfigError:
    """The error for a resumed run that was logged into another database. It suggests the nearest one above the run; only the user may choose it."""
    near = next((above for above in folder.absolute().parents if (above / DATABASE).is_file()), None)
    fix = f"Add {argument('paths.runs', near)}" if near is not None and near != runs else "Name the folder that has it with paths.runs="
    message = f"MLflow's database {runs / DATABASE} does not have the run in {folder}, which was logged into another"
    return ConfigError(message, "paths.runs", str(runs), f"{fix}, or log elsewhere: logger=csv.")


def begin(loggers: Mapping[str, Logger], config: Config, folder: Path) -> None:
    """Opens the run in each logger, logs the configuration, and writes the ids to RUN/loggers.json. On rank 0, before the first step."""
    known, ids = _ids(folder), {}
    for name, logger in loggers.items():
        if isinstance(logger, MLFlowLogger):
            with one_at_a_time([config["logger"][name]], config):
                ids[name] = _open_mlflow(logger)
            if name in known:  # MLflow refuses a parameter that has changed, as trainer.max_steps may have
                logger.experiment.update_run(ids[name], "RUNNING")
                continue
        elif isinstance(logger, WandbLogger):
            ids[name] = logger.experiment.id
        logger.log_hyperparams(config)
    if ids:
        atomic_write_text(folder / IDS, json.dumps({**known, **ids}, indent=1) + "\n")


def refuse_others(loggers: Mapping[str, Logger], config: Config, folder: Path) -> None:
    """ConfigError where the resumed run in `folder` is not in the database that its logger has opened."""
    for name, logger in loggers.items():
        if isinstance(logger, MLFlowLogger) and name in _ids(folder):
            from mlflow.exceptions import MlflowException

            try:
                _open_mlflow(logger)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise _elsewhere(Path(config["paths"]["runs"]).absolute(), folder) from None


def _open_mlflow(logger: MLFlowLogger) -> str:
    """Returns the id of the run, new or continued."""
    server = os.environ.get(SERVER)
    try:
        return str(logger.run_id)
    finally:
        os.environ.pop(SERVER, None)  # MLflow has set it, and the next run of this process may have another runs folder
        if server is not None:
            os.environ[SERVER] = server


def close(loggers: Sequence[Logger], failed: bool) -> None:
    """Ends the wandb run: a worker process skips wandb's exit hook, and the next run in this process would be logged into the same one."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None and any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish(exit_code=int(failed))


def _sweep_of(folder: Path) -> str | None:
    return folder.parent.name if (folder.parent / SWEEP).is_file() else None


def _ids(folder: Path) -> dict[str, str]:
    """The ids recorded in the run folder, which is not trusted: only plain words count."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / IDS).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {str(name): value for name, value in found.items() if isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value)}
    return {}
