"""Run one training job, in this process or as the ranks of torch's elastic agent.

Lightning's own launcher would rerun the command line in every rank, so that a multirun would start a whole sweep inside each rank. The agent
passes the resolved plain dict to each worker instead: workers never compose a configuration.
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
from meshformer.importing import heavy_imports
from meshformer.printing import say
from meshformer.record.run_folder import PENDING, atomic_write_text
from meshformer.record.run_json import RunRecord

if TYPE_CHECKING:
    from meshformer.callbacks.preemption import StopSignals

TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout", "Timed out after")  # in messages of gloo and NCCL
STOP, LEAVE = "stop", "leave"  # marker files in .ranks: STOP asks to save and stop after this step, LEAVE to exit at once
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class JobFailed(Exception):
    """A rank failed. The message says which rank and why; `details` is its traceback."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


def launch(config: dict[str, Any], folder: Path, own_process: bool = False, start_method: str = "forkserver") -> dict[str, float]:
    """Train `config` in `folder` and return rank 0's final metrics. `own_process` starts a worker even for one device (used by grids).

    `start_method="fork"` saves seconds per job, but is safe only from a process that has imported everything and computed nothing with torch,
    as in command/sweep and bench/faults.py.
    """
    processes, external = config["trainer"]["devices"], external_launcher()
    os.environ["OMP_NUM_THREADS"] = str(config["trainer"]["threads"])  # torch reads it once, at import
    try:
        if external is not None or (processes == 1 and not own_process):
            return _train(config, folder)  # torchrun or srun has started the ranks already
        return _launch_agent(config, folder, processes, start_method)
    except Stopped as stopped:
        if config["launch"]["requeue"] and stopped.reason == "preempted" and stopped.saved and (external is None or external.rank == 0):
            requeue()
        raise


def _train(config: dict[str, Any], folder: Path, signals: StopSignals | None = None) -> dict[str, float]:
    with heavy_imports():
        from meshformer.job.train import leave_together, train

    try:
        final = train(config, folder, signals)
    except Stopped:  # raised on all ranks at the same step
        leave_together()
        raise
    leave_together()
    return final


def _launch_agent(config: dict[str, Any], folder: Path, processes: int, start_method: str) -> dict[str, float]:
    import multiprocessing

    with heavy_imports():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        from torch.numa.binding import AffinityMode, NumaOptions

    multiprocessing.set_forkserver_preload(["meshformer.command.preload"])  # the ranks are forked with all of it already imported
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
        signals_to_handle="SIGHUP,SIGQUIT",  # the other signals are handled by _SignalForwarder
        numa_options=NumaOptions(AffinityMode.NODE),  # avoids torch's default, which counts GPUs and so initialises CUDA before the fork
    )
    agent.numa_options = None
    if config["launch"]["max_restarts"]:
        # torch 2.13 shares one store between all restarts, where new ranks find the addresses of dead ones. This gives each start its own store.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    notes = folder / ".ranks"
    _remove(notes)
    notes.mkdir()
    with _SignalForwarder(notes) as forwarder:
        try:
            results = elastic_launch(agent, _worker)(config, str(folder), str(notes), os.getpid(), VERIFIED)
        except (ChildFailedError, SignalException, KeyboardInterrupt) as failure:
            cause = (
                _first_cause(notes, failure, processes)
                if isinstance(failure, ChildFailedError)
                else JobFailed("stopped at once by a signal")
            )
            record = RunRecord(folder)
            refused = isinstance(cause, ConfigError) or (config["resume"] and (folder / PENDING).exists())  # failed before its first step
            if record.fields.get("state") in ("running", "failed") and not refused:  # rank 0 may be dead, or have recorded only the loss of its peer
                record.finish("failed", error=str(cause))
            raise cause from None
        finally:
            _remove(notes)
    first = results[0]
    if "stopped" in first:
        reason, *rest = first["stopped"]
        raise Stopped(forwarder.asked or reason, *rest)
    return first


def _start_fork_server() -> None:
    """Start the fork server with SIGUSR1, SIGTERM and SIGINT ignored.

    SLURM and the terminal send them to every process of a job; if the server died, the agent would report all ranks as dead.
    """
    from multiprocessing import forkserver

    if threading.current_thread() is not threading.main_thread():
        return
    ignored = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}  # exec keeps ignored signals ignored
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _SignalForwarder:
    """Forward the first SIGTERM, SIGUSR1 or Ctrl-C to the ranks, which then save and stop after their step; the next one kills them at once."""

    def __init__(self, notes: Path):
        self.notes, self.asked = notes, None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _SignalForwarder:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: Any) -> None:
        if self.asked:
            _touch(self.notes / LEAVE)
            raise KeyboardInterrupt  # the agent kills its ranks on the way out
        self.asked = "interrupted" if number == signal.SIGINT else "preempted"
        _touch(self.notes / STOP)  # for ranks that have not started yet
        say("stopping after this step; repeat the signal to stop at once", error=True)
        for file in self.notes.glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGUSR1)
            except (ProcessLookupError, ValueError):
                continue


def _worker(config: dict[str, Any], folder: str, notes: str, launcher: int, verified: dict[str, Any]) -> dict[str, Any]:
    """Run one rank. An error is written to a file, of which the parent reports the earliest: it usually caused the others.

    A requested stop is returned rather than raised, because the agent would restart the ranks after an exception. `verified` holds the checkpoints
    that the parent has verified already.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the fork server ignores it
    threading.Thread(target=_exit_with_launcher, args=(launcher,), daemon=True).start()
    rank, start = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for old in Path(notes).glob(f"[0-9]*.{rank}.*"):  # this rank's files from earlier starts; another rank may be writing its own right now
        old.unlink(missing_ok=True)
    VERIFIED.update(verified)
    try:
        from meshformer.callbacks.preemption import StopSignals

        with StopSignals(by_agent=True, leaving=partial(_shutdown_in_progress, Path(notes), start)) as signals:
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
    with suppress(OSError):  # the disk is full, or all ranks have ended and their folder is deleted
        file.touch()


def _shutdown_in_progress(notes: Path, start: str) -> bool:
    """Whether a rank of this start has failed, died or not yet started, or all must exit at once. If not, a SIGTERM came from outside the agent."""
    processes = [file.read_text() for file in notes.glob(f"{start}.*.pid")]
    gone = len(processes) < int(os.environ["WORLD_SIZE"]) or not all(map(_is_running, processes))
    return gone or (notes / LEAVE).exists() or any(notes.glob(f"{start}.*.json"))


def _is_running(process: str) -> bool:
    try:
        return "\nState:\tZ" not in (Path("/proc") / process / "status").read_text()
    except OSError:
        return not Path("/proc/self").exists() and _exists(int(process))


def _exit_with_launcher(launcher: int) -> None:
    """Exit when the launcher process is gone: a killed parent cannot stop its workers."""
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
    # A failing rank may close its connections before it has written its error, so errors about a lost peer are sorted last.
    notes.sort(key=lambda note: (any(words in note["message"] for words in PEER_LOST), note["time"]))
    if notes and all(any(words in note["message"] for words in PEER_LOST) for note in notes):
        silent = set(range(processes)) - {note["rank"] for note in notes}  # dead ranks, and ranks that the agent stopped before they noticed
        who = f"rank {silent.pop()}" if len(silent) == 1 else "a rank"
        return JobFailed(f"{who} died without an error message (killed, or out of memory); rank {notes[0]['rank']} lost its connection to it")
    if not notes:
        return JobFailed(f"a rank died without an error message (killed, or out of memory): {failure}")
    first = notes[0]
    if first["config"] is not None:
        return ConfigError(*first["config"])
    if any(words in first["message"] for words in TIMED_OUT):
        waited = {note["rank"] for note in notes if any(words in note["message"] for words in TIMED_OUT)}
        others = set(range(processes)) - waited  # includes ranks that the agent stopped before their own timeout
        of = f"rank {others.pop()}" if len(others) == 1 else "another rank"
        return JobFailed(
            f"rank {first['rank']} waited for {of}, longer than strategy.timeout allows: hung, or slower than that", first["traceback"]
        )
    return JobFailed(f"rank {first['rank']} failed: {first['type']}: {first['message']}", first["traceback"])


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
