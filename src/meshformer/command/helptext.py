"""The text of --help. It reads conf/ as plain files, so that it needs neither Hydra nor a composition."""

from __future__ import annotations

import textwrap
from pathlib import Path

WIDTH = 118

# Command -> (its arguments, what it does).
COMMANDS = {
    "plan": ("[OVERRIDES] cluster=NAME", "which layout to choose: step time, memory and the override to type"),
    "train": ("[OVERRIDES]", "train a model; prints the run folder"),
    "evaluate": ("run=RUN [OVERRIDES]", "loss, perplexity and bits per byte on a part of the data"),
    "generate": ("run=RUN prompt=TEXT", "continue a text, or turn recordings into text (audio=FILE)"),
    "convert": ("run=RUN to=FORMAT", "a checkpoint as one file, as weights for other programs, or as a folder again; data as TFRecord"),
    "export": ("run=RUN format=FORMAT", "the model for other programs: a Hugging Face folder, safetensors, ONNX, torch.export, LiteRT"),
    "runs": ("[FOLDER] [FILTERS]", "a table of runs; `runs show RUN` and `runs diff A B` show settings"),
    "profile": ("run=RUN", "where the time of recorded steps went, and which setting to change"),
    "report": ("RUN|FOLDER", "figures, results and settings as one HTML file"),
    "doctor": ("", "what this machine can run, measured, and a short test of several processes"),
}
# Word in those arguments -> what it stands for.
WORDS = {
    "RUN": "RUN is a run folder, the end of its name, or `last`; where weights are read, a checkpoint RUN/checkpoints/step-… too.",
    "OVERRIDES": "An override is group=option or key=value.",
}

EXAMPLES = {
    "train": """\
Examples
  meshformer train                                          the default recipe
  meshformer train model=micro trainer.max_steps=5000
  meshformer train data=text data.files='texts/*.txt' data.tokenizer=bpe
  meshformer train strategy=ddp trainer.devices=2           two processes, the same optimisation
  meshformer train -m model/position=learned,rotary,none seed=1,2    a grid, as many runs at a time as fit on the machine
  meshformer train -m sweep=search                          Optuna chooses the points
  meshformer train -m sweep.resume=FOLDER                   what is left of a sweep that was stopped
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
  to=tfrecord       the run's data for TensorFlow: tokens, labelled texts or images (else RUN/exports/tfrecord)
Examples
  meshformer convert run=last to=safetensors
  meshformer convert run=last to=single checkpoint=500 output=step-500.ckpt
  meshformer convert run=step-00000500.ckpt to=sharded""",
    "export": """\
Options: run, format, checkpoint (a step; else the newest), output (else RUN/exports/step-…)
  run also takes weights from outside: a Hugging Face folder, glassllm, all-minilm-l6-v2
  format=huggingface    config.json, model.safetensors, tokenizer.json, where the model fits GPT-2, Llama, Mistral, BERT or ViT exactly
  format=safetensors    the weights alone, with our names
  format=onnx           for onnxruntime and others
  format=torch_export   for torch.export.load
  format=litert         a folder with a .tflite file and a script that runs it; litert.length; `make litert` makes the environment it takes
Examples
  meshformer export run=last format=huggingface output=my-model
  meshformer export run=all-minilm-l6-v2 format=onnx output=minilm.onnx""",
    "runs": """\
Options
  --sort KEY        by any column, --sort=-KEY the largest first; --limit N; --columns A,B,C; --csv
  A filter is key=value, key!=value, 'key<number' or 'key>number'; * and ? in a value match any text. Keys are groups (model, model/position),
  settings (optimizer.lr, or lr alone), state, layout, started, final metrics (val/loss) and the best ones (best/val/loss).
Examples
  meshformer runs                                           every run below runs/, and what tells them apart
  meshformer runs model=nano state=finished 'val/loss<1.7' --sort val/loss
  meshformer runs runs/shakespeare_char 'started>2026-11-24' --columns run,optimizer.lr,val/loss --csv
  meshformer runs show last
  meshformer runs diff 3f0a 81c2""",
    "plan": """\
Options: every setting of train, cluster=NAME, cluster.nodes=N and other cluster.KEY=VALUE
  --why             five sentences on the choice
  --tokens N        time and energy for that many tokens
  --top N           rows of the table; --csv FILE: every candidate; --figure FILE: the parts of a step as bars
  --scale A,B,C     throughput on so many cards, weak and strong; with --figure as curves
  --apply NAME      write the choice as conf/experiment/NAME.yaml
  --quick           do not count the memory of the best layouts, only estimate it
  --measure         measure this machine again (cluster=this)
Examples
  meshformer plan model=small data.batch_size=256 cluster=h100x8 --why
  meshformer plan model=llama3_8b data.context_length=8192 data.batch_size=512 cluster=h100x8 cluster.nodes=8
  meshformer plan model=llama3_8b data.context_length=8192 data.batch_size=512 cluster=h100x8 --scale 8,64,512""",
    "profile": """\
Needs a run trained with callbacks.profile.steps=[FIRST,LAST], which records these steps on every rank.
Examples
  meshformer train strategy=fsdp trainer.devices=2 callbacks.profile.steps=[20,24]
  meshformer profile run=last""",
    "report": """\
Options
  --output FILE     where to write the page; else FOLDER/report.html
Examples
  meshformer report last
  meshformer report runs/shakespeare_char --output sweep.html""",
}

SHOWS = """\
  --cfg job|hydra|all    print the composed configuration; --resolve fills in its references, --package KEY prints a part
  --info [defaults|...]  print how it was composed
  --config-dir FOLDER    a folder of your own with further options"""
FLAGS = f"""\
Flags
{SHOWS}
  --config-name NAME     another file than train.yaml
  --dry-run              check, print layout, sizes, steps and the run folder, and write nothing
  -m, --multirun         try every combination of comma-separated values
  -sc install=bash       print the shell completion: eval "$(meshformer -sc install=bash)"
HYDRA_FULL_ERROR=1 shows stack traces. Keys: meshformer train --cfg job."""


def overview() -> str:
    """Return what `meshformer --help` prints: each command in a line, an example, and where to read on."""
    width = max(map(len, COMMANDS))
    lines = ["meshformer: train a Transformer on real text, every setting an override.", ""]
    lines += [f"  meshformer {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    lines.append("Example: meshformer train strategy=ddp trainer.devices=2 optimizer.lr=0.02")
    lines.append("Settings: meshformer COMMAND --help. Guides: docs/ of the checkout, as a site after `make docs`.")
    return "\n".join(lines)


def help_of(command: str, config_dir: str | None = None) -> str:
    """Return what `meshformer COMMAND --help` prints; the options in `config_dir`, the user's own folder, are listed with ours.

    Raises ConfigError if that folder does not exist.
    """
    arguments, purpose = COMMANDS[command]
    parts = [f"meshformer {command} {arguments}".rstrip() + f"\n  {purpose}"]
    if command == "train":
        parts.append(_groups(config_dir))
    if command in EXAMPLES:
        parts.append(EXAMPLES[command])
    parts += ["\n".join(meaning for word, meaning in WORDS.items() if word in arguments)]
    if command == "train":
        parts.append(FLAGS)
    elif command in ("evaluate", "generate"):
        parts.append(f"Flags\n{SHOWS}")
    return "\n\n".join(filter(None, parts))


def _groups(config_dir: str | None) -> str:
    from meshformer.config.errors import ConfigError
    from meshformer.config.paths import conf_dir

    roots = [conf_dir()]
    if config_dir is not None:
        roots.append(Path(config_dir))
        if not roots[1].is_dir():
            raise ConfigError("there is no such folder", "--config-dir", config_dir)
    options: dict[str, dict[str, Path]] = {}
    for root in roots:
        for file in sorted(root.rglob("*.yaml")):
            group = file.parent.relative_to(root).as_posix()
            if group != "." and group.partition("/")[0] != "hydra":
                options.setdefault(group, {})[file.stem] = file  # the user's file of the same name is the one that is read
    lines = ["Groups (group=option)"]
    for group in sorted(options):
        lines.append(f"  {group}")
        for name, file in options[group].items():
            yours = "(yours) " if file.is_relative_to(roots[-1]) and len(roots) > 1 else ""
            line = f"    {name:<22} {yours}{_purpose(file)}".rstrip()
            lines.append(textwrap.fill(line, WIDTH, subsequent_indent=" " * 27))
    return "\n".join(lines)


def _purpose(option: Path) -> str:
    """Return the comment at the top of a YAML file, without its leading `Pick it`."""
    comments = [line[1:].strip() for line in option.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = next((line for line in comments if not line.startswith("@package")), "")
    return text.removeprefix("Pick it ")
