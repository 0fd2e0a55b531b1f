"""`meshformer plan`: predict every layout of a training configuration on a cluster, and say which one to choose."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from meshformer.command import compose
from meshformer.command.explain import explain_errors
from meshformer.config import ConfigError, validate
from meshformer.config.degrees import AXES
from meshformer.config.resolve import cores, resolve
from meshformer.config.signature import attribute
from meshformer.model import check as model_check
from meshformer.parallel.compilation import VARIED
from meshformer.plan.answer import NAMED, best_of_each, budget, degrees_text, duration, gigabytes, mfu, overrides, remedies, throughput, why
from meshformer.plan.candidates import SPARE, Candidate, Request, candidates
from meshformer.plan.cluster import Cluster, read_cluster
from meshformer.plan.counted import count_all
from meshformer.plan.scale import fastest, pays_up_to, read_counts, scaled
from meshformer.plan.sizes import read_sizes
from meshformer.plan.steptime import Constants, constants
from meshformer.printing import csv_cell, say
from meshformer.record import atomic_write_text

Config = dict[str, Any]
ROWS = 10  # in the table that is printed
COUNTED, MOST_COUNTED = 5, 15  # layouts whose memory is counted at once, and in all
# Bytes of fp32 optimizer state per parameter: AdamW has two moments, SGD and Muon one. (Muon's AdamW part, for embeddings and norms, has two.)
STATE_BYTES = {"adamw": 8.0, "muon": 4.0, "sgd": 4.0}
FIXABLE = ("activation_checkpointing", "schedule", "stages_per_rank", "sequence_parallel", "loss_parallel")
FEW = 256  # tokens of a card and step below which nobody trains on such a cluster
THIS = "this"
EXPERIMENT = re.compile(r"[A-Za-z][\w-]*")


def run_plan(argv: Sequence[str]) -> int:
    """Print the table, the memory of the best layouts, and the override to type; return the exit code."""
    flags, typed = _parse(argv)
    _check_outputs(flags)
    _, train = separated(typed)
    request = request_of(typed, flags.config_dir, flags.measure)
    if flags.scale:
        return _scale(flags, request)
    found = candidates(request)
    fitting = [candidate for candidate in found if candidate.fits]
    say(_heading(request, found))
    if not fitting:
        raise _impossible(request, found)
    if flags.csv:
        _write_csv(Path(flags.csv), found, request)
    rows = best_of_each(fitting)
    say(_table(rows[: flags.top], request, flags.tokens))
    best = rows[0] if flags.quick else _first_that_fits(rows, request, train, flags.config_dir)
    say("\nType this" + (" on every node:" if request.cluster.nodes > 1 else ":"))
    chosen = [*train, *_types(request, train), *overrides(best, request)]
    say("  meshformer train " + " ".join(chosen))
    if flags.figure:
        _figure(flags.figure, lambda draw, path: draw.draw_steps(rows[: flags.top], request, path))
    if flags.why:
        say("\nWhy")
        say("\n".join(f"  {sentence}" for sentence in why(best, found, request)))
    if flags.apply:
        _apply(flags.apply, chosen)
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="meshformer plan", add_help=False, allow_abbrev=False)

    def refuse(message: str) -> Any:
        raise ConfigError(message, fix="`meshformer plan --help` shows how.")

    parser.error = refuse
    parser.add_argument("--why", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--apply", metavar="NAME")
    parser.add_argument("--csv", metavar="FILE")
    parser.add_argument("--figure", metavar="FILE")
    parser.add_argument("--scale", metavar="CARDS")
    parser.add_argument("--tokens", type=float)
    parser.add_argument("--top", type=int, default=ROWS)
    parser.add_argument("--config-dir")
    parser.add_argument("settings", nargs="*")
    flags = parser.parse_intermixed_args(list(argv))
    if flags.tokens is not None and not flags.tokens > 0:
        raise ConfigError("must be a number of tokens", "--tokens", flags.tokens)
    if flags.top < 1:
        raise ConfigError("must be at least 1", "--top", flags.top)
    return flags, flags.settings


def _check_outputs(flags: argparse.Namespace) -> None:
    """Raise ConfigError, before anything is predicted or written, for an output file that exists already or a name that is invalid."""
    for flag, name in (("--csv", flags.csv), ("--figure", flags.figure)):
        if name is not None and Path(name).exists():
            raise ConfigError("exists already", flag, name, fix="Give another name, or remove it.")
    if flags.figure is not None and Path(flags.figure).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError("must end in .png, .svg or .pdf", "--figure", flags.figure)
    if flags.apply is not None:
        if not EXPERIMENT.fullmatch(flags.apply):
            raise ConfigError("must be a name of letters, digits, - and _", "--apply", flags.apply)
        if (path := _experiment(flags.apply)).exists():
            raise ConfigError(f"{path} exists already", "--apply", flags.apply, fix="Give another name.")


def separated(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the cluster, and those of the training configuration."""
    mine = [o for o in typed if o.lstrip("+~").partition("=")[0].partition(".")[0] == "cluster"]
    return mine, [o for o in typed if o not in mine]


def request_of(typed: Sequence[str], config_dir: str | None = None, measure: bool = False, as_given: bool = False) -> Request:
    """The plan request for a command's overrides. Raises ConfigError for invalid settings.

    `as_given`: keep the configured precision and compilation, as a run does, instead of assuming bf16 and compilation where not typed.
    """
    mine, train = separated(typed)
    for override in train:
        key, _, value = override.lstrip("+").partition("=")
        if key in ("trainer.devices", "trainer.num_nodes"):
            where = "cards" if key == "trainer.devices" else "nodes"
            raise ConfigError("comes from the cluster", key, value, fix=f"Use cluster.{where}={value}.")
    node, fitted = _cluster(compose.plain(_composed(config_dir, "plan", mine)), measure)
    cluster = read_cluster(node)
    asked = [o for o in train if o.lstrip("+") != "strategy=auto"]
    cfg = _composed(config_dir, "train", asked)
    config = validate(compose.plain(cfg))
    sizes = read_sizes(config)
    for problem in model_check.problems(config["model"], attribute):
        raise ConfigError(*problem)
    names = [o.lstrip("+~").partition("=")[0] for o in asked]
    there = _for_cluster(config, cluster, [*names, *(("trainer.precision", "trainer.compile") if as_given else ())])
    precision = "bf16" if there["trainer"]["precision"].startswith("bf16") else "fp32"
    if precision not in cluster.peak:
        fix = f"Give cluster.peak.{precision}=…, or another precision."
        raise ConfigError(f"the cluster has no rate for {precision}", "trainer.precision", there["trainer"]["precision"], fix=fix)
    # Where the command gives the number of cores, every candidate must use that many processes.
    cards = {"cards": cluster.cards} if any(o.lstrip("+").startswith("cluster.cards=") for o in mine) else {}
    state = STATE_BYTES.get(optimizer_name(config), 8.0)
    return Request(there, sizes, cluster, fitted or constants(cluster.card), {**_fixed(config, names), **cards}, state)


def _cluster(composed: Config, again: bool) -> tuple[Config, Constants | None]:
    """The cluster's settings, and its constants if they were measured: for `this` the measured ones, overridden by those of the command."""
    node = {key: value for key, value in composed["cluster"].items() if value is not None}
    if node.get("card") != THIS:
        return node, None
    kept = Path(composed["paths"]["data"]).expanduser() / "cluster-this.json"
    if again or not kept.is_file():
        say("measuring this machine, once, for about half a minute", error=True)
        done = subprocess.run([sys.executable, "-m", "meshformer.plan.measure"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ConfigError(f"this machine could not be measured ({reason})", "cluster", THIS, fix="Name a cluster, such as cluster=h100x8.")
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(kept, done.stdout)
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        fitted = found["constants"]
        return {**found["cluster"], **node, "card": found["cluster"]["card"]}, None if fitted is None else Constants(**fitted)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{kept} is damaged", "cluster", THIS, fix="Measure again: meshformer plan --measure.") from None


AUTO = "strategy=auto"
CHOICE = "plan.json"  # in the run folder: what strategy=auto chose, why, and the predicted step time


def choose(typed: Sequence[str], config_dir: str | None) -> tuple[list[str], Config]:
    """The overrides with the layout that `plan` chooses for this machine in place of strategy=auto, and what to record about it."""
    given = [override for override in typed if override.lstrip("+") != AUTO]
    counts = {"trainer.devices": "cluster.cards", "trainer.num_nodes": "cluster.nodes"}
    where, rest = [], []
    for override in given:
        key, _, value = override.lstrip("+").partition("=")
        if key not in counts:
            rest.append(override)
        elif value != "auto":
            where.append(f"{counts[key]}={value}")
    request = request_of([*rest, *where], config_dir, as_given=True)
    found = candidates(request)
    fitting = best_of_each([candidate for candidate in found if candidate.fits])
    if not fitting:
        raise _impossible(request, found)
    best, reasons = fitting[0], why(fitting[0], found, request)
    chosen = overrides(best, request)
    say(f"strategy=auto: {' '.join(chosen)}; predicted {duration(best.step.total)} a step. {reasons[0]}", error=True)
    record = {
        "layout": degrees_text(best), "overrides": chosen, "cluster": request.cluster.card, "predicted_step_seconds": best.step.total,
        "predicted_memory_bytes": best.memory.total, "parts": asdict(best.step), "why": reasons,
    }  # fmt: skip
    names = {override.partition("=")[0] for override in chosen}
    return [*(o for o in given if o.lstrip("+").partition("=")[0] not in {*names, *counts}), *chosen], record


def _composed(config_dir: str | None, name: str, given: Sequence[str]) -> Any:
    hydra = compose.make_hydra(config_dir)
    with explain_errors(hydra, name, given):
        return compose.compose_config(hydra, name, given)


def optimizer_name(config: Config) -> str:
    return str(config["optimizer"]["_target_"]).rpartition(".")[2].lower()


def _for_cluster(config: Config, cluster: Cluster, names: Sequence[str]) -> Config:
    """The configuration resolved for the cluster: bf16 and compiled blocks where its cards have bf16, unless the command sets them."""
    trainer = dict(config["trainer"])
    if "trainer.precision" not in names or trainer["precision"] == "auto":
        trainer["precision"] = "bf16-mixed" if "bf16" in cluster.peak else "32-true"
    if "trainer.compile" not in names or trainer["compile"] == "auto":
        suited = bool(attribute(config["model"]["_target_"], "one_graph")) and config["data"]["kind"] not in VARIED
        trainer["compile"] = "bf16" in cluster.peak and suited
    trainer |= {"accelerator": "cpu" if cluster.alone else "gpu", "devices": cluster.cards, "num_nodes": cluster.nodes}
    return {**config, "trainer": trainer}


def _first_that_fits(rows: Sequence[Candidate], request: Request, train: Sequence[str], config_dir: str | None) -> Candidate:
    """The first row whose counted memory leaves 10 % of a card free; a few rows are counted at a time."""
    for start in range(0, min(len(rows), MOST_COUNTED), COUNTED):
        best, failed = _counted(rows[start : start + COUNTED], request, train, config_dir)
        if best is not None:
            return best
        if failed:
            say("The memory of these layouts is only estimated; the command below is the first. Please report the reason above.")
            return rows[0]
    say(f"None of them leaves {100 - 100 * SPARE:.0f} % of a card free; the command below is the first that was estimated to.")
    return rows[0]


def _counted(rows: Sequence[Candidate], request: Request, train: Sequence[str], config_dir: str | None) -> tuple[Candidate | None, bool]:
    """Print the memory that is counted for the rows; return the first that leaves 10 % free, or None, and whether none could be counted."""
    say(f"\nMemory of {len(rows)} layouts, counted on the model itself, which takes a minute or two (--quick leaves this out)")
    configs = [(config_of(row, request, train, config_dir), fullest_ranks(row)) for row in rows]
    found = count_all(configs, cores())
    cells: list[tuple[str, ...]] = [("layout", "counted", "weights", "gradients", "optimizer", "activations", "communication", "peak in")]
    fits: list[Candidate] = []
    for row, memory in zip(rows, found, strict=True):
        if isinstance(memory, str):
            cells.append((degrees_text(row), "", "", "", "", "", "", memory))
            continue
        kinds = [gigabytes(memory.kinds.get(kind, 0)) for kind in cells[0][2:7]]
        cells.append((degrees_text(row), gigabytes(memory.peak), *kinds, memory.where))
        if memory.peak <= SPARE * request.cluster.memory:
            fits.append(row)
    failed = all(isinstance(memory, str) for memory in found)
    if failed:
        say("\n".join(dict.fromkeys(memory for memory in found if isinstance(memory, str))))
    else:
        say(_aligned(cells))
    return (fits[0] if fits else None), failed


def config_of(candidate: Candidate, request: Request, train: Sequence[str], config_dir: str | None) -> Config:
    """The resolved configuration of a candidate on the cluster; this machine need not be able to run it.

    Of an accumulation two micro-batches are enough: from the second on, all need the same memory. So are twice as many in a pipeline as it
    has ranks, of which it has fewer in flight; with gpipe all are in flight.
    """
    layout = candidate.layout
    most = layout.microbatches if layout.schedule == "gpipe" else 2 * layout.pipeline
    fewer = replace(layout, accumulation=min(2, layout.accumulation), microbatches=min(layout.microbatches, most))
    candidate = replace(candidate, layout=fewer)
    asked = [o for o in train if o.lstrip("+") != AUTO]
    given = [*asked, *_types(request, asked), *overrides(candidate, request)]
    config = validate(compose.plain(_composed(config_dir, "train", given)))
    config["trainer"] |= {"accelerator": request.config["trainer"]["accelerator"], "threads": 1}
    config["model"]["vocab_size"] = request.sizes.vocabulary
    config["data"]["batch_size"] = fewer.batch
    config = resolve(config)
    config["trainer"]["compile"] = False
    return config


def fullest_ranks(candidate: Candidate) -> list[int]:
    """Of a pipeline the first stage, which has most micro-batches in flight, and the last, which has the head; else any rank."""
    layout = candidate.layout
    return [0] if layout.pipeline == 1 else [0, layout.processes - layout.processes // layout.pipeline]


def _types(request: Request, typed: Sequence[str]) -> list[str]:
    """The precision and compilation that the plan assumes, unless they are typed."""
    trainer = request.config["trainer"]
    assumed = [f"trainer.precision={trainer['precision']}", f"trainer.compile={str(trainer['compile']).lower()}"]
    names = [override.lstrip("+~").partition("=")[0] for override in typed]
    return [override for override in assumed if override.partition("=")[0] not in names]


def _fixed(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """The settings that the user typed, which every candidate keeps."""
    strategy = config["strategy"]
    whole = "strategy" in names
    fixed = {key: strategy[key] for key in (*AXES, *FIXABLE) if (whole and key in AXES) or f"strategy.{key}" in names}
    if "trainer.accumulate_grad_batches" in names:
        fixed["accumulation"] = config["trainer"]["accumulate_grad_batches"]
    if "strategy.reduce_gradients" in names:
        fixed["reduce_every"] = strategy["reduce_gradients"] == "every"
    return {key: value for key, value in fixed.items() if value not in (-1, "auto")}


def _heading(request: Request, found: Sequence[Candidate]) -> str:
    sizes, cluster, data = request.sizes, request.cluster, request.config["data"]
    cards = f"{cluster.processes} × {cluster.card}" + (f" ({cluster.nodes} nodes of {cluster.cards})" if cluster.nodes > 1 else "")
    batch = data["batch_size"]
    fitting = sum(candidate.fits for candidate in found)
    per_card = batch * sizes.length / cluster.processes
    few = f"Only {per_card:,.0f} tokens a card and step: give the data.context_length and data.batch_size of your run.\n" if per_card < FEW else ""
    trainer = request.config["trainer"]
    how = trainer["precision"] + (", compiled" if trainer["compile"] else "")
    return (
        f"{count_text(sizes.parameters)} parameters, {batch:,} samples of {sizes.length:,} tokens a step "
        f"({count_text(batch * sizes.length)} tokens), "
        f"{cards}, {how}\n{few}"
        f"{fitting:,} of {len(found):,} ways to run it fit in {100 * SPARE:.0f} % of a card's {cluster.memory / 1e9:.0f} GB\n"
    )


def count_text(number: float) -> str:
    for limit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= limit:
            return f"{number / limit:.3g} {name}"
    return f"{number:,.0f}"


COLUMNS = ("layout", "micro-batch", "accum.", "checkpointing", "pipeline", "step", "tokens/s", "MFU", "memory", "limited by")


def _row(candidate: Candidate, request: Request, tokens: float | None) -> list[str]:
    layout = candidate.layout
    pipeline = f"{layout.schedule}, {layout.microbatches}" if layout.pipeline > 1 else ""
    row = [
        degrees_text(candidate), str(layout.samples), str(layout.accumulation), candidate.checkpointing, pipeline, duration(candidate.step.total),
        f"{throughput(candidate, request.sizes):,.0f}", f"{100 * mfu(candidate, request.sizes, request.cluster):.0f} %",
        gigabytes(candidate.memory.total), candidate.step.limit,
    ]  # fmt: skip
    if tokens is not None:
        seconds, energy = budget(candidate, request, tokens)
        row += [duration(seconds), f"{energy / 1e6:,.3g} MWh"]
    return row


def _table(rows: Sequence[Candidate], request: Request, tokens: float | None) -> str:
    columns = [*COLUMNS, *((f"{count_text(tokens)} tokens", "energy") if tokens is not None else ())]
    cells = [columns, *(_row(candidate, request, tokens) for candidate in rows)]
    if not any(row[4] for row in cells[1:]):
        cells = [row[:4] + row[5:] for row in cells]
    return _aligned(cells)


def _figure(name: str, draw: Callable[[Any, Path], None]) -> None:
    path = Path(name)
    try:
        from meshformer.plan import figure  # matplotlib takes half a second, and is not always installed
    except ModuleNotFoundError as error:
        raise ConfigError(f"needs {error.name}", "--figure", name, fix="Install it with pip install 'meshformer[notebooks]'.") from None
    draw(figure, path)
    say(f"figure: {path}")


def _scale(flags: argparse.Namespace, request: Request) -> int:
    """Print, for weak and strong scaling, the fastest layout for each number of cards, and the number up to which each kind is efficient."""
    counts = read_counts(flags.scale, request.cluster.cards)
    points = scaled(request, counts)
    for strong in (False, True):
        say("Strong scaling: the batch stays" if strong else "Weak scaling: the batch grows with the cards")
        first = next((best for count in counts if (best := fastest(points, count, strong)) is not None), None)
        rows = [("cards", "samples", "layout", "tokens/s", "efficiency", "limited by")]
        for count in counts:
            best = fastest(points, count, strong)
            if best is None or first is None:
                rows.append((f"{count:,}", "", "none fits", "", "", ""))
                continue
            rate = best.tokens_per_second / best.cards / (first.tokens_per_second / first.cards)
            tokens = f"{request.sizes.length * best.tokens_per_second:,.0f}"
            samples = f"{best.candidate.layout.batch:,}"
            rows.append((f"{count:,}", samples, degrees_text(best.candidate), tokens, f"{100 * rate:.0f} %", best.candidate.step.limit))
        say(_aligned(rows))
        for kind in dict.fromkeys(point.kind for point in points if point.kind in NAMED):
            end = pays_up_to(points, kind, strong)
            if end is not None and end < counts[-1]:
                say(f"  {' × '.join(kind) or 'one card'} pays up to {end:,} cards")
        say()
    if flags.figure:
        _figure(flags.figure, lambda draw, path: draw.draw_scale(points, request, path))
    return 0


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def _write_csv(path: Path, found: Sequence[Candidate], request: Request) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow((*AXES, "samples", "accumulation", "microbatches", "schedule", "stages_per_rank", "activation_checkpointing", "fits", "memory_gb",
                     "step_seconds", "tokens_per_second", "mfu", "limit", "overrides"))  # fmt: skip
    for c in found:
        numbers = (*(getattr(c.layout, axis) for axis in AXES), c.layout.samples, c.layout.accumulation, c.layout.microbatches)
        rest = (c.layout.schedule if c.layout.pipeline > 1 else "", c.layout.stages, c.checkpointing, c.fits, round(c.memory.total / 1e9, 3),
                round(c.step.total, 6), round(throughput(c, request.sizes), 1), round(mfu(c, request.sizes, request.cluster), 4), c.step.limit,
                " ".join(overrides(c, request)))  # fmt: skip
        writer.writerow([csv_cell(value) for value in (*numbers, *rest)])
    atomic_write_text(path, text.getvalue())
    say(f"every candidate: {path}")


def _impossible(request: Request, found: Sequence[Candidate]) -> ConfigError:
    """The error for a request that nothing satisfies, with what would make it possible."""
    cluster, batch = request.cluster, request.config["data"]["batch_size"]
    ways = remedies(request)
    fix = f"Cheapest first: {'; '.join(ways)}." if ways else "Use a smaller model, or a shorter data.context_length."
    if not found:
        return ConfigError(f"no layout divides it over {cluster.processes} cards with the settings given", "data.batch_size", batch, fix=fix)
    least = min(found, key=lambda candidate: candidate.memory.total)
    message = (
        f"no layout fits in {100 * SPARE:.0f} % of {cluster.memory / 1e9:.0f} GB: the smallest, {degrees_text(least)} with "
        f"strategy.activation_checkpointing={least.checkpointing}, would take {gigabytes(least.memory.total)} a card"
    )
    return ConfigError(message, "cluster.nodes", cluster.nodes, fix=fix)


def _experiment(name: str) -> Path:
    return Path("conf", "experiment", f"{name}.yaml")


def _apply(name: str, given: Sequence[str]) -> None:
    """Write the overrides as an experiment of the user's own folder conf/experiment/."""
    path = _experiment(name)
    groups, settings = [], dict[str, Any]()
    for override in given:
        key, _, value = override.lstrip("+").partition("=")
        if "." not in key and key in ("strategy", "model", "data", "optimizer", "schedule", "task", "trainer", "stage", "logger"):
            groups.append(f"  - override /{key}: {value}")
        else:
            node = settings
            *parents, last = key.split(".")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = yaml.safe_load(value)
    head = "# @package _global_\n# Chosen by `meshformer plan`.\n"
    text = head + ("defaults:\n" + "\n".join(groups) + "\n\n" if groups else "") + yaml.safe_dump(settings, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    say(f"\nwritten: {path}; train with it: meshformer train --config-dir {path.parts[0]} experiment={name}")
