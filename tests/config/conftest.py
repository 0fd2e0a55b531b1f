"""One composed configuration for the tests of the checks: composing takes a third of a second, changing a dict nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from meshformer.command.compose import compose_config, make_hydra, plain

Change = Callable[..., dict[str, Any]]


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


@pytest.fixture(scope="session")
def composed() -> dict[str, Any]:
    return plain(compose_config(make_hydra(), "train", []))


@pytest.fixture
def change(composed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Change:
    """`change({"trainer.devices": 2})`: the default configuration, unresolved, with these values."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return lambda changes: _changed(composed, changes)
