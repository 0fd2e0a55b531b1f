"""The memory options do what they are for: less memory is kept, less is sent, less is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from harness import run_ranks
from jobs import run_tiny
from meshformer.model import Transformer, attend_fused, attend_reference
from meshformer.parallel.memory_options import apply_memory_options
from meshformer.parallel.stages import balanced, check_between, cut, run_part, shallow_copy, stage_costs
from meshformer.parallel.table import local_sizes


def kept_bytes(checkpointing: str) -> int:
    """What the forward pass keeps for the backward pass, parameters not counted."""
    model = Transformer(32, 3, 4, 64, 64, attention=attend_fused)
    apply_memory_options(model.blocks, checkpointing, compile=False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.zeros(4, 64, dtype=torch.int64))
    return sum(kept.values())


def test_checkpointing_keeps_less() -> None:
    none, full = kept_bytes("none"), kept_bytes("full")
    assert full < 0.3 * none, (full, none)


def test_selective_checkpointing_computes_no_product_again() -> None:
    def flops(checkpointing: str) -> int:
        model = Transformer(32, 2, 4, 64, 64, attention=attend_reference)
        apply_memory_options(model.blocks, checkpointing, compile=False)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 64, dtype=torch.int64)).sum().backward()
        return counter.get_total_flops()

    assert flops("selective") == flops("none") < flops("full")


def test_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **named: given.append(named["options"]) or forward)
    apply_memory_options(Transformer(32, 2, 4, 64, 64).blocks, "none", compile=True, compile_options={"max_autotune": True})
    assert given == [{"max_autotune": True}] * 2


def test_a_view_has_submodules_of_its_own_and_shares_the_rest() -> None:
    whole = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    whole.scale, whole.sizes = torch.nn.Parameter(torch.ones(1)), [1]
    view = shallow_copy(whole)
    setattr(view, "1", torch.nn.Identity())
    view.register_forward_hook(lambda *_: None)
    assert isinstance(whole[1], torch.nn.ReLU) and isinstance(view[1], torch.nn.Identity)
    assert view[0] is whole[0] and view.scale is whole.scale and view.sizes is whole.sizes
    assert view._forward_hooks and not whole._forward_hooks


def collectives(folder: Path, *overrides: str) -> dict[str, int]:
    """How often this rank reduced gradients over the data axes in two steps of two micro-batches, and what it holds."""
    counted = {"reduce_scatter": 0}
    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]

    def count(name: str) -> None:
        whole = getattr(dist, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted["reduce_scatter"] += 1
            return whole(*args, **kwargs)

        setattr(dist, name, counting)

    for name in names[:1]:
        count(name)
    run_tiny(
        folder,
        "run",
        "strategy=fsdp",
        "trainer.devices=2",
        "trainer.accumulate_grad_batches=2",
        "trainer.max_steps=2",
        "~callbacks.checkpoint",
        *overrides,
    )
    return counted


def test_accumulation_reduces_gradients_once_or_every_time(tmp_path: Path) -> None:
    (last, _), (every, _) = (run_ranks(2, collectives, tmp_path, f"strategy.reduce_gradients={mode}") for mode in ("last", "every"))
    assert 0 < 2 * last["reduce_scatter"] == every["reduce_scatter"], (last, every)


def held(folder: Path, *overrides: str) -> tuple[int, bool]:
    """Parameters on this rank; whether the model was still on the meta device when the strategy began to cut it."""
    from meshformer.parallel import strategy
    from meshformer.tasks import LanguageModelling

    found: list[Any] = []
    build, started = strategy.MeshStrategy._build, LanguageModelling.on_train_start

    def watch(self: Any, task: Any) -> None:
        found.append(all(p.is_meta for p in task.model.parameters()))
        build(self, task)

    def on_train_start(self: Any) -> None:
        started(self)
        found.append(local_sizes(self, None)["parameters"])

    strategy.MeshStrategy._build, LanguageModelling.on_train_start = watch, on_train_start
    run_tiny(folder, "run", *overrides, "trainer.max_steps=1", "~callbacks.checkpoint")
    on_meta, number = found
    return number, on_meta


@pytest.mark.parametrize("layout", ["fsdp", "tensor", "pipeline"])
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path, layout: str) -> None:
    ranks = run_ranks(2, held, tmp_path, f"strategy={layout}", "trainer.devices=2", "model.n_layers=4", "model.tie_embeddings=false")
    whole = sum(p.numel() for p in Transformer(12, 4, 4, 32, 16, tie_embeddings=False).parameters())
    assert all(on_meta for _, on_meta in ranks)
    assert all(number < 0.6 * whole for number, _ in ranks), (ranks, whole)


def test_stages_are_balanced_by_what_they_cost() -> None:
    assert balanced([1.0] * 6, 2.3, 2) == [4, 2], "the head weighs as much as two blocks"
    assert balanced([1.0] * 6, 0.0, 2) == [3, 3]
    assert balanced([1.0] * 6, 100.0, 3) in ([3, 2, 1], [4, 1, 1], [2, 3, 1])
    assert sum(balanced([1.0] * 7, 0.1, 4)) == 7
    with pytest.raises(ValueError, match="3 pipeline stages"):
        balanced([1.0] * 2, 0.0, 3)
    costs, head = stage_costs(Transformer(32, 2, 4, 64, 64), 64)
    with FlopCounterMode(display=False) as counter:
        Transformer(32, 2, 4, 64, 64, attention=attend_reference)(torch.zeros(1, 64, dtype=torch.int64))
    assert counter.get_total_flops() == 64 * (sum(costs) + head)


@pytest.mark.parametrize("keep", [[0], [1], [2], [0, 2], [1, 3]])
def test_cut_parts_keep_their_names_and_compute_what_the_whole_does(keep: list[int]) -> None:
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    whole = Transformer(32, 6, 4, 32, 16, tie_embeddings=False)
    counts, names = [2, 1, 2, 1], dict(whole.named_parameters())
    inputs = [tokens]
    for stage in range(4):
        part = Transformer(32, 6, 4, 32, 16, tie_embeddings=False)
        (view,) = cut(part, counts, [stage])
        inputs.append(run_part(view, {"tokens_BT": tokens}, inputs[-1]))
    assert torch.equal(inputs[-1], whole(tokens))
    model = Transformer(32, 6, 4, 32, 16, tie_embeddings=False)
    views = cut(model, counts, keep)
    assert {n for n, _ in model.named_parameters()} <= names.keys()
    assert {n for view in views for n, _ in view.named_parameters()} == {n for n, _ in model.named_parameters()}
    for stage, view in zip(keep, views, strict=True):
        assert torch.equal(run_part(view, {"tokens_BT": tokens}, inputs[stage]), inputs[stage + 1])


def test_trying_a_cut_draws_no_random_numbers() -> None:
    """Or dropout would differ between a run and its resumption, whose first batch is another."""
    model = Transformer(32, 4, 4, 32, 16)
    (view,) = cut(model, [2, 2], [1])
    before = torch.get_rng_state()
    check_between(view, {"tokens_BT": torch.zeros(2, 16, dtype=torch.int64)})
    assert torch.equal(torch.get_rng_state(), before)
