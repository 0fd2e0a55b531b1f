# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first look at a run
# Loss, learning rate and speed of one run, from the `metrics.csv` in its folder. Set `RUN` to a run folder, the end of its name, or `last`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from meshformer.record import RunNotFound, find_run, read_run

ROOT = Path.cwd() if (Path.cwd() / "runs").is_dir() else Path.cwd().parent
RUNS = Path(os.environ.get("MESHFORMER_RUNS", ROOT / "runs"))
RUN = os.environ.get("MESHFORMER_RUN", "last")
try:
    run = find_run(RUN, RUNS)
except RunNotFound:  # nothing trained yet: a minute of training gives something to look at
    from meshformer.cli import main

    assert main(["train", f"paths.runs={RUNS}", "trainer.max_steps=60", "trainer.log_every_n_steps=5", "trainer.val_check_interval=30"]) == 0
    run = find_run("last", RUNS)
record = read_run(run)
print(run)
print(f"{record['state']}, {record['parameters']:,} parameters, commit {(record['git'] or {}).get('commit', 'unknown')[:10]}")

# %%
rows = pd.read_csv(run / "metrics.csv", index_col="step")
rows.tail()

# %% [markdown]
# One figure, one message a panel: where the loss is, how the learning rate moved, and whether the speed was steady.

# %%
TRAIN, VAL = "#4477aa", "#ee6677"  # Paul Tol's bright palette: told apart by colour-blind readers and in grey
fig, (loss, rate, speed) = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=[2, 1, 1], layout="constrained")
loss.plot(rows.index, rows["train/loss"], color=TRAIN, linewidth=1, label="training")
val = rows["val/loss"].dropna()
loss.plot(val.index, val, color=VAL, marker="o", markersize=4, label="validation")
loss.annotate(f"{val.iloc[-1]:.3f}", (val.index[-1], val.iloc[-1]), xytext=(-4, 10), textcoords="offset points", ha="right", color=VAL)
loss.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=run.parent.name)
loss.legend(frameon=False)
rate.plot(rows.index, rows["train/lr"], color=TRAIN)
rate.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
speed.plot(rows.index, rows["train/tokens_per_second"] / 1000, color=TRAIN, linewidth=1)
speed.set(xlabel="optimizer step", ylabel="thousand tokens a second", ylim=(0, None))
for axes in (loss, rate, speed):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
target = os.environ.get("MESHFORMER_FIGURE")
if target:
    fig.savefig(target, dpi=130)
plt.show()
