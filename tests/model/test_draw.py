"""First values drawn in tiles: any part of a parameter is the same as that part of the whole."""

from __future__ import annotations

import hashlib
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from meshformer.command.compose import compose
from meshformer.model import Transformer, draw
from meshformer.model.draw import fill_part, normal


def in_one_go(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def test_what_is_small_is_drawn_in_one_go() -> None:
    """So models of that size keep the first values, and the figures, that they had before there were tiles."""
    assert torch.equal(normal((300, 70), 0.02, "1/a"), in_one_go((300, 70), 0.02, "1/a"))
    assert not torch.equal(normal((300, 70), 0.02, "2/a"), in_one_go((300, 70), 0.02, "1/a"))


@pytest.mark.parametrize("size", ["nano", "micro"])
def test_every_matrix_of_the_small_sizes_is_small(size: str) -> None:
    model = compose([f"model={size}"])["model"]
    widths = {"n_layers": 1, "n_heads": model["n_heads"], "d_model": model["d_model"]}
    assert all(p.numel() <= draw.WHOLE for p in Transformer(1024, **widths, context_length=64).parameters())


def test_a_part_is_what_the_whole_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "WHOLE", 60)
    monkeypatch.setattr(draw, "TILE", 9)
    choose = random.Random(0)
    for _ in range(300):
        shape = tuple(choose.choice([1, 2, 7, 30, 61]) for _ in range(choose.choice([2, 3])))
        model = Transformer(5, 1, 1, 4, 4)
        value = partial(model.initial_value, choose.choice(["embedding.a", "blocks.0.mlp.down.weight"]), torch.Size(shape), 3)
        part = [slice(*sorted(choose.choices(range(size + 1), k=2))) for size in shape]
        out = torch.full(shape, torch.nan)[tuple(part)]
        fill_part(out, part, shape, value)
        assert torch.equal(out, value()[tuple(part)]), (shape, part)


def test_tiles_are_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "WHOLE", 60)
    monkeypatch.setattr(draw, "TILE", 50)
    whole = normal((1000, 200), 0.5, "1/a")
    assert whole.unique(dim=0).shape == whole.shape == whole.unique(dim=1).shape
    tiles = whole.view(20, 50, 4, 50).transpose(1, 2).reshape(80, 2500)
    assert (torch.corrcoef(tiles) - torch.eye(80)).abs().max() < 0.1, "no tile is another"
    assert abs(whole.std().item() - 0.5) < 0.01 and abs(whole.mean().item()) < 0.01


def test_only_the_tiles_that_a_part_lies_in_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "WHOLE", 60)
    monkeypatch.setattr(draw, "TILE", 10)
    drawn: list[int] = []
    normal_ = Tensor.normal_
    monkeypatch.setattr(Tensor, "normal_", lambda x, *a, **k: drawn.append(x.numel()) or normal_(x, *a, **k))
    value = partial(Transformer(5, 1, 1, 4, 4).initial_value, "embedding.a", torch.Size((1000, 58)), 3)
    drawn.clear()
    fill_part(torch.empty(25, 18), [slice(115, 140), slice(40, 58)], (1000, 58), value)
    assert drawn == [100, 80, 100, 80, 100, 80]


def test_a_subclass_that_knows_nothing_of_parts_is_asked_for_the_whole() -> None:
    class Own(Transformer):
        def initial_value(self, name: str, shape: Any, seed: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().initial_value(name, shape, seed) + 1

    sizes = (5, 1, 1, 4, 4)
    for own, usual in zip(Own(*sizes).parameters(), Transformer(*sizes).parameters(), strict=True):
        assert torch.equal(own, usual + 1)
    out = torch.empty(1, 4)
    fill_part(out, [slice(2, 3), slice(0, 4)], (5, 4), partial(Own(*sizes).initial_value, "head.weight", torch.Size((5, 4)), 0))
    assert torch.equal(out, Own(*sizes).initial_value("head.weight", torch.Size((5, 4)), 0)[2:3])
