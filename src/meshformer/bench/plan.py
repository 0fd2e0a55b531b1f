"""Fits the constants of `plan` on published step times and prints their errors: on rows that were left out, on larger models, more cards and
longer texts than those fitted, and on layouts of several axes that fitted nothing.

`python -m meshformer.bench plan`; `--write` stores the constants in plan/constants.json; `--fsdp FILE` and `--products FILE` add rows of the same
columns that are only predicted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from meshformer.bench.layouts import COMMON as SETTINGS
from meshformer.bench.layouts import LAYOUTS, SIZE, timed
from meshformer.command.compose import compose
from meshformer.config.paths import conf_dir
from meshformer.plan import steptime
from meshformer.plan.candidates import layout_of
from meshformer.plan.cluster import Cluster, read_cluster
from meshformer.plan.measure import measure
from meshformer.plan.sizes import Sizes, read_sizes
from meshformer.plan.steptime import Constants, StepLayout, step_time

PUBLISHED = Path(__file__).parent / "published"
MPT = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 12), "1b": (24, 2048, 16), "3b": (32, 2560, 20),
    "7b": (32, 4096, 32), "13b": (40, 5120, 40), "30b": (48, 7168, 56), "70b": (80, 8192, 64),
}  # layers, width, heads  # fmt: skip
MPT_VOCABULARY = 50368
LLAMA = {"8b": (32, 4096, 14336, 32), "70b": (80, 8192, 28672, 64), "405b": (126, 16384, 53248, 128)}  # layers, C, F, heads
LARGE = ("13b", "30b", "70b")
CLUSTERS = {"h100_80gb": "h100x8", "a100_80gb": "a100x8", "a100_40gb": "a100_40gx8", "h100_96gb": "h100_96gx8", "h200_141gb": "h200x8"}
# Start and prior of each constant, and the logarithmic width of the prior. Those of a card are fitted for each card.
COMMON = {"rereads": (2.5, 0.5), "network": (0.65, 0.3), "exposed": (0.7, 0.3)}
OF_CARD = {"products": (0.8, 0.15), "attention": (0.35, 0.5), "link": (0.6, 0.3)}
PRIOR, SCALE = 0.06, 0.05  # weight of the prior; relative error from which a row counts as an outlier
SPLITS = 10


@dataclass(frozen=True)
class Row:
    """A published measurement: tokens a second of one card."""

    card: str
    model: str
    sizes: Sizes
    layout: StepLayout
    measured: float

    @property
    def tokens(self) -> float:
        return self.layout.batch * self.sizes.length / self.layout.processes

    def __str__(self) -> str:
        degrees = " × ".join(f"{axis} {n}" for axis in ("shard", "context", "tensor", "pipeline") if (n := getattr(self.layout, axis)) > 1)
        kind = " float8" * self.layout.float8 + " compiled" * self.layout.compiled + f" {self.layout.schedule}" * (self.layout.pipeline > 1)
        return f"{self.model} {self.card} {degrees}, {self.sizes.length} tokens, micro-batch {self.layout.samples}{kind}"


def clusters() -> dict[str, Cluster]:
    """The published cards, each in its cluster of conf/cluster/."""
    found = {}
    for card, name in CLUSTERS.items():
        found[card] = read_cluster(yaml.safe_load((conf_dir() / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")))
    return found


def _table(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def fsdp_rows(path: Path = PUBLISHED / "fsdp.csv") -> list[Row]:
    """Rows of llm-foundry: FSDP over all cards, gathers in bf16, every micro-batch reduces, checkpointing of whole blocks or none, not compiled."""
    rows = []
    for x in _table(path):
        layers, width, heads = MPT[x["model"]]
        length = int(x["sequence_length"])
        sizes = Sizes(layers, width, heads, width // heads, width, 4 * width, False, MPT_VOCABULARY, True, length, position_table=length * width)
        layout = StepLayout(
            samples=int(x["microbatch"]), shard=int(x["gpus"]), accumulation=int(x["accumulation"]), reduce_every=True,
            recomputed=(1.0, 1.0, 1.0) if x["activation_checkpointing"] == "True" else (0.0, 0.0, 0.0),
            reduce_bytes=4 if x["precision"].startswith("amp") else 2, float8="fp8" in x["precision"],
        )  # fmt: skip
        rows.append(Row(x["gpu"], x["model"], sizes, layout, float(x["tokens_per_second"])))
    return rows


def product_rows(path: Path = PUBLISHED / "products.csv") -> list[Row]:
    """Rows of torchtitan; `context`, `async`, `microbatches` and `gpu` are columns that a file may have.

    Its selective checkpointing repeats every second matrix product and no attention; its pipeline had as many micro-batches as ranks unless told
    otherwise; with float8 both FSDP and tensor parallelism gather in float8 and reduce in bf16.
    """
    rows = []
    for x in _table(path):
        layers, width, deep, heads = LLAMA[x["llama3"]]
        sizes = Sizes(layers, width, heads, 128, 8 * 128, deep, True, 128256, False, int(x["sequence_length"]))
        pipeline, batch, float8 = int(x["pipeline"]), int(x["local_batch"]), x["float8"] == "1"
        microbatches = int(x.get("microbatches") or pipeline)
        layout = StepLayout(
            samples=batch // microbatches, shard=int(x["shard"]), tensor=int(x["tensor"]), pipeline=pipeline, microbatches=microbatches,
            context=int(x.get("context") or 1), async_tensor=x.get("async") == "1",
            schedule=x["schedule"], stages=2 if x["schedule"].startswith("interleaved") else 1, reshard=pipeline == 1,
            recomputed=(1.0, 1.0, 1.0) if x["activation_checkpointing"] == "full" else (0.5, 0.0, 1.0),
            float8=float8, gather_bytes=1 if float8 else 2, exchange_bytes=1.5 if float8 else 2.0, compiled=x["compiled"] == "1",
        )  # fmt: skip
        rows.append(Row(x.get("gpu") or "h100_96gb", x["llama3"], sizes, layout, float(x["tokens_per_second_per_gpu"])))
    return rows


Fitted = dict[str, Constants]  # by card


def predicted(row: Row, fitted: Fitted, of: dict[str, Cluster]) -> float:
    """Tokens a second of one card."""
    return row.tokens / step_time(row.sizes, row.layout, of[row.card], fitted[row.card]).total


def fit(rows: Sequence[Row], of: dict[str, Cluster]) -> Fitted:
    """The constants of every card in `rows`, by least squares of log errors with a Cauchy loss, since some rows are outliers (memory almost full)."""
    from scipy.optimize import least_squares  # not where `bench gpu` runs

    cards = sorted({row.card for row in rows})
    names = [(None, name) for name in COMMON] + [(card, name) for card in cards for name in OF_CARD]
    prior = {**COMMON, **OF_CARD}

    def unpack(x: Any) -> Fitted:
        values = {key: prior[key[1]][0] * math.exp(value) for key, value in zip(names, x, strict=True)}
        common = {name: values[None, name] for name in COMMON}
        return {card: Constants(**common, **{name: values[card, name] for name in OF_CARD}) for card in cards}

    def errors(x: Any) -> list[float]:
        fitted = unpack(x)
        away = [PRIOR * value / prior[name][1] for value, (_, name) in zip(x, names, strict=True)]
        return [math.log(predicted(row, fitted, of) / row.measured) for row in rows] + away

    return unpack(least_squares(errors, [0.0] * len(names), loss="cauchy", f_scale=SCALE).x)


def fit_another(rows: Sequence[Row], base: Constants, of: dict[str, Cluster]) -> Constants:
    """The constants of a card with few rows: `base` is those of its sister; products, attention and the compiler's share are fitted."""
    from scipy.optimize import least_squares

    names = {"products": 0.3, "attention": 0.5, "compiled": 0.5}

    def unpack(x: Any) -> Constants:
        return replace(base, **{name: getattr(base, name) * math.exp(value) for name, value in zip(names, x, strict=True)})

    def errors(x: Any) -> list[float]:
        fitted = {row.card: unpack(x) for row in rows}
        away = [PRIOR / 2 * value / width for value, width in zip(x, names.values(), strict=True)]
        return [math.log(predicted(row, fitted, of) / row.measured) for row in rows] + away

    return unpack(least_squares(errors, [0.0, 0.5, 0.0]).x)


def relative(rows: Iterable[Row], fitted: Fitted, of: dict[str, Cluster]) -> list[float]:
    """|predicted / measured − 1| of each row."""
    return [abs(predicted(row, fitted, of) / row.measured - 1) for row in rows]


@dataclass(frozen=True)
class Errors:
    """What `held_out` and the other checks found; shares from 0 to 1."""

    mean: float
    within_15: float
    by_card: dict[str, float]

    def __str__(self) -> str:
        cards = ", ".join(f"{card} {100 * error:.1f}" for card, error in self.by_card.items())
        return f"mean error {100 * self.mean:.1f} %, within 15 %: {100 * self.within_15:.0f} % of the rows ({cards})"


def _errors(rows: Sequence[Row], fitted: Fitted, of: dict[str, Cluster]) -> Errors:
    found = relative(rows, fitted, of)
    cards = {card: statistics.mean(relative([r for r in rows if r.card == card], fitted, of)) for card in sorted({r.card for r in rows})}
    return Errors(statistics.mean(found), sum(e < 0.15 for e in found) / len(found), cards)


def held_out(rows: Sequence[Row], of: dict[str, Cluster], seed: int) -> Errors:
    """Fit a random half of each card's rows, predict the other."""
    fitted_rows, others = [], []
    for card in sorted({row.card for row in rows}):
        own = [row for row in rows if row.card == card]
        random.Random(seed).shuffle(own)
        fitted_rows += own[: len(own) // 2]
        others += own[len(own) // 2 :]
    return _errors(others, fit(fitted_rows, of), of)


def extrapolated(rows: Sequence[Row], of: dict[str, Cluster]) -> dict[str, Errors]:
    """Fit the small, the few and the short; predict the large, the many and the long."""
    ways: dict[str, tuple[Callable[[Row], bool], Callable[[Row], bool]]] = {
        "up to 7 B, predict 13 B and more": (lambda r: r.model not in LARGE, lambda r: r.model in LARGE),
        "up to 16 cards, predict 32 and more": (lambda r: r.layout.processes <= 16, lambda r: r.layout.processes >= 32),
        "up to 4,096 tokens, predict 8,192 and more": (lambda r: r.sizes.length <= 4096, lambda r: r.sizes.length >= 8192),
    }
    return {
        name: _errors([r for r in rows if later(r)], fit([r for r in rows if first(r)], of), of) for name, (first, later) in ways.items()
    }


def ordered(rows: Sequence[Row], fitted: Fitted, of: dict[str, Cluster]) -> tuple[int, int]:
    """(in the right order, all) of the pairs of one model on one card whose throughputs differ by more than a quarter."""
    right = pairs = 0
    for i, a in enumerate(rows):
        for b in rows[:i]:
            if (a.card, a.model) == (b.card, b.model) and abs(math.log(a.measured / b.measured)) > math.log(1.25):
                pairs += 1
                right += (a.measured > b.measured) == (predicted(a, fitted, of) > predicted(b, fitted, of))
    return right, pairs


def products_fitted(fitted: Fitted, of: dict[str, Cluster]) -> Constants:
    """Constants of torchtitan's card, on its three rows of one node."""
    return fit_another(product_rows()[:3], fitted["h100_80gb"], of)


def report_plan(options: argparse.Namespace) -> None:
    """Print the errors and the constants, and write them if asked."""
    of, rows = clusters(), fsdp_rows()
    print(f"{len(rows)} published rows of FSDP\n")
    for seed in range(SPLITS):
        print(f"  random half left out, seed {seed}: {held_out(rows, of, seed)}")
    for name, errors in extrapolated(rows, of).items():
        print(f"  {name}: {errors}")
    fitted = fit(rows, of)
    right, pairs = ordered(rows, fitted, of)
    print(f"  all rows fitted: {_errors(rows, fitted, of)}")
    print(f"  pairs of a model on a card that differ by more than 25 %: {right} of {pairs} in the right order\n")
    fitted["h100_96gb"] = products_fitted(fitted, of)
    several = product_rows()
    print("FSDP × tensor × pipeline; the first three rows fitted three constants, the others nothing")
    for index, row in enumerate(several):
        _print_row(row, fitted, of, "fitted" if index < 3 else "")
    found = relative(several[3:], fitted, of)
    print(f"  not fitted: mean error {100 * statistics.mean(found):.1f} %, worst {100 * max(found):.1f} %\n")
    fitted["h200_141gb"] = fitted["h100_80gb"]  # nothing was published to fit it on
    later = product_rows(PUBLISHED / "later.csv")
    print("Rows read after the model of step time stood; they fitted nothing")
    for row in later:
        _print_row(row, fitted, of)
    found = relative(later, fitted, of)
    print(f"  mean error {100 * statistics.mean(found):.1f} %, worst {100 * max(found):.1f} %\n")
    del fitted["h200_141gb"]
    for path, read in ((options.fsdp, fsdp_rows), (options.products, product_rows)):
        if path:
            more = read(Path(path))
            for row in more:
                _print_row(row, fitted, of)
            found = relative(more, fitted, of)
            print(f"  {path}: mean error {100 * statistics.mean(found):.1f} %, worst {100 * max(found):.1f} %\n")
    stored = to_store(fitted)
    print(json.dumps(stored, indent=1))
    if options.figure:
        draw(rows, product_rows() + later, {**fitted, "h200_141gb": fitted["h100_80gb"]}, of, Path(options.figure))
    if options.write:
        path = Path(steptime.__file__).parent / "constants.json"
        path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


def draw(rows: Sequence[Row], others: Sequence[Row], fitted: Fitted, of: dict[str, Cluster], path: Path) -> None:
    """Predicted against measured tokens a second of a card, every published row."""
    import matplotlib.pyplot as plt  # not where `bench gpu` runs
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    from meshformer.runs import figures

    with plt.rc_context(figures.STYLE):
        figure, both = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
        cards = (("h100_80gb", "H100 80 GB"), ("a100_80gb", "A100 80 GB"), ("a100_40gb", "A100 40 GB"))
        for (card, name), marker, colour in zip(cards, figures.MARKERS, figures.COLOURS, strict=False):
            own = [row for row in rows if row.card == card]
            both[0].plot([r.measured for r in own], [predicted(r, fitted, of) for r in own], marker, color=colour, label=name, alpha=0.8)
        for index, model in enumerate(LLAMA):
            own = [row for row in others if row.model == model]
            found = [predicted(row, fitted, of) for row in own]
            both[1].plot([r.measured for r in own], found, figures.MARKERS[index], color=figures.COLOURS[index], label=f"Llama 3.1 {model.upper()}")
        titles = ("FSDP, 8 to 512 cards: 144 rows, all fitted", "Several axes, 8 to 512 cards: 21 rows, 3 fitted")
        for axes, shown, title in zip(both, (rows, others), titles, strict=True):
            ends = [0.8 * min(r.measured for r in shown), 1.25 * max(r.measured for r in shown)]
            axes.plot(ends, ends, color=figures.GREY, linewidth=1)
            axes.fill_between(ends, [0.85 * end for end in ends], [1.15 * end for end in ends], color=figures.GREY, alpha=0.15, label="within 15 %")
            axes.set(xscale="log", yscale="log", xlabel="measured tokens/s of a card", ylabel="predicted", title=title, xlim=ends, ylim=ends)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
                axis.set_minor_formatter(NullFormatter())
            axes.legend()
    plt.close(figure)
    plt.rcParams["svg.hashsalt"] = path.stem  # the same file from the same rows
    figures.save(figure, path.with_suffix(""), (path.suffix[1:],))


def report_plan_here(options: argparse.Namespace) -> None:
    """Measure this machine, predict nine layouts on two of its cores, and time them: the order and the errors."""
    from scipy.stats import spearmanr

    found = measure()
    cluster, own = read_cluster(found["cluster"]), Constants(**found["constants"])
    figures = {**{k: v for k, v in found["cluster"].items() if k not in ("nodes", "network", "power")}, **found["constants"]}
    print("  " + ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()))
    both: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for index, (name, settings) in enumerate(LAYOUTS.items()):
            config = compose([*SETTINGS, *SIZE, *settings])
            sizes = read_sizes(config)
            predicted = step_time(sizes, layout_of(config), cluster, own)
            measured = timed(Path(scratch), str(index), settings)
            both.append((measured, predicted.total))
            parts = ", ".join(f"{key} {1e3 * value:.0f}" for key, value in asdict(predicted).items() if value > 5e-4)
            error = 100 * (predicted.total / measured - 1)
            print(f"  {name:<30}{1e3 * measured:7.1f} ms measured {1e3 * predicted.total:7.1f} predicted ({error:+.0f} %)  {parts}", flush=True)
    errors = [abs(guess / true - 1) for true, guess in both]
    order = spearmanr([true for true, _ in both], [guess for _, guess in both]).statistic
    print(f"  rank correlation {order:.2f}, mean error {100 * statistics.mean(errors):.0f} %, worst {100 * max(errors):.0f} %")


def _print_row(row: Row, fitted: Fitted, of: dict[str, Cluster], note: str = "") -> None:
    found = predicted(row, fitted, of)
    print(f"  {row}: {row.measured:,.0f} measured, {found:,.0f} predicted ({100 * (found / row.measured - 1):+.0f} %) {note}".rstrip())


def to_store(fitted: Fitted) -> dict[str, Any]:
    """What constants.json holds: those of all cards, and those of each card where they differ."""
    common = asdict(next(iter(fitted.values())))
    cards = {
        card: {name: round(value, 4) for name, value in asdict(found).items() if name in OF_CARD or value != common[name]}
        for card, found in fitted.items()
    }
    return {"common": {name: round(value, 4) for name, value in common.items() if name not in OF_CARD}, "cards": cards}
