"""Publication-quality figures of runs: units on every axis, the colour-blind-safe palette of Okabe and Ito (2008), vector export.

Every function returns a closed matplotlib Figure, which a notebook displays and `save` writes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from meshformer.runs.fits import fit_power_law, lower_envelope
from meshformer.runs.frames import distinguishing_columns, labels, setting_columns

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # without the yellow, which is too light on white
MARKERS = "osD^vPX"
GREY = "#767676"
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.4, "lines.markersize": 4, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 200,
    "text.parse_math": False,
    "svg.fonttype": "path", "pdf.fonttype": 42, "axes.prop_cycle": plt.cycler(color=COLOURS),
}  # fmt: skip
AXIS = {"step": "optimizer step", "tokens": "tokens", "training_s": "training time (s)"}
NAME = {
    "val/loss": "validation loss (nats)",
    "train/loss": "training loss (nats)",
    "val/bits_per_byte": "bits a byte (validation)",
    "train/grad_norm": "gradient norm",
    "train/lr": "learning rate",
    "train/tokens_per_second": "tokens a second",
    "val/cer": "share of characters wrong",
    "val/wer": "share of words wrong",
    "train/mfu": "share of the matrix rate (MFU)",
    "train/data_wait_ms": "wait for data (ms a step)",
    "train/peak_memory_gib": "peak memory of a process (GiB)",
    "train/reserved_memory_gib": "reserved memory of a GPU (GiB)",
}
TOLERANCE = 5e-6  # the tests' tolerance between layouts, in fp32


def _styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(STYLE):
            figure = function(*args, **kwargs)
        plt.close(figure)  # an open figure would be shown twice in a notebook and stay in memory
        return figure

    return draw


def save(figure: Figure, stem: Path | str, formats: Sequence[str] = ("pdf", "svg")) -> list[Path]:
    """Write STEM.pdf and STEM.svg (or other `formats`); returns the paths."""
    paths = [Path(stem).with_name(f"{Path(stem).name}.{kind}") for kind in formats]
    with plt.rc_context(STYLE):
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            undated = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else None
            figure.savefig(path, bbox_inches="tight", metadata=undated)
    return paths


@_styled
def one_run(metrics: pd.DataFrame) -> Figure:
    """One run: losses, learning rate and speed over the steps."""
    figure, (loss, rate, speed) = plt.subplots(1, 3, figsize=(9.5, 2.7), width_ratios=[1.7, 1, 1], layout="constrained")
    for colour, (name, word) in zip(COLOURS, {"train/loss": "training", "val/loss": "validation"}.items(), strict=False):
        part = metrics[metrics["metric"] == name]
        few = {"marker": "o"} if len(part) < 25 else {}
        loss.plot(part["step"], part["value"], color=colour, label=word, **few)
        if name == "val/loss" and len(part):
            end = part.iloc[-1]
            place = {"xytext": (-3, 9), "textcoords": "offset points", "ha": "right", "color": colour, "fontsize": 8}
            loss.annotate(f"{end['value']:.3f}", (end["step"], end["value"]), **place)
    loss.set(xlabel=AXIS["step"], ylabel="loss (nats)")
    loss.legend()
    for axes, name in ((rate, "train/lr"), (speed, "train/tokens_per_second")):
        part = metrics[metrics["metric"] == name]
        axes.plot(part["step"], part["value"], color=COLOURS[0])
        axes.set(xlabel=AXIS["step"], ylabel=NAME[name], ylim=(0, None))
    return figure


@_styled
def curves(
    metrics: pd.DataFrame, metric: str = "val/loss", x: str | Sequence[str] = ("step", "tokens", "training_s"), start: float = 0.0
) -> Figure:
    """Plot `metric` against each of `x`, one panel each. Each line is the mean over the seeds of a setting, with a band of one standard deviation.

    `start` omits this fraction of the steps, because the large losses at the start would compress the rest.
    """
    data = metrics[metrics["metric"] == metric].copy()
    data["label"] = labels(metrics).loc[data.index]
    data = data[data["step"] >= start * data["step"].max()]
    axes_names = [name for name in ([x] if isinstance(x, str) else x) if name in data and data[name].notna().any()]
    figure, panels = plt.subplots(
        1, len(axes_names), figsize=(3.0 * len(axes_names) + 1.4, 2.8), sharey=True, layout="constrained", squeeze=False
    )
    names, colours = _colours(data)
    banded = False
    for axes, name in zip(panels[0], axes_names, strict=True):
        for i, label in enumerate(names):
            # Seeds share their steps but not their times, so every panel averages by step.
            part = data[data["label"] == label].groupby("step")
            at, mean, sd = part[name].mean(), part["value"].mean(), part["value"].std()
            few = {"marker": MARKERS[i % len(MARKERS)]} if len(mean) < 25 else {}
            axes.plot(at, mean, color=colours[i], label=label, **few)
            if sd.notna().any():
                banded = True
                axes.fill_between(at, mean - sd, mean + sd, color=colours[i], alpha=0.2, linewidth=0)
        axes.set_xlabel(AXIS[name])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if name == "tokens":
            axes.xaxis.set_major_formatter(lambda number, _: _count(number))
    panels[0][0].set_ylabel(NAME.get(metric, metric))
    title = _title(data) + (" (mean ± sd of seeds)" if banded else "")
    handles, texts = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", title=title.replace(" (", "\n(") or None, title_fontsize=8)
    return figure


@_styled
def against(runs: pd.DataFrame, key: str, metric: str = "val/loss", log: bool | None = None) -> Figure:
    """Plot the final `metric` of finished runs against one setting: a dot per run and a line through the means over seeds.

    Numbers use a logarithmic axis if they span more than a factor of 5 (`log` overrides this); names are listed vertically, best on top.
    """
    done: Any = runs[(runs["state"] == "finished") & runs[metric].notna() & runs[key].notna()]
    if not pd.api.types.is_numeric_dtype(done[key]):
        return _dots(done, key, metric)
    rest: Any = done.drop(columns=[key])
    names = labels(rest) if distinguishing_columns(rest) else pd.Series("", index=done.index)
    figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
    for i, name in enumerate(dict.fromkeys(names)):
        part = done[names == name]
        mean = part.groupby(key)[metric].mean()
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(mean.index, mean, color=colour, marker=MARKERS[i % len(MARKERS)], label=name or None)
        axes.scatter(part[key], part[metric], s=14, facecolors="none", edgecolors=colour, linewidths=0.8)
        best = mean.idxmin()
        axes.annotate(
            f"{mean.min():.3f} at {best:g}",
            (best, mean.min()),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )
    values = done[key][done[key] > 0]
    if log or (log is None and len(values) == len(done) and values.max() > 5 * values.min()):
        axes.set_xscale("log")
        ticks = _apart(sorted(done[key].unique()))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(y=0.22)
    axes.set(xlabel=key, ylabel=NAME.get(metric, metric))
    if len(set(names)) > 1:
        axes.legend()
    return figure


def _apart(values: list[float], share: float = 0.13) -> list[float]:
    """Those of the rising `values` that stand so far apart on a logarithmic axis (a share of its length) that their labels do not collide."""
    least = share * np.log(values[-1] / values[0])
    kept = values[:1]
    for value in values[1:]:
        if np.log(value / kept[-1]) >= least:
            kept.append(value)
    return kept


def _dots(done: Any, key: str, metric: str) -> Figure:
    means: Any = done.groupby(key)[metric].mean().sort_values(ascending=False)
    figure, axes = plt.subplots(figsize=(4.6, 0.9 + 0.3 * len(means)), layout="constrained")
    for i, (name, mean) in enumerate(means.items()):
        part = done.loc[done[key] == name, metric]
        axes.scatter(part, [i] * len(part), s=16, facecolors="none", edgecolors=COLOURS[0], linewidths=0.8)
        axes.scatter([mean], [i], s=30, color=COLOURS[0], zorder=3)
        axes.annotate(f"{mean:.3f}", (mean, i), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(range(len(means)), list(map(str, means.index)))
    axes.margins(x=0.12)
    axes.set(xlabel=NAME.get(metric, metric), ylabel=key, ylim=(-0.6, len(means) - 0.3))
    return figure


@_styled
def parity(metrics: pd.DataFrame, reference: str = "single", by: str = "strategy") -> Figure:
    """Plot, per step, how far training loss (absolute) and gradient norm (relative) are from those of the run whose `by` is `reference`.

    Steps without any difference are ticks at the lower edge of the logarithmic axis. The dashed line is the tolerance of the project's tests in fp32.
    """
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 2.9), layout="constrained", sharey=True)
    others = [name for name in dict.fromkeys(metrics[by]) if name != reference]
    least, most = 1e-9, TOLERANCE
    for axes, metric in zip(panels, ("train/loss", "train/grad_norm"), strict=True):
        table = metrics[metrics["metric"] == metric].pivot_table(index="step", columns=by, values="value", aggfunc="mean")
        if reference not in table:
            raise ValueError(f"no run has {by}={reference}; there are {', '.join(map(str, table.columns))}")
        for i, name in enumerate(others):
            off = (table[name] - table[reference]).abs()
            if metric == "train/grad_norm":
                off = off / table[reference].abs()
            colour, some, none = COLOURS[i % len(COLOURS)], off[off > 0], off[off == 0]
            axes.plot(some.index, some, color=colour, label=name, linewidth=0.9, marker=MARKERS[i % len(MARKERS)], markersize=2.5)
            # Ticks of different layouts are offset, so that they do not hide each other.
            axes.plot(none.index, [least * 1.6**i] * len(none), color=colour, linestyle="", marker="|", markersize=4)
            most = max(most, off.max())
        axes.axhline(TOLERANCE, color=GREY, linestyle="--", linewidth=1)
        axes.annotate("tolerance 5e-6", (1, TOLERANCE), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                      ha="right", fontsize=8, color=GREY)  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=AXIS["step"])
    panels[0].set_ylim(least / 2, 4 * most)
    panels[0].annotate("no difference", (0.01, 0.012), xycoords="axes fraction", fontsize=7, color=GREY)
    panels[0].set_ylabel(f"|training loss − {reference}'s| (nats)")
    panels[1].set_ylabel(f"|gradient norm / {reference}'s − 1|")
    panels[1].tick_params(labelleft=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", title=by, title_fontsize=8)
    return figure


@_styled
def speed_and_memory(runs: pd.DataFrame, by: str = "layout") -> Figure:
    """Bars per layout: step time and peak memory of rank 0 (resident on a CPU, allocated on a GPU)."""
    done: Any = runs[runs["tokens_per_second"].notna()].copy()
    done["step_ms"] = 1e3 * done["tokens"] / done["step"] / done["tokens_per_second"]
    bars = {"step_ms": "time of a step (ms)", "train/peak_memory_gib": "peak memory of a process (GiB)"}
    bars = {column: text for column, text in bars.items() if column in done and done[column].notna().any()}
    names = list(dict.fromkeys(done[by]))[::-1]
    figure, panels = plt.subplots(
        1, len(bars), figsize=(3.6 * len(bars) + 1, 0.9 + 0.32 * len(names)), sharey=True, layout="constrained", squeeze=False
    )
    for axes, (column, text) in zip(panels[0], bars.items(), strict=True):
        mean = done.groupby(by)[column].mean()
        axes.barh(names, [mean[name] for name in names], color=COLOURS[5], height=0.62)
        for i, name in enumerate(names):
            inside = mean[name] > 0.75 * mean.max()
            axes.annotate(f"{mean[name]:.3g}", (mean[name], i), xytext=(-4 if inside else 4, 0), textcoords="offset points",
                          ha="right" if inside else "left", va="center", fontsize=8)  # fmt: skip
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=text, xlim=(0, None))
    return figure


@_styled
def pipelines(schedules: Sequence[str] = ("gpipe", "1f1b", "interleaved_1f1b"), ranks: int = 4, microbatches: int = 8) -> Figure:
    """Timelines of torch.distributed.pipelining's schedules for one step, assuming equal stages and free communication."""
    from meshformer.runs.timeline import idle_share, play

    figure, panels = plt.subplots(
        len(schedules), 1, figsize=(8.4, (0.27 * ranks + 0.55) * len(schedules) + 0.4), sharex=True, layout="constrained", squeeze=False
    )
    styles = {
        "F": ("forward", COLOURS[5]),
        "B": ("backward", COLOURS[4]),
        "I": ("backward, inputs", "#F0C060"),
        "W": ("backward, weights", COLOURS[2]),
    }
    used: dict[str, Any] = {}
    end = 0.0
    for axes, schedule in zip(panels[:, 0], schedules, strict=True):
        spans = play(schedule, ranks, microbatches)
        end = max(end, *(span.end for span in spans))
        for span in spans:
            word, colour = styles[span.kind]
            second = span.stage >= ranks  # a rank's second stage
            bar = axes.barh(span.rank, span.end - span.start, left=span.start, height=0.86, color=colour, edgecolor="white", linewidth=0.5,
                            alpha=0.6 if second else 1.0)  # fmt: skip
            if not second:
                used.setdefault(word, bar)
            axes.text((span.start + span.end) / 2, span.rank, str(span.microbatch + 1), ha="center", va="center", fontsize=6.5)
        axes.set_title(f"{schedule}: idle {100 * idle_share(spans):.0f} % of the time", loc="left")
        axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axes.invert_yaxis()
        axes.grid(visible=False)
    panels[-1, 0].set(xlabel="time (forward passes of one micro-batch through a rank's layers)", xlim=(0, end))
    figure.legend(list(used.values()), list(used), loc="outside upper right", ncols=len(used))
    return figure


@_styled
def attention(maps_LHTS: Any, tokens: Sequence[str] | None = None) -> Figure:
    """Attention weights of one sequence, (L, H, T, S): one row per layer, one column per head; darker means more weight."""
    maps = np.asarray(maps_LHTS)
    L, H, T, _ = maps.shape
    written = tokens is not None and T <= 40
    size = 1.9 if not written else 2.3
    figure, panels = plt.subplots(
        L, H, figsize=(size * H + 0.9, size * L + 0.3), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    image: Any = None
    for layer in range(L):
        for head in range(H):
            axes = panels[layer, head]
            image = axes.imshow(maps[layer, head] ** 0.5, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"layer {layer + 1}, head {head + 1}")
            axes.grid(visible=False)
            if written:
                texts = [{"\n": "↵", " ": "·"}.get(token, token) for token in tokens or ()]
                axes.set_xticks(range(T), texts, fontsize=5.5)
                axes.set_yticks(range(T), texts, fontsize=5.5)
                axes.tick_params(length=0, pad=1)
    bar = figure.colorbar(image, ax=panels, shrink=0.6, ticks=[0, 0.25**0.5, 0.5**0.5, 1], aspect=30)
    bar.ax.set_yticklabels(["0", "0.25", "0.5", "1"])
    bar.set_label("attention weight (square-root scale)")
    figure.supxlabel("key position", fontsize=9)
    figure.supylabel("query position", fontsize=9)
    return figure


@_styled
def alignment(features_FM: Any, logits_TK: Any, path: Sequence[int], pieces: Sequence[str]) -> Figure:
    """A recording and where its transcript is in it: the log-mel spectrogram (F, M), and below it, token by token, the probabilities of the blank and
    of the likeliest character. `path`: for each token the index of its piece, −1 for a blank (`model.ctc.align`)."""
    features, logits = np.asarray(features_FM), np.asarray(logits_TK, dtype=np.float64)
    p_TK = np.exp(logits - logits.max(axis=1, keepdims=True))
    p_TK /= p_TK.sum(axis=1, keepdims=True)
    seconds = len(features) / 100
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(max(6.5, 2.4 * seconds), 3.8), height_ratios=(3, 1.4), layout="constrained", sharex=True
    )
    top.imshow(features.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, features.shape[1]))
    top.set(ylabel="mel band", title="".join(pieces))
    top.grid(visible=False)
    step = seconds / len(path)
    times = (np.arange(len(path)) + 0.5) * step
    below.fill_between(times, p_TK[:, -1], color="0.85", step="mid", label="blank")
    below.plot(times, p_TK[:, :-1].max(axis=1), color="C0", drawstyle="steps-mid", label="likeliest character")
    for i, piece in enumerate(pieces):
        own = [t for t, place in enumerate(path) if place == i]
        middle = times[own].mean()
        top.axvline(own[0] * step, color="white", linewidth=0.6, alpha=0.7)
        top.text(middle, features.shape[1] * 0.97, {" ": "·"}.get(piece, piece), color="white", ha="center", va="top", fontsize=8)
    below.set(xlabel="seconds", ylabel="probability", ylim=(0, 1.02), xlim=(0, seconds))
    below.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    return figure


@_styled
def encodings(d_model: int = 64, n_heads: int = 4, length: int = 64) -> Figure:
    """Illustrate sinusoidal, rotary and ALiBi positions, computed by the classes of model/position.py."""
    import torch

    from meshformer.model import Alibi, Rotary, Sinusoidal

    sizes: dict[str, Any] = {"d_model": d_model, "n_heads": n_heads, "head_dim": d_model // n_heads, "context_length": length}
    positions_BT = torch.arange(length)[None]
    figure, panels = plt.subplots(1, 4, figsize=(11.5, 2.8), layout="constrained")
    waves_TC = Sinusoidal(**sizes).embed(torch.zeros(1, length, d_model), positions_BT)[0]
    panels[0].imshow(waves_TC.numpy(), aspect="auto", cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    panels[0].set(title="sinusoidal: added to the embedding", xlabel="channel", ylabel="position")
    panels[0].grid(visible=False)
    likeness_TS = waves_TC @ waves_TC.T / (d_model / 2)
    middle = length // 2
    panels[1].plot(torch.arange(length) - middle, likeness_TS[middle], color=COLOURS[0])
    panels[1].set(title="sinusoidal: similarity", xlabel="distance (tokens)", ylabel="cosine of two encodings")
    cos_TD = Rotary(**sizes).tables(positions_BT)[0][0, 0]
    half = cos_TD.shape[1] // 2
    for colour, pair in zip(COLOURS, sorted({0, half // 4, half // 2, half - 1}), strict=False):
        panels[2].plot(cos_TD[:, pair], color=colour, label=f"pair {pair}")
    panels[2].set(title="rotary: a pair's share of the score", xlabel="distance (tokens)", ylabel="cos(distance · θ)", ylim=(-1.1, 1.1))
    panels[2].legend(loc="lower right", frameon=True, framealpha=0.85, edgecolor="none")
    bias = Alibi(**sizes).bias(positions_BT, positions_BT)
    assert bias is not None
    for head in range(n_heads):
        panels[3].plot(bias[0, head, -1].flip(0), color=COLOURS[head % len(COLOURS)], label=f"head {head + 1}")
    panels[3].set(title="ALiBi: added to the score", xlabel="distance (tokens)", ylabel="bias (nats)")
    panels[3].legend()
    return figure


@_styled
def extrapolation(losses: Mapping[str, Any], trained: int) -> Figure:
    """Plot loss by position for {name: result of `loss_by_position`}. Positions right of the dashed line are beyond the trained length.

    Losses are averaged in bins whose width grows with the position.
    """
    figure, axes = plt.subplots(figsize=(6.2, 3.2), layout="constrained")
    longest = max(len(values) for values in losses.values())
    for i, (name, values) in enumerate(losses.items()):
        numbers = np.asarray(values)
        edges = np.unique(np.geomspace(1, longest + 1, 24).astype(int))
        edges = np.append(edges[edges <= len(numbers)], len(numbers) + 1)
        # A bin edge lies at the trained length, so that no bin mixes both sides.
        edges = np.unique(np.append(edges, [trained + 1] if trained < len(numbers) else []))
        middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
        means = [numbers[int(a) - 1 : int(b) - 1].mean() for a, b in itertools.pairwise(edges)]
        axes.plot(middles, means, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=3, label=name)
    axes.axvline(trained + 0.5, color=GREY, linestyle="--", linewidth=1)
    axes.annotate("trained length", (trained + 0.5, 0.99), xycoords=("data", "axes fraction"), xytext=(-3, 0), textcoords="offset points",
                  ha="right", va="top", fontsize=8, color=GREY)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="position in the sequence (tokens)", ylabel=NAME["val/loss"])
    axes.legend(title="position", title_fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@_styled
def scaling(runs: pd.DataFrame, metrics: pd.DataFrame, metric: str = "val/loss") -> Figure:
    """Plot final loss against parameters, and loss during training against compute, each with a fitted power law.

    `runs` needs a column `flops`, the training FLOPs per token (`training_flops`). The compute law is fitted to the `lower_envelope` of all sizes.
    """
    done: Any = runs[(runs["state"] == "finished") & runs[metric].notna()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    sizes = sorted(done["parameters"].unique())
    colours = _gradient(len(sizes))
    mean = done.groupby("parameters")[metric].mean()
    for colour, size in zip(colours, sizes, strict=True):
        part = done[done["parameters"] == size]
        left.scatter(part["parameters"], part[metric], color=colour, s=22, zorder=3)
    _law(left, list(mean.index), list(mean), "N")
    left.set(xlabel="parameters N", ylabel=NAME.get(metric, metric), xscale="log")

    data = metrics[metrics["metric"] == metric].merge(done[["run", "flops", "parameters"]], on="run")
    data["compute"] = data["tokens"] * data["flops"]
    data = data[data["compute"] > 0]
    for colour, size in zip(colours, sizes, strict=True):
        part = data[data["parameters"] == size].groupby("step")[["compute", "value"]].mean()
        right.plot(part["compute"], part["value"], color=colour, marker="o", markersize=2.5, linewidth=1, label=_count(size))
    points = data.groupby(["parameters", "step"])[["compute", "value"]].mean()
    _law(right, *lower_envelope(points["compute"], points["value"]), "C")
    right.set(xlabel="compute C (FLOPs)", xscale="log")
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", title="parameters", title_fontsize=8)
    return figure


def _law(axes: Any, x: list[float], y: list[float], letter: str) -> None:
    if len(set(x)) < 2:
        return
    law = fit_power_law(x, y)
    along = np.geomspace(min(x), max(x), 100)
    axes.plot(along, law(along), color=GREY, linestyle="--", linewidth=1, zorder=1)
    floor = f"{law.floor:.2f} + " if law.floor else ""
    text = rf"$L = {floor}{_power(law.scale)}\,{letter}^{{-{law.exponent:.3f}}}$"
    axes.text(0.97, 0.96, text, transform=axes.transAxes, ha="right", va="top", color=GREY, parse_math=True)


def _power(value: float) -> str:
    if 0.01 <= value < 1000:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return rf"{digits}\cdot 10^{{{int(exponent)}}}"


def _count(number: float) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:g}"


def _colours(data: pd.DataFrame) -> tuple[list[str], Sequence[Any]]:
    """Return the names in legend order and their colours: a gradient if a single number distinguishes them, else separate colours."""
    columns = distinguishing_columns(data)
    if len(columns) == 1 and pd.api.types.is_numeric_dtype(data[columns[0]]):
        names = list(dict.fromkeys(data.sort_values(columns[0])["label"]))
        return names, _gradient(len(names)) if len(names) > 2 else COLOURS
    names = list(dict.fromkeys(data["label"]))
    return names, [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _gradient(count: int) -> list[Any]:
    return [plt.get_cmap("viridis")(0.88 * i / max(1, count - 1)) for i in range(count)]


def _title(data: pd.DataFrame) -> str:
    columns = distinguishing_columns(data)
    return columns[0] if len(columns) == 1 else ""


def sweep_keys(runs: pd.DataFrame) -> list[str]:
    """Return the settings that get a figure each: those that distinguish the finished runs and have at least two values."""
    done: Any = runs[runs["state"] == "finished"]
    return [key for key in distinguishing_columns(done) if done[key].nunique() > 1 and key in setting_columns(done)]


def all_figures(runs: pd.DataFrame, metrics: pd.DataFrame) -> Iterable[tuple[str, Figure]]:
    """Yield (caption, figure) for every figure that the records of these runs allow; `meshformer report` shows them."""
    has = set(metrics["metric"]) if len(metrics) else set()
    if len(runs) == 1:
        if "train/loss" in has:
            yield "Loss, learning rate and speed over the steps.", one_run(metrics)
        return
    if "val/loss" in has:
        yield "Validation loss against steps, tokens and training time.", curves(metrics, "val/loss")
    if "train/loss" in has:
        yield "Training loss, without the first twentieth of the steps.", curves(metrics, "train/loss", start=0.05)
    done: Any = runs[runs["state"] == "finished"]
    if "val/loss" not in runs or done["val/loss"].notna().sum() < 2:
        return
    for key in sweep_keys(runs):
        yield f"Final validation loss against {key}; circles are runs.", against(runs, key)
    if "layout" in runs and done["layout"].nunique() > 1:
        if done["tokens_per_second"].notna().any():
            yield "Time of a step and memory by layout.", speed_and_memory(done)
        same: Any = metrics[metrics["run"].isin(done["run"])]
        if "strategy" in same and "single" in set(same["strategy"]) and distinguishing_columns(same.drop(columns=["strategy"])) == []:
            yield "How far each layout is from one process.", parity(same)
