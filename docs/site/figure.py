"""The figure of the README and the start page: `python docs/site/figure.py [FOLDER]`. Trains one small model in five layouts, a minute in all."""

from __future__ import annotations

import sys
from pathlib import Path

from meshformer.bench.examples import LAYOUTS, example_runs
from meshformer.runs import figures, load_metrics

STEPS, SMOOTHED = 200, 10

def draw(runs: Path, folder: Path) -> None:
    """layouts.svg: the training loss of each layout, and how far it is from one process's."""
    import matplotlib.pyplot as plt

    metrics = load_metrics(runs)
    loss = metrics[metrics["metric"] == "train/loss"].pivot_table(index="step", columns="strategy", values="value")
    with plt.rc_context(figures.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9), layout="constrained")
        for i, name in enumerate(LAYOUTS):
            colour = figures.COLOURS[i]
            # Each of the coinciding lines is narrower than the one below it, so that all can be seen.
            smooth = loss[name].rolling(SMOOTHED, min_periods=1).mean()
            left.plot(smooth.index, smooth, color=colour, label=f"strategy={name}", linewidth=9 - 1.9 * i, solid_capstyle="butt")
            if name != "single":
                off = (loss[name] - loss["single"]).abs().cummax()
                right.plot(off.index[off > 0], off[off > 0], color=colour, linewidth=6 - 1.2 * i, drawstyle="steps-post")
        left.set(xlabel="optimizer steps", ylabel=f"training loss (nats, mean of {SMOOTHED} steps)", title="The same loss in five layouts")
        left.legend(fontsize=8)
        right.axhline(figures.TOLERANCE, color=figures.GREY, linestyle="--", linewidth=1)
        right.annotate("5e-6: what the tests allow", (loss.index[-1], figures.TOLERANCE), xytext=(0, 4), textcoords="offset points",
                       ha="right", fontsize=8, color=figures.GREY)  # fmt: skip
        right.set(xlabel="optimizer steps", yscale="log", ylim=(5e-8, 2e-5), title="Largest difference from one process so far (nats)")
        right.set_yticks([10.0**n for n in range(-7, -4)], [f"1e{n}" for n in range(-7, -4)])
    plt.close(figure)
    plt.rcParams["svg.hashsalt"] = "layouts"  # the same file from the same runs
    figures.save(figure, folder / "layouts", ("svg",))


if __name__ == "__main__":
    draw(example_runs("layouts", STEPS), Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "figures")
