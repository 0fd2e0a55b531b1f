"""Counts the memory of several layouts, each in a process of its own, forked from one that has imported torch.

`python -m meshformer.plan.counting` reads {"jobs": [[configuration, rank], …], "whole": bool} as JSON from standard input and prints a list with
{"found": a LiveMemory}, {"refused": a ConfigError} or {"failed": a reason} for each job. `whole`: do not count deep models on shorter ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.importing import heavy_imports
from meshformer.plan.counted import LiveMemory
from meshformer.printing import say

with heavy_imports():
    import torch

    from meshformer.plan.live_memory import live_memory
    from meshformer.plan.shortened import count

Config = dict[str, Any]
Counter = Callable[[Config, int], LiveMemory]
Job = tuple[Config, int]


def run(jobs: Sequence[Job], at_once: int, counter: Counter, timeout: float) -> list[dict[str, Any]]:
    """The answer to each job, of which `at_once` run at a time and each for at most `timeout` seconds."""
    fork = multiprocessing.get_context("fork")
    answers: list[dict[str, Any]] = [{"failed": "it ended without an answer"} for _ in jobs]
    waiting, running = list(enumerate(jobs)), dict[Any, tuple[int, Any, float]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            i, job = waiting.pop(0)
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_answer, args=(sender, job, counter))
            process.start()
            sender.close()  # so that the end of the process is the end of the pipe
            running[receiver] = i, process, time.monotonic() + timeout
        ready: list[Any] = wait(list(running), timeout=1.0)
        for receiver in list(running):
            i, process, until = running[receiver]
            if receiver in ready:
                with suppress(EOFError):
                    answers[i] = receiver.recv()
            elif time.monotonic() > until:
                answers[i] = {"failed": f"it took more than {timeout:.0f} seconds"}
                process.kill()
            else:
                continue
            process.join()
            receiver.close()
            del running[receiver]
    return answers


def _answer(sender: Connection, job: Job, counter: Counter) -> None:
    sys.stdout = sys.stderr  # the parent prints the answers
    try:
        sender.send({"found": asdict(counter(*job))})
    except ConfigError as error:
        sender.send({"refused": {"message": error.message, "key": error.key, "value": str(error.value), "fix": error.fix}})
    except Exception as error:
        lines = str(error).strip().splitlines()
        sender.send({"failed": f"{type(error).__name__}: {lines[-1] if lines else ''}"})
    sys.stderr.flush()
    os._exit(0)  # without what the parent would do at its end


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m meshformer.plan.counting", description=__doc__)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # no other thread may run when a process is forked
    asked = json.load(sys.stdin)
    jobs = [(config, rank) for config, rank in asked["jobs"]]
    say(json.dumps(run(jobs, options.at_once, live_memory if asked["whole"] else count, options.timeout)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
