"""Recordings and their transcripts as a LightningDataModule. Shapes: B batch, F frames, M mel bands, T tokens of the encoder, S target characters.

One process reads and transforms the recordings; every rank reads log-mel features from memory-mapped files in the cache.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from meshformer.config.errors import ConfigError
from meshformer.data.audio import BadClip, Features, read_audio, resampled
from meshformer.data.base import FolderData
from meshformer.data.checked import built_once
from meshformer.data.prepared import SPLITS, tokenizer_settings
from meshformer.data.recordings import Clip, Recordings
from meshformer.data.sequences import EvalRows, in_batches_of_like_length, rounded
from meshformer.data.tokenizer import Tokenizer, Unknown, train_tokenizer
from meshformer.data.windows import IGNORED, Batch, Order, Starts
from meshformer.printing import say

_LAYOUT = 1  # version of the folder's format; part of the cache key
_NAMED, _SHOWN = 3, 60  # bad clips named in a message, and characters of a transcript
TELL_EVERY = 30  # seconds between the lines that say how many recordings are read
FRAMES_A_SECOND = 100
Ints = npt.NDArray[np.int64]


class SpeechData(FolderData):
    """Batches ``features`` (B, F, M) in fp32, 0 for padding, ``documents`` (B, F / frames_per_token), 0 for sound and -1 for padding, and
    ``targets`` (B, S), the ids of the transcript, IGNORED behind it.

    All batches of one optimizer step are as wide as its longest clip, and the clips of a step are of similar length.

    Args (the others are ``SampledData``'s and ``TextData``'s):
        features: the transform from sound to features.
        frames_per_token: how many frames the model's convolutions make one token of; clips end at a multiple of it.
        context_length: the largest T. A longer clip is refused.
        speeds: each training clip is played at one of these speeds, drawn anew each time (Ko et al. 2015).
        mask_mels, mask_frames: SpecAugment (Park et al. 2019): two bands of up to ``mask_mels`` mels, and one stretch of up to ``mask_frames``
            frames for each 1.5 s, are set to the mean.
        skip_bad: leave out recordings that cannot be used, and say how many, instead of refusing them.
        pad_to: T is a multiple of it.
    """

    def __init__(
        self,
        source: Recordings,
        features: Features,
        batch_size: int,
        context_length: int,
        frames_per_token: int,
        tokenizer: str,
        vocab_size: int,
        cache: str | Path,
        seed: int,
        speeds: Sequence[float] = (1.0,),
        mask_mels: int = 0,
        mask_frames: int = 0,
        skip_bad: bool = False,
        eval_batch_size: int | None = None,
        workers: int = 0,
        accumulation: int = 1,
        fixed_tokenizer: Tokenizer | None = None,
        unknown: Unknown = "error",
        pad_to: int = 8,
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size, workers, accumulation)
        self.source, self.features = source, features
        self.context_length, self.frames_per_token, self.skip_bad = context_length, frames_per_token, skip_bad
        self.speeds = [float(speed) for speed in speeds]
        self.masks = mask_mels, mask_frames
        self.pad_to = pad_to * frames_per_token  # in frames
        self._tokenizer_settings = tokenizer, vocab_size, fixed_tokenizer, unknown
        self._cache = cache
        self._parts: dict[str, _Part] = {}

    @property
    def longest(self) -> float:
        """Seconds that fit into the context length."""
        return self.context_length * self.frames_per_token / FRAMES_A_SECOND

    def prepared_folder(self) -> Path:
        kind, vocab_size, fixed, unknown = self._tokenizer_settings
        features = [self.features.sample_rate, self.features.mels, self.features.scaling]
        settings = {"speech": _LAYOUT, "source": self.source.identity(), "features": features, "speeds": self.speeds}
        settings |= {"frames_per_token": self.frames_per_token, "longest": self.longest, "skip_bad": self.skip_bad}
        settings |= tokenizer_settings(kind, vocab_size, fixed, unknown, False)

        return built_once(settings, self._cache, self._build)

    def _build(self, folder: Path) -> None:
        kind, vocab_size, fixed, unknown = self._tokenizer_settings
        clips = self.source.clips()
        if not clips:
            raise ConfigError("there are no recordings", "data.source")
        train = " ".join(clip.text for clip in clips if clip.split == "train")
        chosen = fixed or train_tokenizer(kind, " ".join(clip.text for clip in clips), train, vocab_size)
        bad: list[str] = []
        with ExitStack() as opened:
            parts = {split: _Written(opened, folder, split, len(self.speeds) if split == "train" else 1) for split in SPLITS}
            told = time.monotonic()
            for number, clip in enumerate(clips):
                try:
                    ids, sound = self._read(clip, chosen, unknown)
                except BadClip as why:
                    bad.append(f"{clip.name} {why}")
                    continue
                waves = (resampled(sound, speed, 1.0) for speed in (self.speeds if clip.split == "train" else [1.0]))
                parts[clip.split].add(clip, ids, [self._whole_tokens(self.features.of(wave)) for wave in waves])
                if time.monotonic() - told > TELL_EVERY:
                    told = time.monotonic()
                    say(f"read {number + 1:,} of {len(clips):,} recordings", error=True)
            if bad and not self.skip_bad:
                more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
                raise ConfigError("; ".join(bad[:_NAMED]) + more, "data.source", fix="Mend or remove them; data.skip_bad=true leaves them out.")
            if bad:
                say(f"left out {len(bad)} of {len(clips)} recordings: {bad[0]}{', …' if len(bad) > 1 else ''}", error=True)
            for split, need in (("train", "to train on"), ("val", "to validate on")):
                if not parts[split].names:
                    fix = "Raise data.validation_fraction, or name a table by data.validation_file."
                    raise ConfigError(f"no recording is left {need}, of {len(clips)} in all", "data.validation_fraction", fix=fix)
            for part in parts.values():
                part.finish()
        chosen.save(folder / "tokenizer.json")

    def _read(self, clip: Clip, tokenizer: Tokenizer, unknown: Unknown) -> tuple[Any, Any]:
        """(ids of the transcript, sound). Raises BadClip."""
        if not clip.text:
            raise BadClip("has a transcript without letters")
        shown = repr(clip.text if len(clip.text) <= _SHOWN else f"{clip.text[:_SHOWN]}…")
        try:
            ids = tokenizer.encode(clip.text, unknown)
        except ConfigError as error:
            raise BadClip(f"has a transcript that the tokenizer cannot spell, {shown} ({error.message})") from None
        speeds = self.speeds if clip.split == "train" else [1.0]
        sound = read_audio(clip.file, self.features.sample_rate, self.longest, min(1.0, *speeds))
        tokens = int(len(sound) / max(1.0, *speeds)) // self.features.hop // self.frames_per_token
        need = len(ids) + int((ids[1:] == ids[:-1]).sum())  # CTC puts a blank between equal neighbours
        if need > tokens:
            fast = f" at speed {max(speeds):g}" if max(speeds) > 1 else ""
            raise BadClip(f"has {tokens} tokens of sound{fast}, too few for a transcript that needs {need}: {shown}")
        return ids, sound

    def _whole_tokens(self, x_FM: torch.Tensor) -> torch.Tensor:
        return x_FM[: len(x_FM) // self.frames_per_token * self.frames_per_token]

    @cached_property
    def identity(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Of contents, not of places and times: a copied folder holds the same recordings.
        features = [self.features.sample_rate, self.features.mels, self.features.scaling]
        contents = [self.part(split).content for split in SPLITS]
        parts = contents, features, self.speeds, self.masks, self.frames_per_token, self.tokenizer.to_json()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def model_settings(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size}

    @cached_property
    def mean_length(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return float(self.part("train").lengths.mean()) / self.frames_per_token

    def order(self) -> Order:
        return _SpeechOrder(self.part("train"), self.batch_size, self.seed, self.pad_to, self.context_length * self.frames_per_token)

    def training_set(self) -> Any:
        return self.part("train")

    def eval_batches(self, split: str, batch_size: int, data_rank: int, data_world: int) -> Any:
        part = self.part(split)
        if not len(part.lengths):
            raise ConfigError(f"the data has no {split} part", "split", split, "Use split=val, or data.source.test_fraction=0.1.")
        return EvalRows(part, batch_size, data_rank, data_world, self.pad_to, self.context_length * self.frames_per_token)

    def part(self, split: str) -> _Part:
        if split not in self._parts:
            speeds = len(self.speeds) if split == "train" else 1
            masks = self.masks if split == "train" else (0, 0)
            self._parts[split] = _Part(self.folder, split, self.features.mels, speeds, self.frames_per_token, self.seed, masks)
        return self._parts[split]


class _Written:
    """One split while it is prepared: features go to its files clip by clip, so that no more than one recording is in memory."""

    def __init__(self, opened: ExitStack, folder: Path, split: str, speeds: int) -> None:
        self.folder, self.split = folder, split
        self.files = [opened.enter_context((folder / f"{split}-{speed}.f16").open("wb")) for speed in range(speeds)]
        self.lengths: list[list[int]] = [[] for _ in range(speeds)]
        self.targets: list[Any] = []
        self.names: list[tuple[str, str]] = []
        self.content = hashlib.sha256()

    def add(self, clip: Clip, ids: Any, features: Sequence[torch.Tensor]) -> None:
        for file, lengths, x_FM in zip(self.files, self.lengths, features, strict=True):
            file.write(x_FM.half().numpy().tobytes())
            lengths.append(len(x_FM))
        self.targets.append(ids)
        self.names.append((clip.name, clip.text))
        self.content.update(f"{clip.text}\0{zlib.crc32(clip.file.read_bytes())}\0".encode())

    def finish(self) -> None:
        ends = {f"ends_{speed}": np.cumsum(lengths, dtype=np.int64) for speed, lengths in enumerate(self.lengths)}
        joined = np.concatenate(self.targets) if self.targets else np.zeros(0, np.uint16)
        target_ends = np.cumsum([len(ids) for ids in self.targets], dtype=np.int64)
        np.savez(self.folder / f"{self.split}.npz", targets=joined, target_ends=target_ends, **ends)  # pyright: ignore[reportArgumentType]
        about = {"names": self.names, "content": self.content.hexdigest()}
        (self.folder / f"{self.split}.json").write_text(json.dumps(about), encoding="utf-8")


class _Part:
    """One split. ``lengths``: frames of each clip at the first speed; ``names``: (name, transcript) of each clip."""

    def __init__(
        self, folder: Path, split: str, mels: int, speeds: int, frames_per_token: int, seed: int, masks: tuple[int, int]
    ) -> None:
        self._arguments = folder, split, mels, speeds, frames_per_token, seed, masks
        self.frames_per_token, self.seed, self.masks = frames_per_token, seed, masks
        with np.load(folder / f"{split}.npz", allow_pickle=False) as stored:
            self.targets = stored["targets"].astype(np.int64)
            self.target_starts, *self.starts = (
                np.concatenate(([0], stored[name])) for name in ("target_ends", *(f"ends_{speed}" for speed in range(speeds)))
            )
        about = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
        self.names: list[tuple[str, str]] = [(name, text) for name, text in about["names"]]
        self.content: str = about["content"]  # a hash of the recordings and transcripts
        self.mels = mels
        self.frames = [_features_in(folder / f"{split}-{speed}.f16", mels) for speed in range(speeds)]
        self.lengths_at = [np.diff(starts) for starts in self.starts]
        self.lengths: Ints = self.lengths_at[0]

    def __getstate__(self) -> Any:  # pickling would send the features to every loader worker
        return self._arguments

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)

    def features_of(self, sample: int, speed: int = 0) -> npt.NDArray[Any]:
        """(F, M) in fp16."""
        start, end = self.starts[speed][sample : sample + 2]
        return self.frames[speed][start:end]

    def target_of(self, sample: int) -> Ints:
        return self.targets[self.target_starts[sample] : self.target_starts[sample + 1]]

    def __getitems__(self, keys: Starts) -> Batch:
        """A training batch; keys are rows (sample, width, number of the sample over all epochs, speed, width of the targets)."""
        return self._batch(keys[:, 0], int(keys[0, 1]), keys[:, 2], keys[:, 3], int(keys[0, 4]))

    def read(self, samples: Ints, width: int, numbers: Ints) -> Batch:
        """An evaluation batch; a negative sample is an empty row."""
        longest = max((len(self.target_of(sample)) for sample in samples if sample >= 0), default=0)
        return self._batch(samples, width, numbers, np.zeros_like(samples), longest)

    def _batch(self, samples: Ints, width: int, numbers: Ints, speeds: Ints, longest: int) -> Batch:
        B, M = len(samples), self.mels
        features = np.zeros((B, width, M), np.float32)
        documents = np.full((B, width // self.frames_per_token), -1, np.int64)
        targets = np.full((B, max(longest, 1)), IGNORED, np.int64)
        for row, (sample, number, speed) in enumerate(zip(samples.tolist(), numbers.tolist(), speeds.tolist(), strict=True)):
            if sample < 0:
                continue
            x_FM = self.features_of(sample, speed)
            features[row, : len(x_FM)] = x_FM
            if any(self.masks):
                self._mask(features[row, : len(x_FM)], np.random.default_rng([self.seed, number]))
            documents[row, : len(x_FM) // self.frames_per_token] = 0
            target = self.target_of(sample)
            targets[row, : len(target)] = target
        return {"features": torch.from_numpy(features), "documents": torch.from_numpy(documents), "targets": torch.from_numpy(targets)}

    def _mask(self, x_FM: npt.NDArray[np.float32], generator: np.random.Generator) -> None:
        mels, frames = self.masks
        F, M = x_FM.shape
        mean = x_FM.mean()
        for _ in range(2):
            width = int(generator.integers(min(mels, M) + 1))
            first = int(generator.integers(M - width + 1))
            x_FM[:, first : first + width] = mean
        for _ in range(max(1, round(F / (1.5 * FRAMES_A_SECOND)))):
            width = int(generator.integers(min(frames, F // 4) + 1))
            first = int(generator.integers(F - width + 1))
            x_FM[first : first + width] = mean


class _SpeechOrder:
    """A new random order in each epoch, each clip at a speed drawn for it, in batches of similar length (see ``ByLength``).

    Its rows are (sample, width of its batch in frames, number of the sample over all epochs, speed, width of its batch's targets).
    """

    def __init__(self, part: _Part, batch_size: int, seed: int, pad_to: int, longest: int) -> None:
        self.part, self.batch_size, self.seed, self.pad_to, self.longest = part, batch_size, seed, pad_to, longest
        self.n_samples = len(part.lengths)
        self.told = f"the training part has only {self.n_samples} clips"

    def starts(self, epoch: int) -> Starts:
        generator = np.random.default_rng([self.seed, epoch])
        steps = self.n_samples // self.batch_size
        chosen = generator.permutation(self.n_samples)[: steps * self.batch_size]
        speeds = generator.integers(len(self.part.lengths_at), size=len(chosen))
        lengths = np.stack(self.part.lengths_at)[speeds, chosen]
        batches = in_batches_of_like_length(lengths, self.batch_size, generator)
        widths = rounded(lengths[batches].max(axis=1, initial=1), self.pad_to, self.longest)
        targets = np.diff(self.part.target_starts)[chosen[batches]].max(axis=1, initial=1)
        numbers = epoch * self.n_samples + np.arange(len(chosen))
        shared = (widths.repeat(self.batch_size), numbers, speeds[batches].ravel(), targets.repeat(self.batch_size))
        return np.stack((chosen[batches].ravel(), *shared), axis=1)


def _features_in(file: Path, mels: int) -> npt.NDArray[np.float16]:
    """(frames, M) of all clips, memory-mapped."""
    if not file.stat().st_size:  # an empty file cannot be mapped
        return np.zeros((0, mels), np.float16)
    return np.asarray(np.memmap(file, np.float16, "r")).reshape(-1, mels)
