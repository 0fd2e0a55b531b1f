# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     notebook_metadata_filter: jupytext,kernelspec,-jupytext.text_representation.jupytext_version,-jupytext.text_representation.format_version
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Layouts
# The same training in several parallel layouts: how far their losses differ, what a step costs, and why a pipeline waits.
# `MESHFORMER_RUNS` is a folder of runs that differ in `strategy` alone, `single` among them. Without one, small runs are trained first.

# %% tags=["parameters"]
import os

RUNS = os.environ.get("MESHFORMER_RUNS")
RANKS, MICROBATCHES = 4, 8  # of the pipelines drawn below

# %%
from meshformer.runs import figures, load_metrics, load_runs

if RUNS is None:
    from meshformer.bench.examples import example_runs

    RUNS = example_runs("layouts")
runs = load_runs(RUNS)
metrics = load_metrics(runs)
runs[["run", "layout", "processes", "train/loss", "val/loss", "tokens_per_second"]]

# %% [markdown]
# Every layout against one process, step for step, on a logarithmic axis. In fp32 with plain SGD the differences are those of another order of
# additions; a mistake in the scale of a gradient would lift a line by orders of magnitude.

# %%
figures.parity(metrics)

# %% [markdown]
# At this size communication costs more than it saves: a layout is chosen for what fits, or for sizes at which it pays. On a CPU the memory is
# that of the whole process, libraries included.

# %%
figures.speed_and_memory(runs)

# %% [markdown]
# Where a step's time goes on each rank, in the runs that recorded some steps (`callbacks.profile.steps`), and one step of the real pipeline.

# %%
from pathlib import Path

from IPython.display import SVG, Markdown, display

from meshformer.profile.figure import pictures

for run, folder in zip(runs["run"], runs["folder"], strict=True):
    profile = Path(folder) / "profile"
    for name, svg in pictures(profile).items() if (profile / "parts.csv").is_file() else ():
        if name != "memory":
            display(Markdown(f"**{run}**"), SVG(svg))

# %% [markdown]
# What the pipeline schedules do when stages cost the same and communication is free. `python -m meshformer.bench pipeline` measures the idle
# share on two real ranks beside this theory.

# %%
figures.pipelines(("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble"), RANKS, MICROBATCHES)
