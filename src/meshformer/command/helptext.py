"""The text of --help, read off conf/ as plain files: answering it takes neither Hydra nor a composition."""

from __future__ import annotations

import textwrap
from pathlib import Path

WIDTH = 118

COMMANDS = """\
meshformer: train a Transformer on real text, every setting an override.

  meshformer train [OVERRIDES]                  train; prints the run folder
  meshformer evaluate run=RUN [OVERRIDES]       loss, perplexity and bits per byte on a part of the data
  meshformer generate run=RUN prompt=TEXT       continue a text
  meshformer convert run=RUN to=FORMAT          a checkpoint as one file, as weights for other programs, or as a folder again
  meshformer doctor                             what this machine can run, measured, and a short test of several processes

RUN is a run folder, the end of its name, or `last`; where weights are read, a checkpoint RUN/checkpoints/step-… too.
An override is group=option or key=value."""

EXAMPLES = {
    "train": """\
Examples
  meshformer train                                          the default recipe
  meshformer train model=micro trainer.max_steps=5000
  meshformer train data=text data.files='texts/*.txt' data.tokenizer=bpe
  meshformer train strategy=ddp trainer.devices=2           two processes, the same optimisation
  meshformer train -m model/position=learned,rotary,none    one run after another
  meshformer train resume=last trainer.max_steps=4000       go on where a run stopped
  meshformer train experiment=kjv_finetune stage.init_from=last""",
    "evaluate": """\
Examples
  meshformer evaluate run=last
  meshformer evaluate run=last split=test
  meshformer evaluate run=last data=kjv trainer.precision=32-true""",
    "generate": """\
Options: run, prompt, max_tokens, temperature, top_k, top_p, seed, count
Examples
  meshformer generate run=last prompt='ROMEO: '
  meshformer generate run=last temperature=0.5 top_k=20 max_tokens=1000 count=3""",
    "convert": """\
Options: run, to, checkpoint (a step; else the newest), output (else RUN/exports/step-…)
  to=single         one .ckpt file with everything; in RUN/checkpoints/ it is read like the folders there
  to=safetensors    the weights alone
  to=sharded        a checkpoint folder, of a .ckpt file or of another folder
Examples
  meshformer convert run=last to=safetensors
  meshformer convert run=last to=single checkpoint=500 output=step-500.ckpt
  meshformer convert run=step-00000500.ckpt to=sharded""",
}

FLAGS = """\
Flags
  --cfg job|hydra|all    print the composed configuration; --resolve fills in its references, --package KEY prints a part
  --info [defaults|...]  print how it was composed
  -m, --multirun         try every combination of comma-separated values
  --config-dir FOLDER    a folder of your own with further options
  --config-name NAME     another file than train.yaml
  -sc install=bash       print the shell completion: eval "$(meshformer -sc install=bash)"
HYDRA_FULL_ERROR=1 shows stack traces. Keys: meshformer train --cfg job."""


def overview(command: str | None = None) -> str:
    """Commands, groups with their options, examples; for one command, each option with its own line."""
    parts = [COMMANDS]
    if command in (None, "train"):
        parts.append(_groups(described=command is not None))
    parts += [EXAMPLES[command]] if command else list(EXAMPLES.values())
    parts.append(FLAGS)
    return "\n\n".join(parts)


def _groups(described: bool) -> str:
    from meshformer.config.paths import conf_dir

    conf = conf_dir()
    lines = ["Groups (group=option)"]
    for folder in sorted(path for path in conf.rglob("*") if path.is_dir() and path.relative_to(conf).parts[0] != "hydra"):
        options = sorted(folder.glob("*.yaml"))
        group = folder.relative_to(conf).as_posix()
        if not described:
            line = f"  {group:<18} {', '.join(option.stem for option in options)}"
            lines.append(textwrap.fill(line, WIDTH, subsequent_indent=" " * 21))
            continue
        lines.append(f"  {group}")
        for option in options:
            line = f"    {option.stem:<22} {_purpose(option)}"
            lines.append(textwrap.fill(line, WIDTH, subsequent_indent=" " * 27))
    return "\n".join(lines)


def _purpose(option: Path) -> str:
    """The comment on top of a file, without `Pick it`."""
    comments = [line[1:].strip() for line in option.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = next((line for line in comments if not line.startswith("@package")), "")
    return text.removeprefix("Pick it ")
