"""Speech recognition on held-out prompts: error rates after some minutes of one core, from scratch and from Whisper's encoder."""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

from meshformer.bench.learning import run
from meshformer.record.metrics_csv import read_metrics

RUNS = (  # recipe, steps, validations
    ("speech_prompts", 650, 650),
    ("speech_prompts", None, None),
    ("speech_from_whisper", 90, 90),
    ("speech_from_whisper", None, None),
)


def report_speech(options: argparse.Namespace) -> None:
    """Print error rates of characters and words with the CPU minutes of the whole command: start, reading the recordings, training, validations."""
    with tempfile.TemporaryDirectory() as scratch:
        for number, (recipe, steps, validations) in enumerate(RUNS):
            overrides = [f"experiment={recipe}", "trainer.threads=1", "~callbacks.checkpoint", "logger=csv"]
            overrides += [] if steps is None else [f"trainer.max_steps={steps}", f"trainer.val_check_interval={validations}"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            folder = run(Path(scratch), str(number), *overrides)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
            *earlier, last = [row for row in read_metrics(folder / "metrics.csv") if "val/cer" in row]
            rates = f"characters wrong {float(last['val/cer']):.3f}, words {float(last['val/wer']):.3f}"
            print(f"  {recipe:<22}{int(last['step']):>6} steps  {minutes:5.1f} CPU minutes  {rates}", flush=True)
            if earlier:
                print("    before: " + ", ".join(f"{float(row['val/cer']):.3f} at step {int(row['step'])}" for row in earlier), flush=True)
