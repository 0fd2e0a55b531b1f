"""A process that has imported torch and forks one process per job, so that a sweep pays for the imports only once.

The server never trains, never draws random numbers and has one thread, so a job starts from the same state as in a new interpreter.
The sweep sends ("start", number, spec) and ("signal", number, signal, to the whole group); the server answers ("ready",) and
("ended", number, outcome, seconds). If the connection is lost, the sweep has died, and the server kills its jobs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from meshformer.importing import heavy_imports
from meshformer.printing import say

POLL_SECONDS = 0.05


@dataclass
class JobSpec:
    """Everything that a job is started with. `log` is the file that receives its stdout and stderr; `path` its sys.path."""

    config: dict[str, Any]
    folder: str
    log: str
    environment: dict[str, str]
    path: list[str]


def main(handle: int, preload: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the sweep forwards it to the jobs
    connection = Connection(handle)
    with heavy_imports():
        for name in ("meshformer.command.preload", *preload):
            importlib.import_module(name)
    connection.send(("ready",))
    spec, results = _serve(connection)
    sys.exit(_work(spec, results))


def _serve(connection: Connection) -> tuple[JobSpec, int]:
    """Serve until the sweep is gone. Returns only in forked jobs: (what to run, pipe for the outcome)."""
    jobs: dict[int, tuple[int, int, float]] = {}  # number -> (pid, pipe of its outcome, time of the fork)
    while True:
        try:
            if connection.poll(POLL_SECONDS):
                kind, number, *rest = connection.recv()
                if kind == "start":
                    read, write = os.pipe()
                    process = os.fork()
                    if not process:
                        # Each job has its own process group: Ctrl-C then reaches only the sweep, and killing the group reaches all ranks.
                        os.setpgid(0, 0)
                        connection.close()
                        for unused in (read, *(pipe for _, pipe, _ in jobs.values())):
                            os.close(unused)
                        return rest[0], write
                    with contextlib.suppress(OSError):
                        os.setpgid(process, process)
                    os.close(write)
                    jobs[number] = process, read, time.monotonic()
                elif number in jobs:
                    _signal(jobs[number][0], *rest)
            for number, (process, pipe, begun) in list(jobs.items()):
                ended, _ = os.waitpid(process, os.WNOHANG)
                if ended:
                    del jobs[number]
                    _signal(process, signal.SIGKILL, True)  # remaining processes of a killed job
                    connection.send(("ended", number, _outcome(pipe), time.monotonic() - begun))
        except (EOFError, OSError):
            for process, _, _ in jobs.values():
                _signal(process, signal.SIGKILL, True)
            os._exit(0)


def _signal(process: int, number: int, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(-process if group else process, number)


def _outcome(pipe: int) -> Any:
    with os.fdopen(pipe, "rb") as file:
        data = file.read()
    return pickle.loads(data) if data else None


def _work(spec: JobSpec, results: int) -> int:
    """Run one job and write its outcome, (state, final metrics or message), to the pipe `results`. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _print_to(spec.log)
    os.environ.update(spec.environment)
    sys.path[:] = spec.path
    threading.Thread(target=_exit_with_server, args=(os.getppid(),), daemon=True).start()
    from meshformer.command.launch import launch
    from meshformer.config.errors import ConfigError, Stopped

    code, outcome = 1, None
    try:
        code, outcome = 0, ("done", launch(spec.config, Path(spec.folder), start_method="fork"))
    except Stopped as stopped:
        say(stopped, error=True)
        code, outcome = stopped.exit_code, ("interrupted", str(stopped))
    except ConfigError as error:
        code, outcome = 2, ("failed", str(error))
    except Exception as error:
        details = getattr(error, "details", None)
        outcome = "failed", f"{type(error).__name__}: {error}" if details is None else str(error)
        say(traceback.format_exc() if details is None else details, error=True, end="")
    if outcome is not None and outcome[0] == "failed":
        say(f"error: {outcome[1]}", error=True)
    with os.fdopen(results, "wb") as file:
        file.write(pickle.dumps(outcome))
    return code


def _print_to(log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, handle), (2, handle)):
        os.dup2(source, target)
    os.close(handle)
    os.close(nothing)


def _exit_with_server(server: int) -> None:
    """Kill this job's process group when the server is gone: a killed server cannot stop its jobs."""
    while os.getppid() == server:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
