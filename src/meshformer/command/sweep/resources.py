"""Which cores and GPUs of this machine are handed out. Nothing is handed out twice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What a job takes: processes of `threads` cores each, and a GPU for each process where it trains on GPUs."""

    processes: int
    threads: int
    gpu: bool


@dataclass(frozen=True)
class Share:
    cores: int
    gpus: tuple[str, ...]


class Machine:
    """Cores are counted (the operating system places threads), GPUs are named. A job that needs more than there is gets all of it, alone."""

    def __init__(self, cores: int, gpus: list[str]):
        self.cores, self.gpus = cores, gpus
        self.free_cores, self.free_gpus = cores, list(gpus)

    def take(self, need: Need) -> Share | None:
        """The job's share, or None while it does not fit."""
        # Beside a GPU a process mostly waits for it: its threads are not counted.
        cores = 0 if need.gpu else min(need.processes * need.threads, self.cores)
        gpus = min(need.processes, len(self.gpus)) if need.gpu else 0
        if cores > self.free_cores or gpus > len(self.free_gpus):
            return None
        self.free_cores -= cores
        share = Share(cores, tuple(self.free_gpus[:gpus]))
        del self.free_gpus[:gpus]
        return share

    def give_back(self, share: Share) -> None:
        self.free_cores += share.cores
        self.free_gpus = sorted([*self.free_gpus, *share.gpus], key=self.gpus.index)

    def threads(self, processes: int, gpu: bool, jobs: int) -> int:
        """Of each process, where the user names no number and `jobs` such jobs want to run at once. The same whenever a sweep is resumed."""
        at_once = max(1, min(jobs, (len(self.gpus) if gpu else self.cores) // processes))
        return max(1, self.cores // (at_once * processes))
