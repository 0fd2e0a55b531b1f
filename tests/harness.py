"""Several ranks in a test, in about two seconds: this process has imported everything already, so ranks are forked from it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed


class RankFailed(AssertionError):
    pass


def free_port() -> int:
    """A port that nobody takes before a rank listens on it: not of those that the system gives to connections, from 32768 on, nor to another
    worker of pytest's, nor twice in a row."""
    first = 10000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = first + next(_counted) % 1000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


_counted = count(os.getpid())


def run_ranks(ranks: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120.0, grace: float = 5.0) -> list[Any]:
    """`work(*arguments)` on `ranks` forked processes that see torchelastic's environment; what each returned.

    The first failure ends the others after `grace` seconds; its traceback becomes the message. Nothing outlives `timeout` seconds.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        pids = [_fork(rank, ranks, port, Path(scratch), work, arguments) for rank in range(ranks)]
        codes = _wait(pids, timeout, grace)
        if any(codes):
            logs = [(Path(scratch) / f"{rank}.log").read_text(errors="replace") for rank in range(ranks)]
            told = [(rank, log) for rank, (log, code) in enumerate(zip(logs, codes, strict=True)) if code not in (0, -signal.SIGKILL)]
            rank, log = next(((r, t) for r, t in told if "Connection" not in t), told[0] if told else (0, logs[0]))
            raise RankFailed(f"exit codes {codes}; rank {rank} said:\n{log[-4000:]}")
        return [pickle.loads((Path(scratch) / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _fork(rank: int, ranks: int, port: int, scratch: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(scratch / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # pytest's capture objects would swallow the traceback
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
        torch.set_num_threads(1)  # a test before this one may have used more, and a used OpenMP pool does not survive a fork
        result = work(*arguments)
        (scratch / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], timeout: float, grace: float) -> list[int]:
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid]:
                        end = min(end, time.monotonic() + grace)
        time.sleep(0.01)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            codes[pid] = -signal.SIGKILL
    return [codes[pid] for pid in pids]
