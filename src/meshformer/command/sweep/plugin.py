"""Run a sweep with another Hydra launcher (basic, joblib, submitit), which gets a batch of points and composes each where it runs."""

from __future__ import annotations

import io
import shutil
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from meshformer.checkpoint.find import candidates
from meshformer.command import compose
from meshformer.command.compose import Hydra
from meshformer.command.recorded import write_overrides
from meshformer.compat.hydra import Callbacks
from meshformer.config import ConfigError
from meshformer.config.errors import Stopped
from meshformer.config.foreign import confine, read_config

from .points import open_folder
from .record import Point

Outcome = tuple[str, Any]  # as in local.JobResult


class PointTask:
    """The function that the launcher calls for each point. Submitit pickles it and may call it again in the same folder after a preemption.

    `own_process` trains each point in a new process, because the launcher may call this for several points in one process, where global state
    of one run would reach the next.
    """

    def __init__(self, flags: dict[str, str | None], own_process: bool):
        self.flags, self.own_process = flags, own_process

    def __call__(self, cfg: DictConfig) -> Outcome:
        overrides, folder = list(HydraConfig.get().overrides.task), Path(HydraConfig.get().runtime.output_dir)
        try:
            composed = compose.plain(cfg)
            config = resumed_config(folder, composed["allow"], composed) if candidates(folder) else None
            if config is None:
                config = compose.settle(composed, overrides)
                shutil.rmtree(folder, ignore_errors=True)
                open_folder(folder, config, write_overrides(overrides, self.flags["config_dir"], self.flags["config_name"]))
            from meshformer.command.launch import launch

            return "done", launch(config, folder, own_process=self.own_process)
        except Stopped as stopped:
            if stopped.reason == "interrupted":
                raise KeyboardInterrupt from None
            return "interrupted", str(stopped)
        except ConfigError as error:
            return "failed", str(error)
        except Exception as error:
            details = getattr(error, "details", None)
            with (folder / "job.log").open("a", encoding="utf-8") as log:
                log.write(traceback.format_exc() if details is None else details)
            return "failed", f"{type(error).__name__}: {error}" if details is None else str(error)


def resumed_config(folder: Path, allow: list[str], mine: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that resumes the run in `folder`. `allow` and `mine` (see `confine`) come from the command, not the folder."""
    return compose.settle(confine({**read_config(folder), "resume": str(folder), "allow": allow}, mine["paths"], mine))


class PluginLauncher:
    """Runs batches of points through the Hydra launcher that `cfg` chooses."""

    def __init__(self, hydra: Hydra, cfg: DictConfig, flags: dict[str, str | None]):
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
        HydraConfig.instance().set_config(cfg)
        self.cfg = cfg
        task = PointTask(flags, own_process="submitit" not in str(cfg.hydra.launcher._target_))
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=cfg)

    def batch(self, waiting: int) -> int:
        """How many points to pass at once: one for Hydra's basic launcher, which runs them one after another, else all that wait."""
        return 1 if type(self.launcher).__name__ == "BasicLauncher" else waiting

    def run(self, points: Sequence[Point], allow: Sequence[str]) -> list[Outcome]:
        HydraConfig.instance().set_config(self.cfg)
        given = [[*point.overrides, *allow, f"hydra.sweep.subdir={compose.quoted(point.folder)}"] for point in points]
        returns = self.launcher.launch(given, initial_job_idx=points[0].number)
        return [value if (value := _result(done)) and isinstance(value, tuple) else ("failed", str(value)) for done in returns]


def _result(job: JobReturn) -> Any:
    """The value of a job, or the exception that ended it. `return_value` raises the exception, after a line on stderr, which is discarded."""
    try:
        with redirect_stderr(io.StringIO()):
            return job.return_value
    except Exception as error:
        return error
