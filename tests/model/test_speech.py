"""The speech encoder: padding is never seen, and Whisper's encoder is one of its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from meshformer.model import SpeechTransformer

SMALL: dict[str, Any] = {"mels": 8, "n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": 64, "vocab_size": 5}


def documents(lengths: list[int], T: int) -> Tensor:
    return torch.where(torch.arange(T) < torch.tensor(lengths)[:, None], 0, -1)


@pytest.mark.parametrize("subsampling", [2, 4])
def test_a_recording_gives_the_same_whatever_it_is_batched_with(subsampling: int) -> None:
    model = SpeechTransformer(**SMALL, subsampling=subsampling).eval()
    torch.nn.init.normal_(model.embedding.conv1.bias)  # zero at the start, and then it would hide what a convolution sees of padding
    torch.nn.init.normal_(model.embedding.conv2.bias)
    short, long = 5, 12
    features = torch.randn(2, long * subsampling, 8)
    alone = model(features[:1, : short * subsampling])
    together = model(features, documents_BT=documents([short, long], long))  # the padding holds numbers, and is not read
    torch.testing.assert_close(together[:1, :short], alone, atol=2e-6, rtol=1e-5)
    unmasked = model(features, documents_BT=documents([long, long], long))
    assert (unmasked[:1, :short] - alone).abs().max() > 1e-2


def test_shapes_and_refusals() -> None:
    model = SpeechTransformer(**SMALL, subsampling=4)
    assert model(torch.randn(2, 24, 8)).shape == (2, 6, 6)  # 5 characters and the blank
    with pytest.raises(ValueError, match="26 frames of 8 bands, and the model reads multiples of 4 of 8"):
        model(torch.randn(2, 26, 8))
    with pytest.raises(ValueError, match="subsampling must be 2 or 4, not 3"):
        SpeechTransformer(**SMALL, subsampling=3)
    with pytest.raises(ValueError, match="a head needs vocab_size"):
        SpeechTransformer(**{**SMALL, "vocab_size": None}, subsampling=4)


def test_the_first_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (SpeechTransformer(**SMALL, subsampling=4, seed=seed).embedding.conv2.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert float(first.detach().std()) == pytest.approx((16 * 5) ** -0.5, rel=0.1)
