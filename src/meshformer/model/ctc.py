"""Connectionist temporal classification: the loss, decoding and alignment (Graves et al. 2006). The blank is the last class.

Shapes: B batch, T tokens of the encoder, V characters, K = V + 1 classes, S characters of a target.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby

import torch.nn.functional as F
from torch import Tensor

from .settings import IGNORED

NEVER = -math.inf


def ctc_loss(logits_BTK: Tensor, targets_BS: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss in nats, number of target characters), both scalars. −log p of each target over all alignments, computed in fp32.

    On a GPU torch copies the lengths to the host, so the host waits for the device in every micro-batch. Rows without a real token count 0.
    A target that needs more tokens than there are has an infinite loss; data/speech.py refuses it.
    """
    log_p_TBK = logits_BTK.float().log_softmax(-1).transpose(0, 1)
    lengths_B, known_BS = real_BT.sum(1), targets_BS != IGNORED
    losses_B = F.ctc_loss(
        log_p_TBK, targets_BS.where(known_BS, 0), lengths_B.clamp(min=1), known_BS.sum(1), blank=logits_BTK.shape[-1] - 1, reduction="none"
    )
    return losses_B.where(lengths_B > 0, 0.0).sum(), known_BS.sum()


def greedy(logits_TK: Tensor) -> list[int]:
    """The ids of the likeliest class at each token, with repeats joined and blanks left out."""
    blank = logits_TK.shape[-1] - 1
    return [k for k, _ in groupby(logits_TK.argmax(-1).tolist()) if k != blank]


def beam_search(logits_TK: Tensor, width: int = 8, pruned: float = 1e-4) -> list[int]:
    """The likeliest text, summed over its alignments, among `width` kept at each token (prefix search, Hannun et al. 2014).

    Classes less likely than `pruned` at a token are not tried there.
    """
    log_p_TK = logits_TK.float().log_softmax(-1)
    blank = log_p_TK.shape[-1] - 1
    # Text -> log p of its alignments that end in (a blank, its last character).
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, NEVER)}
    for row in log_p_TK.tolist():
        likely = [k for k in range(blank) if row[k] > math.log(pruned)]
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [NEVER, NEVER])
        for text, (in_blank, in_last) in beams.items():
            both, same = _log_add(in_blank, in_last), grown[text]
            same[0] = _log_add(same[0], both + row[blank])
            if text:
                same[1] = _log_add(same[1], in_last + row[text[-1]])
            for k in likely:
                longer = grown[(*text, k)]
                before = in_blank if text and k == text[-1] else both  # without a blank between them, equal characters are one
                longer[1] = _log_add(longer[1], before + row[k])
        best = sorted(grown.items(), key=lambda item: -_log_add(*item[1]))[:width]
        beams = {text: (ends[0], ends[1]) for text, ends in best}
    return list(next(iter(beams)))


def align(logits_TK: Tensor, target: list[int]) -> list[int]:
    """(T,): for each token the index of the target's character on the likeliest alignment, −1 for a blank. ValueError if the target does not fit.

    The Viterbi path through blank, character, blank, … (Graves et al. 2006, section 4.1, with max in place of the sum).
    """
    log_p_TK = logits_TK.float().log_softmax(-1)
    T, blank = len(log_p_TK), log_p_TK.shape[-1] - 1
    states = [blank] + [k for character in target for k in (character, blank)]
    score, path = [NEVER] * len(states), []
    for t, row in enumerate(log_p_TK.tolist()):
        if t == 0:
            score[:2] = [row[k] for k in states[:2]]
            path.append(list(range(len(states))))
            continue
        came, best = [], []
        for s, k in enumerate(states):
            skips = s >= 2 and k != blank and k != states[s - 2]
            previous = max(range(max(0, s - 1 - skips), s + 1), key=lambda i: score[i])
            came.append(previous)
            best.append(score[previous] + row[k])
        score, path = best, [*path, came]
    state = max(range(max(0, len(states) - 2), len(states)), key=lambda s: score[s])
    if score[state] == NEVER:
        raise ValueError(f"{len(target)} characters do not fit into {T} tokens")
    found = []
    for came in reversed(path):
        found.append(state // 2 if state % 2 else -1)
        state = came[state]
    return found[::-1]


def _log_add(a: float, b: float) -> float:
    large, small = max(a, b), min(a, b)
    return large if small == NEVER else large + math.log1p(math.exp(small - large))
