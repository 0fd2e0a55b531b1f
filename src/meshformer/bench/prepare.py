"""Measure time and memory for preparing a large text, and the start-up time of later runs with it."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SMALL, VOCABULARY, WORDS = 5, 4096, 50_000  # MB of the small text; BPE vocabulary; distinct words in the texts
_PREPARE = """
import json, sys, time
from meshformer.data import TextFiles, prepare
begun = time.perf_counter()
prepared = prepare(TextFiles(sys.argv[1]), tokenizer=sys.argv[2], vocab_size=int(sys.argv[3]), cache=sys.argv[4])
seconds = time.perf_counter() - begun
print(json.dumps({"seconds": seconds, "tokens": len(prepared.tokens("train"))}))
"""
_START = """
import json, sys, time
begun = time.perf_counter()
from meshformer.data import TextData, TextFiles
imported = time.perf_counter()
data = TextData(TextFiles(sys.argv[1]), 8, 256, sys.argv[2], int(sys.argv[3]), sys.argv[4], seed=1)
data.prepare_data()
next(iter(data.train_dataloader()))
print(json.dumps({"seconds": time.perf_counter() - imported}))
"""


def make_text(path: Path, megabytes: int) -> None:
    """Write lines of made-up words with Zipf frequencies, some with non-ASCII letters; the same in every run."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkäé", range(24, 0, -1), k=draw.randint(2, 10))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    written = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        while written < megabytes * 1e6:
            drawn = draw.choices(words, weights, k=100_000)
            lines = (" ".join(drawn[i : i + 12]) for i in range(0, len(drawn), 12))
            text = "".join(f"{line.capitalize()}, {draw.randrange(10_000)}.\n" for line in lines)
            written += file.write(text) + text.count("ä") + text.count("é")


def report_prepare(options: argparse.Namespace) -> None:
    """Print, for each tokenizer, MB/s and peak memory (including child processes) of preparing a text, and the seconds from the imports to the first
    batch of later starts with the large and with a 5 MB text."""
    size = options.megabytes
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        small, large = Path(scratch) / "small.txt", Path(scratch) / "large.txt"
        make_text(small, SMALL)
        make_text(large, size)
        for kind in ("char", "bpe"):
            settings = [kind, str(VOCABULARY), f"{scratch}/cache"]
            _measure(_PREPARE, small, settings)
            found = _measure(_PREPARE, large, settings)
            print(
                f"  {kind:<5} {size} MB prepared in {found['seconds']:.1f} s, {size / found['seconds']:.1f} MB/s; at most {found['peak']:.0f} MiB; "
                f"{found['tokens']:,} tokens train"
            )
            first, again = (_measure(_START, large, settings)["seconds"] for _ in range(2))
            print(f"        start with {size} MB {first:.2f} s, again {again:.2f} s; with {SMALL} MB ", end="")
            print(f"{_measure(_START, small, settings)['seconds']:.2f} s")


def _measure(program: str, text: Path, settings: list[str]) -> dict[str, Any]:
    """Run the program and return what it prints, and ``peak``: the peak memory (MiB) of it and its child processes, added up."""
    command = [sys.executable, "-c", program, str(text), *settings]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.02)
        found = json.load(process.stdout)  # pyright: ignore[reportArgumentType]
    return {**found, "peak": peak / 1024}


def _peak(process: int) -> int:
    """Return the peak memory (KiB) so far of the process and its live children."""
    total = 0
    with suppress(OSError):  # the process has ended
        status = Path(f"/proc/{process}/status").read_text()
        total = int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(_peak(int(child)) for child in (task / "children").read_text().split())
    return total
