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
# # Attention and positions
# Where a trained model looks, what the positional encodings are, and which of them survive a longer text than they were trained on.
# `MESHFORMER_RUNS` is a folder of runs that differ in `model/position`. Without one, small runs are trained first.

# %% tags=["parameters"]
import os

RUNS = os.environ.get("MESHFORMER_RUNS")
LOOK_AT = 0  # which of the runs the attention maps are of
TEXT = "ROMEO: But soft, what light"
TIMES_LONGER = 8  # how far beyond the trained length to measure

# %%
import torch

from meshformer.runs import attention_maps, figures, load_model, load_runs, loss_by_position

if RUNS is None:
    from meshformer.bench.examples import example_runs

    RUNS = example_runs("attention")
runs = load_runs(RUNS)
if "model/position" not in runs:  # one kind alone
    runs["model/position"] = runs["run"]
runs[["run", "state", "model/position", "val/loss"]]

# %% [markdown]
# `load_model` gives the LightningModule with its weights and tokenizer, from any layout. The maps are taken where the model calls its kernel.

# %%
task = load_model(runs["folder"].iloc[LOOK_AT])
ids = list(map(int, task.tokenizer.encode(TEXT)))[: task.model.context_length]
maps_LBHTS = attention_maps(task.model, torch.tensor([ids]))
figures.attention(maps_LBHTS[:, 0], [task.tokenizer.decode([i]) for i in ids])

# %%
figures.encodings()

# %% [markdown]
# Loss at each position of texts longer than any in training. A learned table ends with the trained length.

# %%
trained = int(runs["context_length"].max())
losses = {row["model/position"]: loss_by_position(row["folder"], TIMES_LONGER * trained, windows=128) for _, row in runs.iterrows()}
figures.extrapolation(losses, trained)

# %%
figures.against(runs, "model/position") if len(runs) > 1 else None
