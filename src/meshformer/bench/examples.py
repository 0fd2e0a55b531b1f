"""Small real runs for the notebooks and the figures of the README: `python -m meshformer.bench.examples [NAME ...] [--steps N] [--folder DIR]`.

Each set is a folder of runs, each trained in seconds by the command a user would type. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from meshformer.bench.tones import texts, write_table
from meshformer.command.doctor import silence
from meshformer.config.paths import default_cache
from meshformer.record import read_run

SMALL = [
    "model=nano", "model.n_layers=2", "model.n_heads=2", "model.d_model=32", "data.context_length=32", "data.batch_size=16",
    "data.eval_batch_size=64", "trainer.limit_val_batches=8", "trainer.progress=false", "trainer.threads=1", "trainer.precision=32-true",
    "logger=csv", "~callbacks.samples", "+callbacks.throughput.measure_seconds=0.02",
]  # fmt: skip
SPEECH = [
    "task=speech_recognition", "model=speech_nano", "data=audio_csv", "data.sample_rate=8000", "data.mels=32", "data.context_length=64",
    "data.mask_mels=2", "data.mask_frames=2", "model.n_layers=2", "model.n_heads=2", "model.d_model=64", "optimizer.lr=0.02",
    "trainer.max_steps=60", "trainer.val_check_interval=15", "trainer.progress=false", "trainer.threads=1", "trainer.precision=32-true",
    "logger=csv",
]  # fmt: skip
POSITIONS = ("rotary", "alibi", "sinusoidal", "learned")
LAYOUTS = ("single", "ddp", "fsdp", "tensor", "pipeline")
STEPS, LONG = 40, 200


def example_runs(name: str, steps: int = STEPS) -> Path:
    """Return the folder of the set `name` (compare, layouts, attention, scaling, speech), after training its missing runs in another process."""
    folder = folder_of(name, steps)
    if any(not _finished(folder / run) for run, _ in runs_of(name, steps)):
        # A notebook's kernel has started threads, so ranks must not be forked from this process.
        subprocess.run([sys.executable, "-m", "meshformer.bench.examples", name, f"--steps={steps}"], check=True)
    return folder


def folder_of(name: str, steps: int) -> Path:
    """Return the folder of a set in the user's cache. Its name contains a hash of the settings, so that an edit here trains new runs."""
    base = Path(default_cache()).expanduser()
    return base / "examples" / f"{name}-{steps}-{hashlib.sha256(repr(list(runs_of(name, steps))).encode()).hexdigest()[:6]}"


def runs_of(name: str, steps: int) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, overrides) for each run of a set."""
    every, check = max(1, steps // 20), max(1, steps // 5)
    common = [*SMALL, f"trainer.max_steps={steps}", f"trainer.log_every_n_steps={every}", f"trainer.val_check_interval={check}"]
    more = steps >= LONG  # enough steps for figures worth showing
    if name == "compare":
        rates = ("0.003", "0.01", "0.03", "0.1", "0.3") if more else ("0.003", "0.03", "0.3")
        for rate, seed in product(rates, (1, 2, 3) if more else (1, 2)):
            yield f"lr-{rate}-seed-{seed}", [*common, f"optimizer.lr={rate}", f"seed={seed}"]
    elif name == "layouts":  # clipped SGD: AdamW and Muon hide errors in the scale of gradients
        own = ["optimizer=sgd", "optimizer.lr=0.03", "trainer.log_every_n_steps=1", "callbacks.profile.steps=[11,14]"]
        for layout in LAYOUTS:
            yield layout, [*common, *own, f"strategy={layout}"]
    elif name == "attention":
        for position in (*POSITIONS, "none", "positional_attention") if more else POSITIONS:
            yield position, [*common, f"model/position={position}"]
    elif name == "scaling":
        for width in (16, 24, 32, 48, 64, 96) if more else (16, 32, 64):
            yield f"width-{width}", [*common, f"model.d_model={width}"]
    elif name == "speech":  # tones for letters, since recordings of people take twenty minutes to learn
        yield "tones", [*SPEECH, f"data.file={_tones()}"]
    else:
        raise ValueError(f"there is no set {name!r}; there are compare, layouts, attention, scaling, speech")


def train_missing(name: str, steps: int, folder: Path) -> None:
    from meshformer.cli import main
    from meshformer.job import train

    train.TEXT_TOKENS = 16  # the sample text is not used

    for run, overrides in runs_of(name, steps):
        target = folder / run
        if _finished(target):
            continue
        shutil.rmtree(target, ignore_errors=True)  # left by a killed run
        start = time.perf_counter()
        with silence():
            code = main(["train", f"hydra.run.dir={target}", *overrides])
        if code:
            raise SystemExit(f"{name}/{run} failed with exit code {code}")
        print(f"  {name}/{run:<24}{time.perf_counter() - start:6.1f} s", flush=True)


def _tones() -> Path:
    """A table of recordings in the user's cache, written at first use."""
    table = Path(default_cache()).expanduser() / "examples" / "tones" / "table.csv"
    return table if table.is_file() else write_table(table.parent, texts(160))


def _finished(folder: Path) -> bool:
    try:
        return read_run(folder)["state"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshformer.bench.examples", description=__doc__)
    sets = ("compare", "layouts", "attention", "scaling", "speech")
    parser.add_argument("names", nargs="*", default=[], help=f"any of {', '.join(sets)} (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    parser.add_argument("--figures", type=Path, help="also draw three figures of compare, attention and scaling, as SVG, into this folder")
    options = parser.parse_args(argv)
    for name in options.names or sets:
        if name not in sets:
            parser.error(f"there is no set {name!r}; there are {', '.join(sets)}")
        train_missing(name, options.steps, folder_of(name, options.steps))
    if options.figures:
        draw(options.steps, options.figures)
    return 0


def draw(steps: int, folder: Path) -> None:
    """Draw the README's figures from the sets of `steps` steps, which must exist."""
    from meshformer.runs import figures, load_metrics, load_runs, loss_by_position, training_flops

    figures.save(figures.curves(load_metrics(folder_of("compare", steps))), folder / "learning_rates", ("svg",))
    runs = load_runs(folder_of("attention", steps))
    trained = int(runs["context_length"].max())
    losses = {row["model/position"]: loss_by_position(row["folder"], 8 * trained, windows=128) for row in runs.to_dict("records")}
    figures.save(figures.extrapolation(losses, trained), folder / "positions", ("svg",))
    runs = load_runs(folder_of("scaling", steps))
    runs["flops"] = [training_flops(run) for run in runs["folder"]]
    figures.save(figures.scaling(runs, load_metrics(runs)), folder / "scaling", ("svg",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
