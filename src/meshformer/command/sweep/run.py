"""Run one sweep: check every point, run those that are left, update sweep.json, print the results."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from meshformer.checkpoint.find import candidates
from meshformer.command import compose
from meshformer.command.explain import EXPLAINED
from meshformer.command.recorded import confirmed_config_dir, option_name, own_settings, split_command
from meshformer.compat.hydra import Callbacks
from meshformer.config import ConfigError, validate
from meshformer.config.resolve import cores, external_launcher, visible_gpus
from meshformer.config.schema import SweepOptions
from meshformer.printing import argument, say
from meshformer.record import RunRecord

from . import results
from .display import Display
from .local import JobResult, LocalLauncher
from .plugin import PluginLauncher, resumed_config
from .points import Composer, Confined, Job, differences, grid, module_path, open_folder
from .record import FILE as BOOK
from .record import Point, SweepRecord
from .resources import Machine, Need
from .search import FILE as STUDY
from .search import Search
from .server import JobSpec

COMMAND_PREFIXES = ("hydra", "sweep.", "allow=", "paths.")  # overrides that may change when a sweep is resumed
WAIT_SECONDS = 0.2


def run_sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    """`meshformer train -m`; returns the exit code: 0 all done, 1 a run failed, 75 (preempted) or 130 (Ctrl-C) with runs left."""
    if external_launcher() is not None:
        raise ConfigError("a sweep starts its own processes", "--multirun", fix="Start it without torchrun or srun.")
    taken, overrides = compose.take(overrides, "sweep.resume")
    flags = {"config_dir": str(Path(args.config_dir).absolute()) if args.config_dir else None, "config_name": args.config_name}
    record, typed, confine = None, overrides, None
    if "sweep.resume" in taken:
        record = SweepRecord.read(Path(taken["sweep.resume"]).expanduser().absolute())
        place = str(record.folder / BOOK)
        flags["config_dir"] = confirmed_config_dir(record.flags.get("config_dir"), flags["config_dir"], "sweep.resume", record.folder)
        flags["config_name"] = flags["config_name"] or option_name(record.flags.get("config_name"), place)
        of_the_runs = split_command(record.overrides, typed, place, flags["config_dir"])
        for point in record.points:
            point.overrides = own_settings(point.overrides, place, flags["config_dir"])
        confine = Confined(flags, typed)
        if not _point_overrides(overrides):
            # A sweep's folder is not trusted: its `allow` list counts only if this command repeats it.
            allowed = [override for override in record.overrides if override.lstrip("+").startswith("allow=")]
            if allowed and not any(override.lstrip("+").startswith("allow=") for override in overrides):
                message = "its runs build classes or functions that are not on the list of what a configuration may build"
                raise ConfigError(message, "sweep.resume", str(record.folder), fix=f"If you trust it, add {allowed[-1]} to the command.")
            overrides = [o for o in of_the_runs if not o.lstrip("+").startswith("allow=")] + overrides
        overrides = [o for o in overrides if not o.startswith("hydra.sweep.dir=")] + [f"hydra.sweep.dir={compose.quoted(str(record.folder))}"]
    composer = Composer(flags, [], confine)
    cfg = composer.command(overrides)
    composer.sources = record.sources if record else composer.sources
    composer.hydra_overrides = [o for o in cfg.hydra.overrides.hydra if not o.startswith("hydra.mode=")]
    options = validate({"sweep": OmegaConf.to_container(cfg.sweep, resolve=True)}, SweepOptions)["sweep"]
    _check_options(cfg, options, record)
    parsed = composer.parse(cfg, [o for o in cfg.hydra.overrides.task if not o.lstrip("+~").startswith("sweep.")])
    folder = record.folder if record else Path(str(cfg.hydra.sweep.dir)).absolute()
    if args.dry_run:
        return _dry_run(composer, folder, [] if options["search"] else grid(parsed), options, record)
    search = Search(folder, parsed, options, cfg.get("seed") or 0) if options["search"] else None
    points = [] if search else [Point(number, point) for number, point in enumerate(grid(parsed))]
    if record:
        _refuse_other_points(record, overrides, points, search)
    jobs = {} if record else _check_points(composer, points, options["fail_fast"])
    if record is None:
        record = SweepRecord(folder, typed, flags, points, composer.sources)
        record.claim()
    with _Locked(record) as lock:
        callbacks = Callbacks(cfg)
        callbacks.on_multirun_start(config=cfg, config_name=composer.name)
        try:
            return _Sweep(composer, cfg, options, record, jobs, search, lock).run()
        finally:
            callbacks.on_multirun_end(config=cfg, config_name=composer.name)


def _dry_run(composer: Composer, folder: Path, combinations: list[list[str]], options: dict[str, Any], record: SweepRecord | None) -> int:
    """Check every point of a grid and print them; return the exit code."""
    from meshformer.command.dry_run import say_sweep

    if record is not None:
        raise ConfigError("it shows a new sweep", "--dry-run", fix=f"Read {record.folder / BOOK}, or leave it out.")
    points = [Point(number, overrides) for number, overrides in enumerate(combinations)]
    jobs = _check_points(composer, points, options["fail_fast"])
    say_sweep(folder, [(point.overrides, point.error) for point in points], options["search"], options["trials"], jobs)
    return 0


class _Locked:
    """Context manager that holds the sweep's lock and returns its file descriptor."""

    def __init__(self, record: SweepRecord):
        self.record = record

    def __enter__(self) -> int:
        return self.record.lock()

    def __exit__(self, *_: object) -> None:
        self.record.unlock()


def _check_options(cfg: DictConfig, options: dict[str, Any], record: SweepRecord | None) -> None:
    if not str(cfg.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        chosen = cfg.hydra.runtime.choices.get("hydra/sweeper")
        raise ConfigError("grids and searches have their own sweeper here", "hydra/sweeper", chosen, fix="Use sweep.search=tpe or random.")
    if not options["minimize"] + options["maximize"]:
        raise ConfigError("no metric is named here or in sweep.maximize", "sweep.minimize", fix="Use sweep.minimize=[val/loss].")
    if options["retry_failed"] and record is None:
        raise ConfigError("a new sweep has nothing to retry", "sweep.retry_failed", True, fix="Add sweep.resume=DIR.")
    if options["pruner"] and not options["search"]:
        raise ConfigError("a grid runs every point", "sweep.pruner", options["pruner"], fix="Add sweep.search=tpe or random.")


def _refuse_other_points(record: SweepRecord, typed: Sequence[str], points: list[Point], search: Search | None) -> None:
    """Raise ConfigError if a resumed sweep has other points than the recorded one. `typed`: this command's overrides, or the recorded ones."""
    leave_out = f"Leave the overrides out: meshformer train -m {argument('sweep.resume', record.folder)} takes them from there."
    if (record.folder / STUDY).exists() != (search is not None):
        there = "a search" if search is None else "a grid"
        raise ConfigError(f"that is {there}", "sweep.resume", str(record.folder), fix=leave_out)
    if search:  # its points depend on results, so the overrides are compared instead
        found = differences([_point_overrides(record.overrides)], [_point_overrides(typed)])
    else:
        found = differences([_point_overrides(p.overrides) for p in record.points], [_point_overrides(p.overrides) for p in points])
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        kind = "search" if search else "grid"
        raise ConfigError(f"that folder holds a different {kind} ({'; '.join(found[:3])}{more})", "sweep.resume", str(record.folder), fix=leave_out)


def _point_overrides(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if not override.lstrip("+~").startswith(COMMAND_PREFIXES)]


def _check_points(composer: Composer, points: list[Point], fail_fast: bool) -> dict[int, Job]:
    """Compose and check every point of a grid before the first one runs, so that a mistake in the last does not show after hours.

    Returns the jobs that can be trained; the other points become failed. Raises ConfigError if no point can be trained, for the first bad point
    with `fail_fast`, and for an override that Hydra cannot compose, which is a typing mistake rather than a combination that does not fit.
    """
    jobs: dict[int, Job] = {}
    first: ConfigError | None = None
    for point in points:
        try:
            jobs[point.number] = composer.job(point.number, point.overrides)
        except ConfigError as error:
            if fail_fast or isinstance(error.__cause__, EXPLAINED):
                raise
            first = first or error
            point.state, point.error = "failed", str(error)
    if not jobs and first is not None:
        raise first
    return jobs


class _Sweep:
    def __init__(
        self,
        composer: Composer,
        cfg: DictConfig,
        options: dict[str, Any],
        record: SweepRecord,
        jobs: dict[int, Job],
        search: Search | None,
        lock: int,
    ):
        self.composer, self.cfg, self.options, self.lock = composer, cfg, options, lock
        self.record, self.jobs, self.search = record, jobs, search
        self.metrics = [*options["minimize"], *options["maximize"]]
        self.largest_first = not options["minimize"]
        # A resumed sweep takes these from the command, not from its recorded points.
        self.allow = [f"allow=[{','.join(cfg.allow)}]"] if cfg.get("allow") else []
        self.allow += composer.confine.overrides if composer.confine else []
        self.waiting: list[Point] = []
        self.started_at: dict[int, float] = {}  # point number -> time.monotonic() of its start, running points only
        self.signals: list[int] = []
        self.stop_sent = False
        self.stopping: str | None = None  # once stopping: the final state of the sweep
        self.display = Display(record.points, record.folder, self.metrics[0], options["trials"] if search else len(record.points))

    def run(self) -> int:
        self._collect_waiting()
        self.record.write("running")
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                before[number] = signal.signal(number, lambda number, frame: self.signals.append(number))
        try:
            with self.display:
                for point in self.record.in_state("failed"):
                    self.display.changed(point)
                if self.cfg.hydra.launcher.get("_target_"):
                    self._run_plugin()
                else:
                    self._run_local()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._finish()

    def _collect_waiting(self) -> None:
        """Collect the points that still have to run, after correcting the states that a killed command left behind."""
        retried = ("failed",) if self.options["retry_failed"] and not self.search else ()
        for point in self.record.points:
            if point.state == "running":  # the command was killed, perhaps after the run had finished
                record = RunRecord(self.record.folder / point.folder).fields if point.folder else {}
                point.state, point.final = ("done", dict(record["final"])) if record.get("state") == "finished" else ("interrupted", {})
        if self.search:
            self.record.points += self.search.open(self.record.points)
            for point in self.record.points:
                if point.state not in ("queued", "interrupted"):
                    self.search.report(point)
        for point in self.record.in_state("queued", "interrupted", *retried):
            point.state, point.error = "queued", None
            self.waiting.append(point)

    # --- shared by all launchers

    def _job(self, point: Point) -> Job:
        """The point's job, composed on first use. A run that has a checkpoint continues with its own config.yaml."""
        if point.number not in self.jobs:
            folder = self.record.folder / point.folder
            if point.folder and candidates(folder):
                job = Job(resumed_config(folder, list(self.cfg.get("allow") or []), self.composer.own(self.cfg)), point.folder, {})
            else:
                job = self.composer.job(point.number, [*point.overrides, *self.allow])
            if self.search:
                job.config = self.search.with_pruning(point, job.config)
            self.jobs[point.number] = job
        point.folder = self.jobs[point.number].folder
        return self.jobs[point.number]

    def _next(self) -> list[Point]:
        """Points that may start now, in order. A search proposes a new one if none is waiting."""
        if not self.waiting and self.search and self.search.more(self.record.points):
            point = self.search.propose()
            self.record.points.append(point)
            self.waiting.append(point)
            self.record.write()
        return self.waiting

    def _set(self, point: Point, state: str, error: str | None = None, seconds: float | None = None) -> None:
        point.state, point.error = state, error
        if state == "running":
            self.started_at[point.number] = time.monotonic()
        elif point.number in self.started_at:
            since = self.started_at.pop(point.number)
            point.seconds += time.monotonic() - since if seconds is None else seconds
        if state != "running":
            self.jobs.pop(point.number, None)
            if self.search:
                self.search.report(point)
        self.record.write()
        self.display.changed(point)
        if point.state == "failed" and self.options["fail_fast"] and self.stopping is None:
            self.stopping = "failed"

    def _ended(self, point: Point, outcome: tuple[str, Any] | None, seconds: float | None = None) -> None:
        if outcome is None:
            words = "killed" if self.stopping else "died without an error message (killed, or out of memory)"
            record = RunRecord(self.record.folder / point.folder)
            if record.fields.get("state") == "running":
                record.finish("failed", error=words)
            self._set(point, "interrupted" if self.stopping else "failed", None if self.stopping else words, seconds)
        elif outcome[0] == "done":
            point.final = dict(outcome[1])
            self._set(point, "done", None, seconds)
        else:
            self._set(point, outcome[0], str(outcome[1]).strip().partition("\n")[0] if outcome[0] == "failed" else None, seconds)

    # --- the local launcher

    def _run_local(self) -> None:
        chosen, jobs = self.cfg.hydra.launcher, self.options["jobs"]
        machine = Machine(*_resources(chosen))
        preload = ["optuna"] if self.search and self.options["pruner"] else []
        launcher = LocalLauncher(machine, self.lock, preload, chosen.warm) if self._next() else None
        if launcher is None:
            return
        try:
            while True:
                if self.stopping is None:
                    self._start(launcher, jobs)
                if not self.started_at:
                    break
                for end in launcher.wait(WAIT_SECONDS):
                    self._end(end)
                self._handle_signals(launcher)
                self.display.refresh()
        finally:
            launcher.kill()
            launcher.close()

    def _start(self, launcher: LocalLauncher, most: int | str) -> None:
        limit = len(launcher.machine.gpus) + launcher.machine.cores if most == "auto" else int(most)
        total = self.options["trials"] if self.search else len(self.record.points)
        refused: list[Point] = []
        while len(self.started_at) < limit and (waiting := [point for point in self._next() if point not in refused]):
            point = waiting[0]  # a point that does not fit yet waits, and later ones may overtake it
            try:
                job = self._job(point)
            except ConfigError as error:
                self.waiting.remove(point)
                self._set(point, "failed", str(error))
                if self.stopping:
                    return
                continue
            trainer = job.config["trainer"]
            gpu = trainer["accelerator"] == "gpu"
            if job.auto_threads:
                trainer["threads"] = launcher.machine.threads(trainer["devices"], gpu, total if most == "auto" else min(total, int(most)))
            if not launcher.reserve(point.number, Need(trainer["devices"], trainer["threads"], gpu)):
                refused.append(point)
                continue
            self.waiting.remove(point)
            folder = self.record.folder / point.folder
            try:
                if not job.config["resume"]:
                    shutil.rmtree(folder, ignore_errors=True)  # left by an earlier start that saved no checkpoint
                    open_folder(folder, job.config, self.composer.settings([*point.overrides, *self.allow]))
            except ConfigError as error:
                launcher.release(point.number)
                self._set(point, "failed", str(error))
                continue
            launcher.start(point.number, JobSpec(job.config, str(folder), str(folder / "job.log"), job.environment, module_path()))
            self._set(point, "running")

    def _end(self, end: JobResult) -> None:
        self._ended(next(point for point in self.record.points if point.number == end.number), end.outcome, end.seconds)

    def _handle_signals(self, launcher: LocalLauncher) -> None:
        """On the first signal, or the first failure with fail_fast, ask the runs to save and stop; on a second signal, kill them."""
        if self.signals and self.stopping is None:
            self.stopping = "interrupted" if self.signals[0] == signal.SIGINT else "preempted"
        if self.stopping and not self.stop_sent:
            self.stop_sent = True
            if self.started_at:
                self.display.say(f"stopping: {len(self.started_at)} runs save after their step; repeat the signal to kill them")
            launcher.ask_to_stop()
        if len(self.signals) > 1:
            launcher.kill()

    # --- other launchers

    def _run_plugin(self) -> None:
        launcher = PluginLauncher(self.composer.hydra, self.cfg, self.composer.flags)
        while self.stopping is None and self._next():
            batch: list[Point] = []
            size = launcher.batch(self.options["trials"] if self.search else len(self.waiting))
            size = size if self.options["jobs"] == "auto" else min(size, self.options["jobs"])
            while len(batch) < size and self._next():
                point = self.waiting.pop(0)
                try:
                    self._job(point)
                except ConfigError as error:
                    self._set(point, "failed", str(error))
                    continue
                self._set(point, "running")
                batch.append(point)
            if not batch:
                continue
            try:
                outcomes = launcher.run(batch, self.allow)
            except KeyboardInterrupt:
                self.signals.append(signal.SIGINT)
                outcomes = [("interrupted", "")] * len(batch)
            for point, outcome in zip(batch, outcomes, strict=True):
                self._ended(point, outcome)
            if self.signals:
                self.stopping = "interrupted" if self.signals[0] == signal.SIGINT else "preempted"

    # --- the end

    def _finish(self) -> int:
        record = self.record
        left = record.in_state("queued", "interrupted")
        failed = record.in_state("failed")
        state = self.stopping or ("failed" if failed else "preempted" if left else "finished")
        record.write(state)
        results.write(record.folder, record.points, self.metrics, self.largest_first)
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(results.table(record.points, self.metrics, self.largest_first))
        if self.search and (best := self.search.best()):
            kind = "best trial" if len(self.metrics) == 1 else "Pareto-optimal trials"
            say(f"{kind}: " + ", ".join(str(record.folder / next(p.folder for p in record.points if p.number == number)) for number in best))
        for point in failed:
            log = record.folder / point.folder / "job.log" if point.folder else None
            say(f"failed: {point.name}\n  {point.error}" + (f"\n  log: {log}" if log and log.is_file() else ""), error=True)
        say(f"sweep folder  {record.folder}  (results.csv, results.json)")
        runs = Path(str(self.cfg.paths.runs)).absolute()  # where MLflow's database may lie
        more = "" if runs == Path("runs").absolute() else f" {argument('paths.runs', runs)}"
        again = f"meshformer train -m {argument('sweep.resume', record.folder)}{more}"
        if left:
            say(f"  {len(left)} of {self.display.total} runs are left; continue with  {again}")
        if failed:
            say(f"  try the failed again with  {again} sweep.retry_failed=true")
        return {"finished": 0, "failed": 1, "preempted": 75, "interrupted": 130}[state]


def _resources(chosen: DictConfig) -> tuple[int, list[str]]:
    """Return the number of cores and the names of the GPUs that jobs may use."""
    count = visible_gpus()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(index) for index in range(count)] if shown is None else [entry.strip() for entry in shown.split(",")][:count]
    most = chosen.gpus
    return cores() if chosen.cores == "auto" else int(chosen.cores), gpus if most == "auto" else gpus[: int(most)]
