"""`meshformer profile run=RUN`: where the time of recorded steps went, and which setting to change."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from meshformer.config.errors import ConfigError
from meshformer.config.suggest import did_you_mean
from meshformer.printing import argument, say
from meshformer.profile.parts import FOLDER
from meshformer.record import RunNotFound, find_run
from meshformer.runs.profile import recorded
from meshformer.runs.table import text_table

OPTIONS = ("run", "paths.runs")
WIDTH = 118


def profile(argv: Sequence[str]) -> int:
    """Print the table and the sentences about a run; return the exit code."""
    options = {"paths.runs": "runs"}
    for word in argv:
        key, sign, value = word.partition("=")
        if not sign or key not in OPTIONS:
            fix = did_you_mean(key, OPTIONS) if sign else f"Did you mean {argument('run', key)}?"
            raise ConfigError("`meshformer profile` takes no such setting", key, value or None, fix=fix)
        options[key] = value
    if "run" not in options:
        raise ConfigError("no run is named", fix="Write run=last, or another run.")
    try:
        run = find_run(options["run"], options["paths.runs"])
    except RunNotFound as error:
        raise ConfigError(str(error)) from None
    found = recorded(run)
    if found is None:
        fix = "Train with callbacks.profile.steps=[20,24], say."
        raise ConfigError("no steps of this run were recorded", "run", options["run"], fix=fix)
    first, last = found.steps[0], found.steps[-1]
    steps = f"steps {first} to {last}" if last > first else f"step {first}"
    say(f"{run}: milliseconds of a step, the mean of {steps}", one_line=True)
    say("\n" + text_table(found.rows, found.columns) + "\n")
    for sentence in found.told:
        say(textwrap.fill(sentence, WIDTH, break_on_hyphens=False, break_long_words=False, subsequent_indent="  "))
    say(f"traces (for ui.perfetto.dev), tables and pictures: {run / FOLDER}", one_line=True)
    return 0
