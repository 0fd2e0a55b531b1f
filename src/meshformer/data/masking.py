"""Masking of tokens for masked language modelling (Devlin et al. 2019). Shapes: B batch, T time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meshformer.config.errors import ConfigError
from meshformer.data.tokenizer import Tokenizer
from meshformer.data.windows import IGNORED, Batch, Order, Starts


class Masking:
    """Draws 15 % of the real tokens as targets and ignores all others. Of these, 80 % are replaced by the mask token and 10 % by a random token;
    10 % stay as they are.

    The draw for a sample depends on (seed, number of the sample) alone, not on the process, the other samples of the batch or the padding.
    """

    def __init__(self, vocab_size: int, mask_id: int, seed: int, longest: int, share: float = 0.15, never: tuple[int, ...] = ()) -> None:
        self.vocab_size, self.mask_id, self.seed, self.longest, self.share, self.never = vocab_size, mask_id, seed, longest, share, never

    def __call__(self, tokens_BT: Tensor, real_BT: Tensor, numbers_B: Any) -> Batch:
        """``tokens`` with some of them replaced, and ``targets``, (B, T) each."""
        T = tokens_BT.shape[1]
        # `longest` numbers are drawn for every sample, so that the draw does not depend on the width of the batch.
        drawn_B3T = np.stack([np.random.default_rng([self.seed, int(number)]).random((3, self.longest))[:, :T] for number in numbers_B])
        chosen, how, other = (torch.from_numpy(x) for x in drawn_B3T.transpose(1, 0, 2))
        hidden_BT = (chosen < self.share) & real_BT
        for token in self.never:
            hidden_BT &= tokens_BT != token
        changed = torch.where(how < 0.8, torch.full_like(tokens_BT, self.mask_id), tokens_BT)
        changed = torch.where(how >= 0.9, (other * self.vocab_size).long(), changed)
        return {"tokens": torch.where(hidden_BT, changed, tokens_BT), "targets": tokens_BT.masked_fill(~hidden_BT, IGNORED)}


def masking_of(tokenizer: Tokenizer, seed: int, longest: int) -> Masking:
    """``Masking`` with the tokenizer's mask token; special tokens are never masked. ConfigError where the tokenizer has no mask token."""
    if tokenizer.mask_id is None:
        raise ConfigError(
            "task=masked_language_modelling needs a mask token, and the tokenizer of the run to start from has none",
            "stage.init_from",
            fix="Start from a run of task=masked_language_modelling, or pretrain one.",
        )
    return Masking(tokenizer.vocab_size, tokenizer.mask_id, seed, longest, never=getattr(tokenizer, "special_ids", ()))


class Numbered:
    """Wraps an order; its rows are (the key that the order gives, the number of the sample over all epochs)."""

    def __init__(self, order: Order) -> None:
        self.inner, self.n_samples, self.told = order, order.n_samples, order.told

    def starts(self, epoch: int) -> Starts:
        starts = self.inner.starts(epoch)
        return np.stack((starts, epoch * self.n_samples + np.arange(len(starts))), axis=1)


class MaskedWindows:
    """Training windows of a text with masked tokens. The keys are those of a ``Numbered`` order."""

    def __init__(self, windows: Any, masking: Masking) -> None:
        self.windows, self.masking = windows, masking

    def __getitems__(self, keys: Starts) -> Batch:
        tokens_BT = self.windows.__getitems__(keys[:, 0])["tokens"]
        return self.masking(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), keys[:, 1])


class MaskedEvaluation:
    """Validation windows with masked tokens, the same ones in every validation and every layout."""

    def __init__(self, batches: Any, masking: Masking) -> None:
        self.batches, self.masking = batches, masking

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        batch, windows = self.batches[index], self.batches
        first = (index * windows.data_world + windows.data_rank) * windows.batch_size
        return self.masking(batch["tokens"], batch["targets"] != IGNORED, range(first, first + windows.batch_size))
