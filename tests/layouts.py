"""The layouts of conf/strategy/, as their files say them, and which of a test's cases are slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import pytest
import yaml

from meshformer.config.degrees import AXES
from meshformer.config.paths import conf_dir

Layout = tuple[int, list[str]]  # processes, overrides


def degrees() -> dict[str, dict[str, int]]:
    """Layout -> the axes that it cuts, and into how many parts on a CPU: 2 where the file says -1."""
    nodes = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((conf_dir() / "strategy").glob("*.yaml"))}
    return {name: {axis: abs(node[axis]) + (node[axis] == -1) for axis in AXES if node.get(axis, 1) != 1} for name, node in nodes.items()}


def layouts(**more: list[str]) -> dict[str, Layout]:
    """Every layout that cuts something; `more`: further overrides of some."""
    return {name: (prod(cut.values()), [f"strategy={name}", *more.get(name, [])]) for name, cut in degrees().items() if cut}


def params(cases: Iterable[Any], repeated: Iterable[Any]) -> list[Any]:
    """Parameters of a test, of which those in `repeated` run with `-m slow` only: what they show, others show too."""
    return [pytest.param(case, marks=[pytest.mark.slow] * (case in repeated)) for case in cases]
