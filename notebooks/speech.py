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
# # Speech recognition
# What a run heard, where in a recording it heard each character, and which characters it takes for others.
# `MESHFORMER_RUNS` is a folder of runs, such as `runs/speech_prompts`. Without one, a small run is trained first, on tones that stand for letters.

# %% tags=["parameters"]
import os

RUNS = os.environ.get("MESHFORMER_RUNS")
LOOK_AT = 0  # which of the runs
RECORDINGS = 60  # how many of the validation recordings to transcribe

# %%
import pandas as pd

from meshformer.model.ctc import align
from meshformer.runs import confusions, figures, load_metrics, load_runs, transcripts

if RUNS is None:
    from meshformer.bench.examples import example_runs

    RUNS = example_runs("speech")
runs = load_runs(RUNS)
runs[["run", "state", "val/loss", "val/cer", "val/wer"]]

# %% [markdown]
# Error rates while training: substitutions, insertions and deletions, divided by what was said.

# %%
figures.curves(load_metrics(RUNS), metric="val/cer")

# %% [markdown]
# What was said beside what was heard, the worst first.

# %%
heard = transcripts(runs["folder"].iloc[LOOK_AT], count=RECORDINGS)
table = pd.DataFrame([{"recording": one.name, "said": one.said, "heard": one.heard, "wrong": round(one.wrong, 2)} for one in heard])
table.sort_values("wrong", ascending=False).head(12)

# %% [markdown]
# A recording's log-mel spectrogram, and the likeliest alignment of its transcript: CTC puts a blank (grey) wherever no new character begins.

# %%
clip = max(heard, key=lambda one: len(one.said) if len(one.features_FM) < 500 else 0)
figures.alignment(clip.features_FM, clip.logits_TK, align(clip.logits_TK, clip.ids), clip.pieces)

# %% [markdown]
# The stretches that differ most often; an empty cell is a character left out or added.

# %%
pd.DataFrame([(said, found, count) for (said, found), count in confusions(heard).most_common(12)], columns=["said", "heard", "times"])
