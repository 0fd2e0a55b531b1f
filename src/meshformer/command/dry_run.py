"""`meshformer train … --dry-run`: say what a checked run would be, and write nothing. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshformer.checkpoint.find import candidates, step_of
from meshformer.command.folders import check_unused
from meshformer.command.plan import STATE_BYTES, count_text, optimizer_name
from meshformer.config import ConfigError
from meshformer.config.degrees import AXES, Degrees
from meshformer.plan.answer import gigabytes
from meshformer.plan.candidates import layout_of
from meshformer.plan.memory import estimate
from meshformer.plan.sizes import Sizes, read_sizes
from meshformer.printing import say
from meshformer.record.run_folder import STAMP, experiment_folder

Config = dict[str, Any]
NOTHING = "dry run: checked, nothing was written or started"


def say_run(config: Config, wanted: str, run: Path | None) -> int:
    """Print what the resolved and checked `config` would train, and where; return the exit code.

    `wanted`: hydra.run.dir; `run`: the folder that is resumed, if any.
    Raises ConfigError where the start of the run would refuse the folder.
    """
    trainer, data, size = config["trainer"], config["data"], sizes_of(config)
    rows = {
        "run folder": _folder(config, wanted, run),
        "layout": _layout(config),
        "model": config["model"]["_target_"].rpartition(".")[2] + (f", about {_rounded(size.parameters)} parameters" if size else ""),
        "data": str(data["source"].get("_target_", data["kind"])).rpartition(".")[2],
        "step": _step(config),
        "steps": _steps(config),
        "computes in": f"{trainer['precision']} on {trainer['accelerator']}, {'' if trainer['compile'] else 'not '}compiled, "
        f"{_plural(trainer['threads'], 'thread')} a process",
        "memory": _memory(config, size),
    }
    say("\n".join(f"{name:<12} {text}" for name, text in rows.items() if text))
    say(NOTHING)
    return 0


def say_sweep(folder: Path, runs: Sequence[tuple[Sequence[str], str | None]], search: str | None, trials: int, jobs: Mapping[int, Any]) -> None:
    """Print the runs of a sweep: the overrides and the error, if any, of each; or, for a `search`, how many runs it may choose."""
    say(f"sweep folder {folder}")
    if search is not None:
        say(f"a search by {search}, at most {_plural(trials, 'run')}, whose settings it chooses one after another")
    else:
        refused = len(runs) - len(jobs)
        say(f"{_plural(len(runs), 'run')}{f', {refused} of them refused' if refused else ''}")
    for number, (overrides, error) in enumerate(runs):
        say(f"  {number}  {' '.join(overrides)}{f'  refused: {error}' if error else ''}")
    say(NOTHING)


def sizes_of(config: Config) -> Sizes | None:
    """The sizes of the model, or None where its class does not declare them or it reads no text."""
    try:
        return read_sizes(config) if config["data"]["kind"] != "images" else None
    except ConfigError:
        return None


def _folder(config: Config, wanted: str, run: Path | None) -> str:
    if run is not None:
        return f"{run}, which goes on from step {max(step_of(one) for one in candidates(run)):,}"
    if wanted != "auto":
        folder = Path(wanted).absolute()
        check_unused(folder)
        return str(folder)
    try:
        parent = experiment_folder(config["paths"]["runs"], config["experiment"])
    except ValueError as error:
        raise ConfigError(str(error), "experiment", config["experiment"]) from None
    stamp = STAMP.replace("%Y", "YYYY").replace("%m", "MM").replace("%d", "DD").replace("%H", "hh").replace("%M", "mm").replace("%S", "ss")
    return f"{parent.absolute()}/{stamp}-…"


def _layout(config: Config) -> str:
    strategy, trainer = config["strategy"], config["trainer"]
    number = trainer["devices"] * trainer["num_nodes"]
    where = _plural(number, "process") + (f" on {trainer['num_nodes']} nodes" if trainer["num_nodes"] > 1 else "")
    if strategy["name"] == "single":
        return f"single, {where}"
    axes = {axis: strategy[axis] for axis in AXES if strategy.get(axis, 1) > 1}
    return f"{strategy['name']}, {where}: {' × '.join(f'{axis} {degree}' for axis, degree in axes.items()) or 'nothing is split'}"


def _step(config: Config) -> str:
    trainer, data = config["trainer"], config["data"]
    samples = data["batch_size"]
    local = samples // (Degrees.from_config(config["strategy"]).data * trainer["accumulate_grad_batches"])
    text = f"{_plural(samples, 'sample')}"
    if data["kind"] == "corpus":
        text += f" of {data['context_length']:,} tokens = {samples * data['context_length']:,} tokens"
    elif data["kind"] == "texts":
        text += f" of at most {data['context_length']:,} tokens"
    micro = f"; {trainer['accumulate_grad_batches']} micro-batches of {local:,} a process" if trainer["accumulate_grad_batches"] > 1 else ""
    return text + (micro or f"; {local:,} a process")


def _steps(config: Config) -> str:
    trainer, data = config["trainer"], config["data"]
    if trainer["max_steps"] is None:
        return _plural(trainer["max_epochs"], "epoch")
    text = f"{trainer['max_steps']:,}" + (f", or {_plural(trainer['max_epochs'], 'epoch')}" if trainer["max_epochs"] is not None else "")
    if data["kind"] == "corpus":
        text += f", {count_text(trainer['max_steps'] * data['batch_size'] * data['context_length'])} tokens in all"
    return text


def _memory(config: Config, size: Sizes | None) -> str:
    """What `meshformer plan` estimates for a process. Empty for what it does not know: other models, LoRA, frozen weights."""
    stage = config["stage"]
    if size is None or (stage.get("lora") or {}).get("rank") or stage.get("freeze"):
        return ""
    checkpointing = config["strategy"].get("activation_checkpointing", "none")
    mixed = config["trainer"]["precision"].startswith("bf16")
    found = estimate(size, layout_of(config), checkpointing, STATE_BYTES.get(optimizer_name(config), 8.0), mixed)
    return f"about {gigabytes(found.total)} a process at its peak, estimated"


def _rounded(number: int) -> str:
    return f"{number / 1e6:.2g} million" if 1e5 <= number < 1e6 else count_text(number)


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 'es' if word.endswith('s') else 's'}"
