"""Pruning: a run of a search reports its metric to the Optuna study and ends early if the pruner decides so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from meshformer.printing import say


class Pruning(Callback):
    """Reports `metric` after every validation; if the pruner decides so, training ends as if this were its last step.

    `study`: the SQLite file of an Optuna study, of which this run is trial number `trial`. `pruner`: median (worse than the median of the other
    trials at this step) or hyperband (successive halving between 1 and `last_step`). Rank 0 decides and
    broadcasts. It does nothing if the trial is finished (a run of a search that is continued by hand) or the file is gone. State: in the study.
    """

    def __init__(self, study: str, trial: int, metric: str = "val/loss", pruner: str = "median", last_step: int | None = None):
        self.study, self.number, self.metric, self.pruner, self.last_step = study, trial, metric, pruner, last_step
        self.trial: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if not Path(self.study).is_file():
            say(f"pruning: {self.study} is gone; this run goes on by itself", error=True)
            return
        import optuna
        from sqlalchemy import URL

        pruners = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.last_step or "auto"),
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = URL.create("sqlite", database=self.study).render_as_string()
        storage = optuna.storages.get_storage(url)
        study = optuna.load_study(study_name=None, storage=storage, pruner=pruners[self.pruner]())
        if not study.trials[self.number].state.is_finished():
            in_study = storage.get_study_id_from_name(study.study_name)
            self.trial = optuna.trial.Trial(study, storage.get_trial_id_from_study_id_trial_number(in_study, self.number))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.global_step >= trainer.max_steps:
            return
        prune = False
        if self.trial is not None:
            # Optuna only warns if a step is reported twice.
            self.trial.report(float(trainer.callback_metrics[self.metric]), trainer.global_step)
            prune = self.trial.should_prune()
        if trainer.strategy.broadcast(prune):
            trainer.should_stop = True
            if self.trial is not None:
                self.trial.set_user_attr("pruned_at_step", trainer.global_step)
                say(f"pruned after step {trainer.global_step}: other runs of the search did better by then", error=True)
