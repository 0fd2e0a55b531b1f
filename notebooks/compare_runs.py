# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Comparing runs
# Loss curves over seeds, a setting against the loss, and the table of results, of any folder of runs: `MESHFORMER_RUNS=runs/my_sweep`, or
# write the path below. Without one, small runs are trained first (a minute).

# %% tags=["parameters"]
import os

RUNS = os.environ.get("MESHFORMER_RUNS")  # a folder that holds runs, however deep
KEY = os.environ.get("MESHFORMER_KEY", "optimizer.lr")  # the setting to draw the loss against
METRIC = "val/loss"

# %%
from meshformer.runs import compare, figures, load_metrics, load_runs

if RUNS is None:
    from meshformer.bench.examples import example_runs

    RUNS = example_runs("compare")
runs = load_runs(RUNS)
metrics = load_metrics(runs)
runs[["run", "state", *[key for key in [KEY, "seed"] if key in runs], "step", METRIC, f"best/{METRIC}", "tokens_per_second"]]

# %% [markdown]
# Lines are means over the seeds, bands one standard deviation. Time is that of the training steps alone.

# %%
loss_curves = figures.curves(metrics, METRIC)
loss_curves

# %%
figures.against(runs, KEY, METRIC) if KEY in runs else f"{KEY} is the same in all runs"

# %% [markdown]
# Best first; ± is the deviation over seeds.

# %%
results = compare(runs, METRIC)
results.style.format(precision=4, thousands=",")

# %% [markdown]
# For a paper: vector files, and the table.

# %%
figures.save(loss_curves, "figures_out/loss_curves", ("pdf", "svg"))
print(results.to_latex(index=False, float_format="%.4g"))
