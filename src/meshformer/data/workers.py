"""Worker processes for byte-level BPE encoding. Looking words up in Python holds the GIL, so threads would use one core. Imports no torch.

They are subprocesses rather than forks, since the parent may be a rank with threads and locks. They exit when the parent closes the pipe.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numpy as np

from meshformer.data.tokenizer import BpeTokenizer, Tokens

MOST = 8  # worker processes: each takes up to 130 MiB, and data preparation as a whole must stay below 1.5 GiB
_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from meshformer.data.workers import serve; serve()"


class Workers:
    """A pool of ``count`` processes that encode with ``tokenizer``; ``memory`` is their initial cache of words. ``encode`` is thread-safe."""

    def __init__(self, tokenizer: BpeTokenizer, memory: dict[str, bytes], count: int) -> None:
        self._tokenizer = tokenizer
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)]
        for _ in range(count):
            process = None
            with suppress(OSError):  # out of memory or processes: `encode` then runs in this process
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
                )
                self._all.append(process)
                _send(process.stdin, (json.dumps(json.loads(tokenizer.to_json())["model"]), memory))
            self._idle.put(process)

    def encode(self, pieces: list[str]) -> Tokens:
        worker = self._idle.get()
        try:
            if worker is not None:
                _send(worker.stdin, pieces)
                return np.frombuffer(*pickle.load(worker.stdout))  # pyright: ignore[reportArgumentType]
        except (OSError, EOFError, pickle.UnpicklingError):  # the worker was killed, for example by the out-of-memory killer
            worker = None
        finally:
            self._idle.put(worker)
        return self._tokenizer.encode_batch(pieces, {})

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
            process.communicate()


def serve() -> None:
    """The main loop of a worker process: reads batches of pieces and writes their ids until the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to the whole process group; the parent stops its workers itself
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):
        model, memory = pickle.load(sys.stdin.buffer)
        tokenizer = BpeTokenizer(model)
        while True:
            ids = tokenizer.encode_batch(pickle.load(sys.stdin.buffer), memory)
            _send(sys.stdout.buffer, (ids.tobytes(), ids.dtype.str))


def _send(stream: Any, content: Any) -> None:
    pickle.dump(content, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()
