"""The block-mask kernel: eagerly on a CPU and inside compiled blocks, the same numbers as the written-out formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from meshformer.model import (
    Alibi,
    Learned,
    NoPosition,
    PositionalAttention,
    Rotary,
    Sinusoidal,
    Transformer,
    attend_auto,
    attend_flex,
    attend_fused,
    attend_reference,
    attention,
)
from meshformer.model.attention import Mask, needs_block_mask

T = 160  # more than one block of 128
POSITIONS = [Rotary, Sinusoidal, Learned, Alibi, PositionalAttention, NoPosition]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "window": {"window": 20}, "documents": {}, "grouped queries": {"n_kv_heads": 2}, "encoder": {"causal": False},
}  # fmt: skip


def network(attend: Any, **settings: Any) -> Transformer:
    return Transformer(50, 2, 4, 64, T, attention=attend, zero_init=False, **settings)


def packed(step: int = 0) -> dict[str, Tensor]:
    """Documents of uneven lengths, each counted from 0: other ones at each step."""
    index, length = torch.arange(T).expand(2, -1), torch.tensor([[70 + step], [33 + 7 * step]])
    return {"documents_BT": index // length, "positions_BT": index % length}


def gradients(model: Transformer, step: int = 0, **inputs: Tensor) -> list[Tensor]:
    """Logits and every gradient."""
    tokens = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    logits = model(tokens, **inputs)
    logits.logsumexp(-1).mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], reference: list[Tensor]) -> None:
    assert len(ours) == len(reference)
    for x, y in zip(ours, reference, strict=True):
        assert (x - y).norm() <= 5e-6 * y.norm()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each block mask that is made."""
    calls, make = [], flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, **kwargs: calls.append("mask") or make(*args, **kwargs))
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", POSITIONS, ids=lambda position: position.__name__)
def test_flex_gives_the_reference_output_and_gradients(position: Any, kind: str, calls: list[str]) -> None:
    inputs = packed() if kind == "documents" else {}
    ours = gradients(network(attend_flex, position=position, **KINDS[kind]), **inputs)
    assert len(calls) == (kind != "encoder" or position is Alibi), "made once for all layers, where there is something to hide or to add"
    assert_same(ours, gradients(network(attend_reference, position=position, **KINDS[kind]), **inputs))


@pytest.mark.parametrize("attend", [attend_fused, attend_reference])
def test_every_kernel_knows_the_slopes_of_a_mask(attend: Any) -> None:
    q, k, v = torch.randn(3, 2, 4, T, 16, generator=torch.Generator().manual_seed(0))
    positions, alibi = torch.arange(T)[None], Alibi(64, 4, 16, T)
    mask = Mask(True, 30, positions, positions)
    expected = attend_reference(q, k, v, mask, alibi.bias(positions, positions))
    with_slopes = mask.with_blocks(alibi.slopes(q.device))
    torch.testing.assert_close(attend(q, k, v, with_slopes), expected)
    torch.testing.assert_close(attend_flex(q, k, v, with_slopes), expected)


class Steeper(Alibi):
    """A user's: it inherits slopes and writes a bias of its own."""

    def bias(self, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor | None:
        bias = super().bias(q_positions_BT, k_positions_BS)
        return None if bias is None else 3 * bias


def test_a_bias_of_the_users_own_is_the_one_that_is_added() -> None:
    ours, reference = (gradients(network(attend, position=Steeper, window=20)) for attend in (attend_flex, attend_reference))
    assert_same(ours, reference)
    assert not torch.allclose(ours[0], gradients(network(attend_flex, position=Alibi, window=20))[0])


def test_blocks_and_visible_agree() -> None:
    positions = torch.arange(300)[None]
    documents = (torch.arange(300) // 130).expand(2, -1)
    for natural in (True, False):
        mask = Mask(True, 40, positions, positions, natural, documents, documents)
        blocks, visible = mask.with_blocks().blocks, mask.visible()
        assert visible is not None
        q, k = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
        for row in range(2):
            seen = blocks.mask_mod(torch.tensor(row), torch.tensor(0), q, k)
            assert torch.equal(seen, visible[row, 0])


# --- inside compiled blocks


class Graphs:
    """A cheap backend that counts what it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.seen.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def with_flex(self) -> int:
        return sum(any(node.target is torch.ops.higher_order.flex_attention for node in graph.graph.nodes) for graph in self.seen)


def compiled(model: Transformer, backend: Any) -> Transformer:
    torch._dynamo.reset()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    return model


@pytest.mark.parametrize("attend", [attend_flex, attend_auto, partial(attend_auto)], ids=["flex", "auto", "auto from a configuration"])
@pytest.mark.parametrize("position", [Rotary, Alibi], ids=lambda position: position.__name__)
def test_a_compiled_block_is_given_each_batchs_block_mask_and_compiled_once(
    attend: Any, position: Any, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_lacks_gradient", lambda q: False)  # true of inductor, not of this backend
    monkeypatch.setattr(attention, "_flex_is_faster", lambda *args: True)  # as on a GPU
    graphs = Graphs()
    model, reference = (
        compiled(network(attend, position=position, window=50), graphs),
        network(attend_reference, position=position, window=50),
    )
    for step in range(3):
        assert_same(gradients(model, step, **packed(step)), gradients(reference, step, **packed(step)))
        model.eval()
        with torch.no_grad():
            model(torch.zeros(2, T, dtype=torch.long), **packed(step + 5))
        model.train()
    assert len(calls) == 6, "one for each batch"
    assert len(graphs.seen) == graphs.with_flex() == 2, "one graph with gradients and one without, for all layers and batches"


def test_the_public_kernel_is_called_as_a_gpu_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_needs_kernel", lambda q: True)
    graphs = Graphs()
    tokens = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(0))
    outputs = []
    with torch.no_grad():  # the public function has no gradient on a CPU
        for model in (
            compiled(network(attend_flex, position=Alibi, n_kv_heads=2), graphs),
            network(attend_reference, position=Alibi, n_kv_heads=2),
        ):
            outputs.append(model(tokens, **packed()))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)
    assert graphs.with_flex() == 1


def test_compiled_on_a_cpu_flex_leaves_training_to_the_fused_kernel() -> None:
    graphs = Graphs()
    ours = gradients(compiled(network(attend_flex, window=20), graphs))
    assert_same(ours, gradients(network(attend_reference, window=20)))
    assert graphs.seen and not graphs.with_flex()


# --- what `auto` picks on a GPU


GPU_CASES = [
    ("packed or windowed", torch.bfloat16, 2048, {"window": 100}, None, True),
    ("slopes", torch.bfloat16, 2048, {}, Alibi(64, 4, 16, T).slopes(torch.device("cpu")), True),
    ("the triangle, which flash attention knows", torch.bfloat16, 2048, {}, None, False),
    ("an encoder that hides nothing", torch.bfloat16, 2048, {"causal": False}, None, False),
    ("short", torch.bfloat16, 512, {"window": 100}, None, False),
    ("fp32", torch.float32, 2048, {"window": 100}, None, False),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case[0])
def test_what_auto_picks_on_a_gpu(case: Any) -> None:
    _, dtype, length, settings, slopes, wanted = case
    positions = torch.arange(length)[None]
    mask = Mask(settings.get("causal", True), settings.get("window"), positions, positions)
    with FakeTensorMode():
        x = torch.empty(1, length, 64, device="cuda", dtype=dtype)
    assert needs_block_mask(attend_auto, mask, slopes, x, 16) is wanted
    assert not needs_block_mask(attend_auto, mask, slopes, torch.empty(1, length, 64, dtype=dtype), 16), "today's choice stays on a CPU"
    assert not needs_block_mask(attend_auto, mask, slopes, x, 8), "the kernel takes heads of 16 or more"
    assert not needs_block_mask(attend_fused, mask, slopes, x, 16)
