"""DDP is given what makes it cheap: gradients that are views of its buckets, and the promise of one graph where that holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from jobs import before_the_norm, run_tiny


def wrapped(folder: Path, *overrides: str) -> tuple[bool, bool, int, int]:
    """What DDP was told (views, one graph); in how many pieces of memory the gradients of its last step lie, and how many there are."""
    found: list[Any] = []

    def look(task: Any) -> None:
        ddp = task.trainer.strategy.model
        gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
        memory = {g.untyped_storage().data_ptr() for g in gradients}
        found[:] = [ddp.gradient_as_bucket_view, ddp.static_graph, len(memory), len(gradients)]

    before_the_norm(look)
    run_tiny(folder, "run", "strategy=ddp", "trainer.devices=2", "trainer.max_steps=3", "~callbacks.checkpoint", *overrides)
    return tuple(found)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("overrides", "one_graph"),
    [([], True), (["trainer.accumulate_grad_batches=2"], False), (["task._target_=jobs.Frozen", "allow=[jobs]"], False)],
    ids=["ours", "accumulated", "a task of the user's"],
)
def test_gradients_are_views_and_the_graph_is_one_where_it_is(tmp_path: Path, overrides: list[str], one_graph: bool) -> None:
    views, static, memory, gradients = run_ranks(2, wrapped, tmp_path, *overrides)[0]
    assert (views, static) == (True, one_graph)
    assert memory < gradients > 3, "each gradient has memory of its own"
