"""`hydra/launcher=local`: run the jobs of a sweep on this machine, each in its own processes forked from a server that has torch loaded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from .resources import Machine, Need, Share
from .server import JobSpec


@dataclass
class JobResult:
    """How a job ended. `outcome`: (done, final metrics), (interrupted, message) or (failed, message); None if it died without reporting one."""

    number: int
    outcome: tuple[str, Any] | None
    seconds: float | None


class Server:
    """Client of a server.py process. `inherit` is a file descriptor that the server and its jobs keep open."""

    def __init__(self, preload: list[str], inherit: int):
        ours, theirs = Pipe()
        start = f"import sys; sys.path[:] = {sys.path!r}; from meshformer.command.sweep.server import main; main({theirs.fileno()}, {preload!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), inherit),
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # the server computes nothing, and each job sets its own number
        )
        theirs.close()
        self.connection: Any = ours
        self.jobs: set[int] = set()

    def close(self) -> None:
        self.connection.close()
        self.process.wait()


class LocalLauncher:
    """Start jobs while the machine has free cores and GPUs. With `warm=False` each job gets a new interpreter, which imports everything again."""

    def __init__(self, machine: Machine, inherit: int, preload: list[str], warm: bool = True):
        self.machine, self.inherit, self.preload, self.warm = machine, inherit, preload, warm
        self.servers: list[Server] = [Server(preload, inherit)] if warm else []
        self.shares: dict[int, Share] = {}

    def reserve(self, number: int, need: Need) -> bool:
        """Reserve the job's cores and GPUs; return False if too few are free."""
        share = self.machine.take(need)
        if share is not None:
            self.shares[number] = share
        return share is not None

    def release(self, number: int) -> None:
        self.machine.release(self.shares.pop(number))

    def start(self, number: int, spec: JobSpec) -> None:
        """Start a job whose cores and GPUs are reserved."""
        if gpus := self.shares[number].gpus:
            spec.environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if not self.warm or not self.servers:
            self.servers.append(Server(self.preload, self.inherit))
        server = self.servers[-1]
        server.jobs.add(number)
        with contextlib.suppress(OSError):  # if the server has died, `wait` reports it
            server.connection.send(("start", number, spec))

    def wait(self, seconds: float) -> list[JobResult]:
        """Return the jobs that ended, waiting at most `seconds` for the first."""
        ended: list[JobResult] = []
        for ready in wait([server.connection for server in self.servers], seconds):
            server = next(server for server in self.servers if server.connection is ready)
            try:
                message = server.connection.recv()
            except (EOFError, OSError):
                self.servers.remove(server)
                server.close()
                ended += [JobResult(number, None, None) for number in sorted(server.jobs)]
                continue
            if message[0] == "ended":
                _, number, outcome, seconds = message
                ended.append(JobResult(number, outcome, seconds))
                server.jobs.discard(number)
                if not self.warm:
                    self.servers.remove(server)
                    server.close()
        for end in ended:
            self.release(end.number)
        return ended

    def ask_to_stop(self) -> None:
        """Ask every job to save after its step and exit."""
        self._signal(signal.SIGUSR1, group=False)

    def kill(self) -> None:
        self._signal(signal.SIGKILL, group=True)

    def _signal(self, number: signal.Signals, group: bool) -> None:
        for server in self.servers:
            for job in server.jobs:
                with contextlib.suppress(OSError):
                    server.connection.send(("signal", job, int(number), group))

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self.servers = []
