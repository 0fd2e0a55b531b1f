"""One job, one call: in this process, or as ranks of torch's elastic agent.

Lightning's own launcher would replay the command line in every rank (a multirun would then run whole sweeps inside a rank); the agent hands
each worker the resolved plain dict instead, so workers never compose a configuration and never see Hydra's command line.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import traceback
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshformer.checkpoint.find import VERIFIED, checkpoints
from meshformer.command.slurm import requeue
from meshformer.config.errors import ConfigError, Stopped
from meshformer.config.resolve import external_launcher
from meshformer.printing import say
from meshformer.record.run_folder import PENDING, atomic_write_text
from meshformer.record.run_json import RunRecord

if TYPE_CHECKING:
    from meshformer.callbacks.preemption import StopSignals

TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout", "Timed out after")  # gloo's words, and NCCL's
STOP, LEAVE = "stop", "leave"  # files beside the ranks' notes: stop after this step, saved; leave at once
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class JobFailed(Exception):
    """A rank failed; the message says which and why, `details` is its traceback."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def launch(config: dict[str, Any], folder: Path, own_process: bool = False, start_method: str = "forkserver") -> dict[str, float]:
    """Trains `config` in `folder` and returns rank 0's final metrics. `own_process`: start a worker even for one device (grids).

    `start_method="fork"`: only from a process that has imported all and computed nothing, as command/sweep and
    bench/faults.py have; it saves each job seconds.
    """
    processes, around = config["trainer"]["devices"], external_launcher()
    os.environ["OMP_NUM_THREADS"] = str(config["trainer"]["threads"])  # read once, when torch is imported
    try:
        if around is not None or (processes == 1 and not own_process):
            return _train(config, folder)  # torchrun and srun made the ranks already
        return _launch_agent(config, folder, processes, start_method)
    except Stopped as stopped:
        if config["launch"]["requeue"] and stopped.reason == "preempted" and stopped.saved and (around is None or around.rank == 0):
            requeue()
        raise


def _train(config: dict[str, Any], folder: Path, signals: StopSignals | None = None) -> dict[str, float]:
    from meshformer.job.train import leave_together, train

    try:
        final = train(config, folder, signals)
    except Stopped:  # as all ranks were
        leave_together()
        raise
    leave_together()
    return final


def _launch_agent(config: dict[str, Any], folder: Path, processes: int, start_method: str) -> dict[str, float]:
    import multiprocessing

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    from torch.numa.binding import AffinityMode, NumaOptions

    multiprocessing.set_forkserver_preload(["meshformer.job.train"])  # imported once, before the ranks are forked
    if start_method == "forkserver":
        _start_fork_server()
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=config["launch"]["max_restarts"],
        monitor_interval=0.1,
        start_method=start_method,
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are ours: see _PassingOn
        numa_options=NumaOptions(AffinityMode.NODE),  # without any torch asks how many GPUs there are, which starts CUDA: no fork survives that
    )
    agent.numa_options = None
    if config["launch"]["max_restarts"]:
        # torch 2.13 keeps one store over all restarts, so new ranks find the addresses of the dead. Without sharing, each start has its own.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    notes = folder / ".ranks"
    _remove(notes)
    notes.mkdir()
    with _PassingOn(notes) as passing:
        try:
            results = elastic_launch(agent, _worker)(config, str(folder), str(notes), os.getpid(), VERIFIED)
        except (ChildFailedError, SignalException, KeyboardInterrupt) as failure:
            cause = (
                _first_cause(notes, failure, processes)
                if isinstance(failure, ChildFailedError)
                else JobFailed("stopped at once by a signal")
            )
            record = RunRecord(folder)
            refused = isinstance(cause, ConfigError) or (config["resume"] and (folder / PENDING).exists())  # before the first step
            if record.fields.get("state") in ("running", "failed") and not refused:  # rank 0 may be gone, or know only what another's end did to it
                record.finish("failed", error=str(cause))
            raise cause from None
        finally:
            _remove(notes)
    first = results[0]
    if "stopped" in first:
        reason, *rest = first["stopped"]
        raise Stopped(passing.asked or reason, *rest)
    return first


def _start_fork_server() -> None:
    """Deaf to the signals that SLURM sends to every process of a job step: without it the agent takes all ranks for dead."""
    from multiprocessing import forkserver

    if threading.current_thread() is not threading.main_thread():
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1, signal.SIGTERM)}  # which a new program inherits
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _PassingOn:
    """The first SIGTERM, SIGUSR1 or Ctrl-C asks the ranks to stop after their step, saved; the next ends everything at once."""

    def __init__(self, notes: Path):
        self.notes, self.asked = notes, None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _PassingOn:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: Any) -> None:
        if self.asked:
            _touch(self.notes / LEAVE)
            raise KeyboardInterrupt  # the agent kills its ranks on the way out
        self.asked = "interrupted" if number == signal.SIGINT else "preempted"
        _touch(self.notes / STOP)  # for ranks that are not there yet
        say("stopping after this step; once more to stop at once", error=True)
        for file in self.notes.glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGUSR1)
            except (ProcessLookupError, ValueError):
                continue


def _worker(config: dict[str, Any], folder: str, notes: str, launcher: int, verified: dict[str, Any]) -> dict[str, Any]:
    """One rank. Its error, if any, is left in a file: the parent shows the earliest, which is the cause of the others.

    What restarting cannot mend (a stop that was asked for, a mistake in the configuration) is returned instead. `verified`: the checkpoints that
    the parent has read already.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the fork server ignores it
    threading.Thread(target=_leave_with, args=(launcher,), daemon=True).start()
    rank, start = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for old in Path(notes).glob(f"[0-9]*.{rank}.*"):  # of the start before this one; not what another rank is writing, .0.1.pid…
        old.unlink(missing_ok=True)
    VERIFIED.update(verified)
    try:
        from meshformer.callbacks.preemption import StopSignals

        with StopSignals(by_agent=True, leaving=partial(_someone_left, Path(notes), start)) as signals:
            atomic_write_text(Path(notes) / f"{start}.{rank}.pid", str(os.getpid()))
            if (Path(notes) / STOP).exists():
                signals.requested = "preempted"
            if int(start) and checkpoints(Path(folder)):
                config = {**config, "resume": folder}
            return _train(config, Path(folder), signals)
    except Stopped as stopped:
        return {"stopped": list(stopped.args)}
    except BaseException as error:
        note = {
            "time": time.time(),
            "rank": int(rank),
            "type": type(error).__name__,
            "message": str(error),
            "config": list(error.args) if isinstance(error, ConfigError) else None,
            "traceback": traceback.format_exc(),
        }
        (Path(notes) / f"{start}.{rank}.json").write_text(json.dumps(note, default=str))
        raise SystemExit(1) from None


def _touch(file: Path) -> None:
    with suppress(OSError):  # a full disk, or ranks that have all ended
        file.touch()


def _someone_left(notes: Path, start: str) -> bool:
    """Whether a rank of this start has failed, is gone or not there yet, or all are to leave at once. Else SIGTERM comes from outside."""
    processes = [file.read_text() for file in notes.glob(f"{start}.*.pid")]
    gone = len(processes) < int(os.environ["WORLD_SIZE"]) or not all(map(_runs, processes))
    return gone or (notes / LEAVE).exists() or any(notes.glob(f"{start}.*.json"))


def _runs(process: str) -> bool:
    try:
        return "\nState:\tZ" not in (Path("/proc") / process / "status").read_text()
    except OSError:
        return not Path("/proc/self").exists() and _exists(int(process))


def _leave_with(launcher: int) -> None:
    """A killed parent cannot stop its workers: they watch it and leave."""
    while True:
        time.sleep(1)
        if not _exists(launcher):
            os._exit(1)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _first_cause(folder: Path, failure: Exception, processes: int) -> Exception:
    notes = [json.loads(p.read_text()) for p in folder.glob("*.json")]
    # A failing rank may close its connections before its own error is noted: that its peers lost it is never the cause.
    notes.sort(key=lambda note: (any(words in note["message"] for words in PEER_LOST), note["time"]))
    if notes and all(any(words in note["message"] for words in PEER_LOST) for note in notes):
        silent = set(range(processes)) - {note["rank"] for note in notes}  # the dead, and those the agent stopped before they noticed
        who = f"rank {silent.pop()}" if len(silent) == 1 else "a rank"
        return JobFailed(f"{who} died without a word (killed, or out of memory); rank {notes[0]['rank']} lost its connection to it")
    if not notes:
        return JobFailed(f"a rank died without a word (killed, or out of memory): {failure}")
    first = notes[0]
    if first["config"] is not None:
        return ConfigError(*first["config"])
    if any(words in first["message"] for words in TIMED_OUT):
        waited = {note["rank"] for note in notes if any(words in note["message"] for words in TIMED_OUT)}
        others = set(range(processes)) - waited  # all that did not wait, but for those that the agent stopped before they gave up
        of = f"rank {others.pop()}" if len(others) == 1 else "another rank"
        return JobFailed(
            f"rank {first['rank']} waited for {of}, longer than strategy.timeout allows: hung, or slower than that", first["traceback"]
        )
    return JobFailed(f"rank {first['rank']} failed: {first['type']}: {first['message']}", first["traceback"])


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
