"""Allocation of this machine's cores and GPUs to the jobs of a sweep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """Resources that a job needs: `threads` cores per process, and one GPU per process if it trains on GPUs."""

    processes: int
    threads: int
    gpu: bool


@dataclass(frozen=True)
class Share:
    cores: int
    gpus: tuple[str, ...]


class Machine:
    """Free cores, by number (the operating system places threads), and free GPUs, by name. A job larger than the machine gets all of it."""

    def __init__(self, cores: int, gpus: list[str]):
        self.cores, self.gpus = cores, gpus
        self.free_cores, self.free_gpus = cores, list(gpus)

    def take(self, need: Need) -> Share | None:
        """Allocate the job's share; None if too little is free."""
        # A process that trains on a GPU mostly waits for it, so its threads are not counted.
        cores = 0 if need.gpu else min(need.processes * need.threads, self.cores)
        gpus = min(need.processes, len(self.gpus)) if need.gpu else 0
        if cores > self.free_cores or gpus > len(self.free_gpus):
            return None
        self.free_cores -= cores
        share = Share(cores, tuple(self.free_gpus[:gpus]))
        del self.free_gpus[:gpus]
        return share

    def release(self, share: Share) -> None:
        self.free_cores += share.cores
        self.free_gpus = sorted([*self.free_gpus, *share.gpus], key=self.gpus.index)

    def threads(self, processes: int, gpu: bool, jobs: int) -> int:
        """Threads per process for trainer.threads=auto and `jobs` jobs. It ignores what is free now, so that a resumed sweep gets the same number."""
        at_once = max(1, min(jobs, (len(self.gpus) if gpu else self.cores) // processes))
        return max(1, self.cores // (at_once * processes))
