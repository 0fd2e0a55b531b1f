"""Recordings for tests and the example notebook: each letter is a tone of 80 ms, so that a small model reads them within seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

RATE, LETTER = 8000, 0.08
ALPHABET = "abcdefgh "


def tones(text: str, rate: int = RATE) -> npt.NDArray[np.float32]:
    """(N,): the text, with silence around it."""
    time = np.arange(round(LETTER * rate)) / rate
    silence = np.zeros(round(0.1 * rate))
    notes = [np.zeros(len(time)) if letter == " " else 0.3 * np.sin(2 * np.pi * 300 * 1.3 ** ALPHABET.index(letter) * time) for letter in text]
    sound = np.concatenate([silence, *notes, silence])
    return (sound + 0.003 * np.random.default_rng(len(text)).standard_normal(len(sound))).astype(np.float32)


def texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of one or two words."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join("".join(generator.choices(ALPHABET[:-1], k=generator.randint(2, 6))) for _ in range(generator.randint(1, 2)))] = None
    return list(found)


def write_table(folder: Path, spoken: list[str]) -> Path:
    """A table of recordings, for data=audio_csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(spoken):
        soundfile.write(folder / f"{number}.wav", tones(text), RATE)
    return write_rows(folder / "table.csv", [(f"{number}.wav", text) for number, text in enumerate(spoken)])


def write_rows(table: Path, rows: list[tuple[str, str]]) -> Path:
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "text"), *rows])
    return table
