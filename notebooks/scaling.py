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
# # Scaling
# Loss against parameters, and against compute along the training of each size, with a power law through both (Kaplan et al. 2020).
# `MESHFORMER_RUNS` is a folder of runs of several sizes. Without one, three tiny sizes are trained first: enough to run this page, not to
# predict anything.

# %% tags=["parameters"]
import os

RUNS = os.environ.get("MESHFORMER_RUNS")
METRIC = "val/loss"

# %%
from meshformer.runs import figures, load_metrics, load_runs, training_flops
from meshformer.runs.fits import fit_power_law

if RUNS is None:
    from meshformer.bench.examples import example_runs

    RUNS = example_runs("scaling")
runs = load_runs(RUNS)
runs["flops"] = [training_flops(folder) for folder in runs["folder"]]  # of training on one token
metrics = load_metrics(runs)
runs[["run", "parameters", "flops", "tokens", METRIC]].sort_values("parameters")

# %%
figures.scaling(runs, metrics, METRIC)

# %% [markdown]
# The law alone. With six sizes or more it has a floor, the loss that no size goes below; fewer cannot tell it from the exponent.

# %%
done = runs[runs["state"] == "finished"]
law = fit_power_law(list(done["parameters"]), list(done[METRIC]))
print(f"L(N) = {law}, root mean square of the residual in log L: {law.residual:.2g}")
