"""The block-mask kernel, run eagerly: the same numbers as the written-out formula."""

import pytest
import torch

from meshformer.model import Transformer, attend_flex, attend_reference
from meshformer.model.attention import Mask


@pytest.mark.parametrize("settings", [{}, {"window": 9}, {"n_kv_heads": 2}, {"causal": False, "window": 5}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_flex_gives_the_reference_output(settings, packed):
    tokens = torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(64).expand(2, -1) // torch.tensor([[20], [33]]) if packed else None
    outputs = []
    for attend in (attend_flex, attend_reference):
        model = Transformer(50, 2, 4, 64, 64, attention=attend, zero_init=False, **settings)
        with torch.no_grad():
            outputs.append(model(tokens, documents_BT=documents))
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-5, rtol=1e-4)


def test_the_block_mask_is_made_once_for_all_layers(monkeypatch):
    import torch.nn.attention.flex_attention as flex

    calls, make = [], flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, **kwargs: calls.append(1) or make(*args, **kwargs))
    with torch.no_grad():
        Transformer(50, 3, 4, 64, 64, attention=attend_flex, window=9)(torch.zeros(1, 64, dtype=torch.long))
    assert len(calls) == 1


def test_blocks_and_visible_agree():
    positions = torch.arange(300)[None]
    documents = (torch.arange(300) // 130).expand(2, -1)
    mask = Mask(True, 40, positions, positions, True, documents, documents)
    blocks = mask.blocks
    q, k = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    for row in range(2):
        seen = blocks.mask_mod(torch.tensor(row), torch.tensor(0), q, k)
        assert torch.equal(seen, mask.visible()[row, 0])
