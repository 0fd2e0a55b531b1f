"""CTC against its definition: sums and maxima over all alignments, written out for small cases."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby, product

import pytest
import torch
from torch import Tensor

from meshformer.model.ctc import align, beam_search, ctc_loss, greedy

T, K = 5, 3  # tokens; two characters and the blank


def probabilities(logits_TK: Tensor) -> dict[tuple[int, ...], float]:
    """text -> probability, the sum over all its alignments."""
    p_TK, found = logits_TK.softmax(-1), defaultdict(float)
    for path in product(range(K), repeat=T):
        text = tuple(k for k, _ in groupby(path) if k != K - 1)
        found[text] += float(torch.stack([p_TK[t, k] for t, k in enumerate(path)]).prod())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_loss_decoding_and_alignment_are_those_of_all_alignments(seed: int) -> None:
    logits = 2 * torch.randn(T, K, generator=torch.Generator().manual_seed(seed))
    known = probabilities(logits)
    assert sum(known.values()) == pytest.approx(1, abs=1e-5)
    for text in ((), (0,), (1, 1), (0, 1, 0)):
        targets = torch.tensor([[*text, *[-100] * (4 - len(text))]])
        loss, count = ctc_loss(logits[None], targets, torch.ones(1, T, dtype=torch.bool))
        assert float(loss) == pytest.approx(-torch.tensor(known[text]).log().item(), abs=1e-4) and int(count) == len(text)
    assert tuple(beam_search(logits, width=50, pruned=1e-9)) == max(known, key=lambda text: known[text])


def test_the_best_text_is_not_always_the_best_path() -> None:
    logits = torch.tensor([[0.4, 0.6], [0.4, 0.6]]).log()  # one character and the blank: "0" has three alignments, 0.64 in all
    assert greedy(logits) == [] and beam_search(logits) == [0]


def test_padding_and_empty_rows_count_nothing() -> None:
    logits, targets = torch.randn(3, 6, K), torch.tensor([[0, 1], [1, -100], [-100, -100]])
    real = torch.tensor([[True] * 4 + [False] * 2, [True] * 6, [False] * 6])
    whole, count = ctc_loss(logits, targets, real)
    apart = [ctc_loss(logits[i : i + 1, :n], targets[i : i + 1, :s], torch.ones(1, n, dtype=torch.bool))[0] for i, n, s in ((0, 4, 2), (1, 6, 1))]
    assert float(whole) == pytest.approx(float(sum(apart)), abs=1e-5) and int(count) == 3


def test_an_alignment_is_the_likeliest_path_of_its_text() -> None:
    logits = torch.randn(T, K, generator=torch.Generator().manual_seed(3))
    log_p, text = logits.log_softmax(-1), (1, 1, 0)

    def score(path: tuple[int, ...]) -> float:
        return float(sum(log_p[t, k] for t, k in enumerate(path)))

    paths = [p for p in product(range(K), repeat=T) if tuple(k for k, _ in groupby(p) if k != K - 1) == text]
    found = align(logits, list(text))
    assert tuple(text[i] if i >= 0 else K - 1 for i in found) == max(paths, key=score)
    assert [i for i, _ in groupby(found) if i >= 0] == [0, 1, 2]
    with pytest.raises(ValueError, match="3 characters do not fit into 2 tokens"):
        align(logits[:2], list(text))
