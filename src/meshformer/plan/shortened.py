"""Counts the memory of a deep model on two shorter ones: blocks are alike, so the bytes of each phase of a step are linear in their number.

A phase is the forward or backward pass of the first, second, last or last but one block of a stage, of a module beside the blocks, the loss, or
the optimizer. Between them a run's memory grows from block to block, so the peak is in one of these.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from meshformer.config.degrees import Degrees
from meshformer.job.build import build_task
from meshformer.parallel.stages import balanced, stage_costs
from meshformer.plan.counted import LiveMemory
from meshformer.plan.live_bytes import KINDS
from meshformer.plan.live_memory import STEPS, countable, live_memory, optimizer_memory

Config = dict[str, Any]
DEPTHS = 3, 4  # blocks of the smallest stage of a shorter model
WORTH = 7  # blocks of the smallest stage from which on two short models are less work than the model itself
EDGE = 2  # blocks at either end of a stage whose phases are compared
IN_BLOCK = re.compile(r"(forward|backward) of (.*)\.(\d+)")
Phase = tuple[Any, ...]


def count(config: Config, rank: int = 0) -> LiveMemory:
    """What `live_memory` counts, from shorter models where the model is deep enough."""
    began = time.perf_counter()
    config = countable(config)
    stages = stages_of(config)
    held = held_stages(config, rank)
    smallest = min(stages[k] for k in held)
    if smallest < WORTH or any(isinstance(value, list) and len(value) == sum(stages) for value in config["model"].values()):
        return live_memory(config, rank)
    fewer = [smallest - depth for depth in DEPTHS]
    short = [live_memory(shorter(config, stages, held, less), rank, steps=1) for less in fewer]
    found = extrapolated(short, [[stages[k] - less for k in held] for less in fewer], fewer)
    # Muon gives each rank some whole matrices, so what its step takes is not linear in their number.
    highest = {**found, ("optimizer",): optimizer_memory(config, rank)} if "muon" in config["optimizer"]["_target_"].lower() else found
    at = max(highest, key=lambda phase: sum(highest[phase].values()))
    few, more = short

    def line(name: str) -> int:
        return round(_line(getattr(few, name), getattr(more, name), fewer))

    peak = sum(highest[at].values())
    reserved = max(line("reserved"), peak)
    return replace(
        more, peak=peak, where=_name(at, stages, held), kinds=highest[at], start=line("start"), end=line("end"), reserved=reserved,
        seconds=time.perf_counter() - began, highest={},
    )  # fmt: skip


def stages_of(config: Config) -> list[int]:
    """The number of blocks of every stage."""
    strategy, layers = config["strategy"], config["model"]["n_layers"]
    if Degrees.from_config(strategy).pipeline == 1:
        return [layers]
    if strategy["blocks_per_stage"]:
        return list(strategy["blocks_per_stage"])
    task: Any = build_task(config, STEPS)
    with torch.device("meta"):
        task.configure_model()
    return balanced(*stage_costs(task.model, config["data"]["context_length"]), strategy["pipeline"] * strategy["stages_per_rank"])


def held_stages(config: Config, rank: int) -> list[int]:
    """The numbers of a rank's stages; the pipeline is the outermost axis."""
    degrees = Degrees.from_config(config["strategy"])
    if degrees.pipeline == 1:
        return [0]
    own = rank // (degrees.processes // degrees.pipeline)
    return [own + k * degrees.pipeline for k in range(config["strategy"]["stages_per_rank"])]


def shorter(config: Config, stages: Sequence[int], held: Sequence[int], fewer: int) -> Config:
    """The configuration with that many blocks fewer in each of the held stages, and one in each other stage."""
    config = deepcopy(config)
    counts = [blocks - fewer if k in held else 1 for k, blocks in enumerate(stages)]
    config["model"]["n_layers"] = sum(counts)
    if len(stages) > 1:
        config["strategy"]["blocks_per_stage"] = counts
    return config


def extrapolated(short: Sequence[LiveMemory], blocks: Sequence[Sequence[int]], fewer: Sequence[int]) -> dict[Phase, dict[str, int]]:
    """The bytes by kind of each phase of the whole model. `blocks[i]`: of the held stages of `short[i]`, each `fewer[i]` less than the whole has."""
    few, more = (_phases(memory.highest, counts) for memory, counts in zip(short, blocks, strict=True))
    return {
        phase: {kind: max(0, round(_line(few[phase][kind], more[phase][kind], fewer))) for kind in KINDS} for phase in few.keys() & more.keys()
    }


def _line(few: float, more: float, fewer: Sequence[int]) -> float:
    return more + (more - few) * fewer[1] / (fewer[0] - fewer[1])


def _phases(highest: dict[str, dict[str, int]], blocks: Sequence[int]) -> dict[Phase, dict[str, int]]:
    """The phases of a count with the block's place in its stage, from the start and from the end, in place of its number."""
    numbers = sorted({int(found[3]) for name in highest if (found := IN_BLOCK.fullmatch(name))})
    stages = [(k, i, size) for k, size in enumerate(blocks) for i in range(size)]
    place = dict(zip(numbers, stages, strict=True))
    phases: dict[Phase, dict[str, int]] = {}
    for name, kinds in highest.items():
        found = IN_BLOCK.fullmatch(name)
        if found is None:
            phases[name,] = kinds
            continue
        stage, i, size = place[int(found[3])]
        if i < EDGE:
            phases[found[1], found[2], stage, i] = kinds
        if size - i <= EDGE:
            phases[found[1], found[2], stage, i - size] = kinds
    return phases


def _name(phase: Phase, stages: Sequence[int], held: Sequence[int]) -> str:
    if len(phase) == 1:
        return phase[0]
    passing, blocks, stage, place = phase
    first = sum(stages[: held[stage]])
    return f"{passing} of {blocks}.{first + (place if place >= 0 else stages[held[stage]] + place)}"
