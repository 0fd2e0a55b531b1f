"""A sweep whose points Optuna proposes one by one. The study is a SQLite file in the sweep's folder, so that a search can be resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from meshformer.command.recorded import own_settings
from meshformer.config import ConfigError
from meshformer.config.foreign import PRUNING

from .record import Point

FILE, NAME = "study.db", "sweep"


class Search:
    """An Optuna study for a sweep. `options` is the `sweep` node; trial n of the study is point n of the sweep."""

    def __init__(self, folder: Path, parsed: Sequence[Override], options: dict[str, Any], seed: int):
        self.optuna = import_optuna()
        self.folder, self.options = folder, options
        self.parsed = list(parsed)
        self.space = {o.get_key_element(): self._distribution(o) for o in parsed if o.is_sweep_override()}
        if not self.space:
            raise ConfigError(
                "nothing to choose",
                "sweep.search",
                options["search"],
                fix="Add ranges, such as 'optimizer.lr=tag(log,interval(0.003,0.1))'.",
            )
        self.directions = ["minimize"] * len(options["minimize"]) + ["maximize"] * len(options["maximize"])
        self.metrics = [*options["minimize"], *options["maximize"]]
        if len(self.metrics) > 1 and options["pruner"]:
            raise ConfigError(
                "pruning works with one metric only", "sweep.pruner", options["pruner"], fix="Use sweep.pruner=null."
            )
        self.seed = seed
        self.study: Any = None

    def open(self, points: Sequence[Point]) -> list[Point]:
        """Create or reopen the study. Returns points for trials that a killed command had started but not yet written to sweep.json."""
        optuna = self.optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampling = self.seed + 1000 * len(points)  # a resumed search must not draw the same samples again
        sampler = (
            optuna.samplers.RandomSampler(seed=sampling)
            if self.options["search"] == "random"
            else optuna.samplers.TPESampler(seed=sampling, constant_liar=True)
        )
        storage = storage_url(self.folder / FILE)
        self.study = optuna.create_study(storage=storage, study_name=NAME, directions=self.directions, sampler=sampler, load_if_exists=True)
        known = {point.number for point in points}
        begun = [t for t in self.study.trials if t.number not in known and not t.state.is_finished()]
        return [Point(t.number, own_settings(self._overrides(t.params), str(self.folder / FILE))) for t in begun]

    def more(self, points: Sequence[Point]) -> bool:
        """Whether trials are left. With retry_failed, failed trials do not count."""
        counted = [p for p in points if not (self.options["retry_failed"] and p.state == "failed")]
        return len(counted) < self.options["trials"]

    def propose(self) -> Point:
        trial = self.study.ask(self.space)
        return Point(trial.number, self._overrides(trial.params))

    def with_pruning(self, point: Point, config: dict[str, Any]) -> dict[str, Any]:
        """Add the pruning callback, which reports to the study and ends unpromising runs, to the run's configuration."""
        if not self.options["pruner"]:
            return config
        callback = {
            "_target_": PRUNING,
            "study": str(self.folder / FILE),
            "trial": point.number,
            "metric": self.metrics[0],
            "pruner": self.options["pruner"],
            "last_step": config["trainer"]["max_steps"],
        }
        return {**config, "callbacks": {**config["callbacks"], "pruning": callback}}

    def report(self, point: Point) -> None:
        """Report the outcome of the point's run to the study. A run ended by the pruning callback gets the state `pruned`."""
        trial, states = self.study.trials[point.number], self.optuna.trial.TrialState
        if trial.state.is_finished():
            return
        if point.state == "done" and "pruned_at_step" in trial.user_attrs:
            point.state = "pruned"
        if point.state == "pruned":
            self.study.tell(point.number, state=states.PRUNED)
        elif point.state == "failed":
            self.study.tell(point.number, state=states.FAIL)
        elif point.state == "done":
            values = [point.final.get(name, math.nan) for name in self.metrics]
            if any(math.isnan(value) for value in values):
                missing = next(name for name, value in zip(self.metrics, values, strict=True) if math.isnan(value))
                point.state, point.error = "failed", f"the run has no {missing}"
                self.study.tell(point.number, state=states.FAIL)
            else:
                self.study.tell(point.number, values)

    def best(self) -> list[int]:
        """Numbers of the best points: one for a single metric, the Pareto front for several."""
        complete = [t for t in self.study.trials if t.state.name == "COMPLETE"]
        return [trial.number for trial in self.study.best_trials] if complete else []

    def _overrides(self, params: dict[str, Any]) -> list[str]:
        made = []
        for override in self.parsed:
            key = override.get_key_element()
            value = params[key] if key in self.space else override.get_value_element_as_str()
            made.append(f"{key}={value}")
        return made

    @staticmethod
    def _check_range(override: Override, start: float | None, end: float | None, log: bool) -> None:
        key = override.get_key_element()
        if start is None or end is None or start > end:
            raise ConfigError("the range is empty", key, (override.input_line or "").partition("=")[2], fix="Write the smaller number first.")
        if log and start <= 0:
            message = f"a logarithmic range starts above 0, not at {start}"
            raise ConfigError(message, key, (override.input_line or "").partition("=")[2], fix="Start at a small number, such as 1e-6.")

    def _distribution(self, override: Override) -> Any:
        """Translate Hydra's sweep syntax: a,b or choice(); range(); interval(), integer with `int()` and logarithmic with tag(log, …)."""
        from hydra.core.override_parser.types import Transformer

        distributions, value = self.optuna.distributions, override.value()
        if isinstance(value, RangeSweep):
            numbers, log = list(value.range()), "log" in value.tags
            self._check_range(override, numbers[0] if numbers else None, numbers[-1] if numbers else None, log)
            if all(isinstance(number, int) for number in numbers):
                return distributions.IntDistribution(numbers[0], numbers[-1], log=log, step=1 if log else abs(value.step))
            return distributions.FloatDistribution(numbers[0], numbers[-1], log=log, step=None if log else float(value.step))
        if isinstance(value, IntervalSweep):
            assert value.start is not None and value.end is not None
            log = "log" in value.tags
            self._check_range(override, value.start, value.end, log)
            if isinstance(value.start, int) and isinstance(value.end, int):
                return distributions.IntDistribution(value.start, value.end, log=log)
            return distributions.FloatDistribution(float(value.start), float(value.end), log=log)
        return distributions.CategoricalDistribution([str(choice) for choice in override.sweep_iterator(transformer=Transformer.str)])


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("a search needs Optuna", "sweep.search", fix="Install it: pip install 'meshformer[search]'.") from None
    return optuna


def storage_url(file: Path) -> str:
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(file)).render_as_string()
