"""Audio files as log-mel features. Shapes: N samples, F frames, M mel bands.

Read by libsndfile (wav, flac, ogg, mp3) through `soundfile` and resampled by `soxr`: `pip install meshformer[speech]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from meshformer.config.errors import ConfigError

Samples = npt.NDArray[np.float32]
SILENCE = 1e-4  # a clip whose loudest sample is below this (−80 dB of full scale) holds nothing to learn from


class BadClip(Exception):
    """A recording that cannot be used; the text says why, to follow the name of its file."""


@dataclass(frozen=True)
class Features:
    """Log-mel features: the short-time Fourier transform with a Hann window of 25 ms every 10 ms, its power summed in `mels` bands.

    `scaling`: `clip`, natural logarithm, with mean 0 and deviation 1 over the clip; `whisper`, as Whisper's encoder was trained (Radford et al.
    2022): log10, at most 8 below the loudest value, then (x + 4) / 4; it needs 16 kHz and 80 bands.
    """

    sample_rate: int = 16000
    mels: int = 80
    scaling: Literal["clip", "whisper"] = "clip"

    def __post_init__(self) -> None:
        if self.sample_rate % 100:
            raise ValueError(f"sample_rate={self.sample_rate} is no multiple of 100, and there are 100 frames a second")

    @property
    def hop(self) -> int:
        """Samples between two frames."""
        return self.sample_rate // 100

    @cached_property
    def _filters_MK(self) -> Tensor:
        return torch.from_numpy(mel_filters(self._n_fft // 2 + 1, self.mels, self.sample_rate))

    @property
    def _n_fft(self) -> int:
        return max(400, self.sample_rate // 40)  # at 8 kHz, windows of 200 samples are padded, so that the lowest bands hold a frequency each

    def of(self, wave_N: Samples | Tensor) -> Tensor:
        """(F, M) in fp32, F = N // hop."""
        wave = torch.as_tensor(wave_N, dtype=torch.float32)
        window = torch.hann_window(self.sample_rate // 40)
        spectrum_KF = torch.stft(wave, self._n_fft, self.hop, len(window), window, return_complex=True, pad_mode="reflect")
        power_MF = self._filters_MK @ spectrum_KF[:, :-1].abs().square()
        if self.scaling == "whisper":
            log_MF = power_MF.clamp(min=1e-10).log10()
            return ((log_MF.maximum(log_MF.max() - 8) + 4) / 4).T.contiguous()
        log_MF = (power_MF + 1e-8).log()
        return ((log_MF - log_MF.mean()) / (log_MF.std() + 1e-5)).T.contiguous()


def mel_filters(bins: int, mels: int, sample_rate: int) -> npt.NDArray[np.float32]:
    """(M, K): triangular filters of equal area, spaced evenly on Slaney's mel scale, linear below 1 kHz and logarithmic above (Slaney 1998)."""
    step, corner = 200 / 3, 1000.0
    growth = np.log(6.4) / 27

    def to_mel(hertz: float) -> float:
        return hertz / step if hertz < corner else corner / step + np.log(hertz / corner) / growth

    points = np.linspace(0, to_mel(sample_rate / 2), mels + 2)
    above = corner * np.exp(growth * (points - corner / step))
    edges = np.where(points < corner / step, points * step, above)
    frequencies = np.linspace(0, sample_rate / 2, bins)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((frequencies - left) / (middle - left), (right - frequencies) / (right - middle)).clip(min=0)
    return (triangles * 2 / (right - left)).astype(np.float32)


def read_audio(file: Path, sample_rate: int, longest: float, slowest: float = 1.0) -> Samples:
    """(N,): the recording at `sample_rate`, its channels averaged. Its length is looked up before it is read.

    Raises BadClip for a file that is missing, damaged, cut off, empty, silent, or longer than `longest` seconds at the speed `slowest`.
    """
    soundfile: Any = library("soundfile")
    try:
        if not file.is_file():
            raise BadClip("is missing")
        seconds = soundfile.info(file).duration
        if seconds / slowest > longest:
            slowed = f", {seconds / slowest:,.1f} s at speed {slowest:g}" if slowest < 1 else ""
            raise BadClip(f"lasts {seconds:,.1f} s{slowed}, and data.context_length leaves room for {longest:g} s")
        wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
        cut = len(wave) < round(seconds * rate) or _ends_early(file)
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError) as error:  # TypeError: a file without a header
        raise BadClip(f"cannot be read ({str(error).rpartition(': ')[2].rstrip('.')})") from None
    if len(wave) < rate / 10:
        raise BadClip(f"holds {len(wave) / rate:.2f} s of sound" if len(wave) else "is empty")
    if cut:
        raise BadClip("is cut off: its file ends before its sound does")
    mono: Samples = wave.mean(axis=1)
    if not np.isfinite(mono).all():
        raise BadClip("holds values that are not numbers")
    if np.abs(mono).max() < SILENCE:
        raise BadClip("is silent")
    return resampled(mono, rate, sample_rate)


def _ends_early(file: Path) -> bool:
    """Whether a wav file is shorter than its header says, or an ogg file lacks the mark of its last page: libsndfile reads what is there."""
    with file.open("rb") as opened:
        start = opened.read(12)
        size = file.stat().st_size
        if start[:4] == b"OggS":
            opened.seek(max(0, size - (1 << 16)))
            last = opened.read().rpartition(b"OggS")[2]
            return len(last) < 2 or not last[1] & 4  # behind the mark: version, then flags; 4 is the end of the stream
        if start[:4] != b"RIFF":
            return False
        while len(head := opened.read(8)) == 8:
            length = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return 0 < length < 0xFFFFFFFF and opened.tell() + length > size
            opened.seek(length + length % 2, 1)
    return False


def resampled(wave_N: Samples, rate: float, wanted: float) -> Samples:
    return wave_N if rate == wanted else library("soxr").resample(wave_N, rate, wanted)


def library(name: str) -> Any:
    """ConfigError where it is not installed."""
    if find_spec(name) is None:
        raise ConfigError(f"audio is read with {name}, which is not installed", "data", fix="Run pip install 'meshformer[speech]'.")
    return __import__(name)
