"""Ranks that do something together of which any part may fail (a full disk, say): then it has failed for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")


def _each(results: list[Any]) -> list[Any]:
    return results


class StepFailed(RuntimeError):
    """A step failed on some rank, and so for all. Says which and why."""


class Ranks:
    """The ranks of `group`, or this process alone for None. `failure` begins the message of what `step` raises."""

    def __init__(self, group: dist.ProcessGroup | None, failure: str):
        self.group, self.failure = group, failure
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def step(self, work: Callable[[], T], join: Callable[[list[T]], list[R]] = _each) -> R:
        """`work()` on every rank, then `join` of all results on the first, which returns one answer for each rank.

        An exception in any of it raises StepFailed on all ranks, and on none before all have come here: nobody waits in vain. (In one process
        what the disk refuses, an OSError, becomes StepFailed; any other exception is raised itself.)
        """
        if self.group is None:
            try:
                return join([work()])[0]
            except OSError as error:
                raise StepFailed(f"{self.failure}: {type(error).__name__}: {error}") from error
        mine, error = _attempt(work)
        note = None if error is None else f"{type(error).__name__}: {error}"
        results: list[Any] = [None] * self.size
        dist.gather_object((mine, note), results if self.is_first else None, group=self.group, group_dst=0)
        answers: list[Any] | None = None
        if self.is_first:
            failed = [f"rank {rank}: {told}" for rank, (_, told) in enumerate(results) if told is not None]
            joined: Any = None
            if not failed:
                joined, error = _attempt(lambda: join([value for value, _ in results]))
                failed = [] if error is None else [f"rank 0: {type(error).__name__}: {error}"]
            answers = [(None, "; ".join(failed))] * self.size if failed else [(answer, None) for answer in joined]
        got: list[Any] = [None]
        dist.scatter_object_list(got, answers, group=self.group, group_src=0)
        answer, told = got[0]
        if told is not None:
            raise StepFailed(f"{self.failure}: {told}") from error
        return answer


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error
