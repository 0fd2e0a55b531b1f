"""What each command does before its job starts: compose, check, create the run folder, pass a plain dict to the job."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, read_write

from meshformer.checkpoint.find import candidates, latest_checkpoint
from meshformer.command import compose
from meshformer.command.compose import Hydra
from meshformer.command.conversion import export_source_and_target, run_and_target, source_and_target
from meshformer.command.dry_run import say_run
from meshformer.command.explain import explain_errors
from meshformer.command.folders import claim_folder, forget_folder, shared_folder, write_settings
from meshformer.command.plan import AUTO, CHOICE, choose
from meshformer.command.recipe import FirstRun, pretraining
from meshformer.command.recorded import read_overrides, write_overrides
from meshformer.command.slurm import MARK, earlier_start, job_mark
from meshformer.compat.hydra import Callbacks, get_args_parser
from meshformer.config import ConfigError, Convert, Evaluate, Export, Generate, Root, did_you_mean, validate
from meshformer.config.foreign import confine, read_config
from meshformer.config.paths import default_cache, run_of
from meshformer.config.resolve import external_launcher
from meshformer.importing import heavy_imports
from meshformer.parallel.compilation import compiles
from meshformer.printing import say
from meshformer.record import RunRecord, atomic_write_text
from meshformer.record.run_folder import PENDING
from meshformer.tasks.check import KINDS, writes_text

Config = dict[str, Any]
SHOWING = ("cfg", "info", "shell_completion", "hydra_help")


def run_command(command: str, argv: Sequence[str]) -> int:
    """Run `train`, `evaluate`, `generate`, `convert` or `export` with Hydra's flags and overrides; return the exit code."""
    args = _parse(argv)
    config_name = args.config_name or command
    overrides: list[str] = list(args.overrides)
    run_of: dict[str, str] = {}
    if args.dry_run and (command != "train" or any(getattr(args, name) for name in SHOWING)):
        raise ConfigError("belongs to `meshformer train`, without another flag that shows something", "--dry-run", fix="Leave it out.")
    if command == "train":
        run_of, overrides = compose.take(overrides, "resume", "fork")
    if run_of:
        return _train_from(args, run_of, overrides)
    plan: Config | None = None
    if command == "train" and AUTO in overrides and not any(getattr(args, name) for name in SHOWING):
        if args.multirun:
            raise ConfigError("it chooses for one run, not for a sweep", "strategy", "auto", fix="Ask `meshformer plan` once, and use its answer.")
        overrides, plan = choose(overrides, args.config_dir)
    hydra = compose.make_hydra(args.config_dir)
    with explain_errors(hydra, config_name, overrides):
        if any(getattr(args, name) for name in SHOWING):
            _show(hydra, args, config_name, overrides)
            return 0
        if command in ("convert", "export"):
            return _convert_or_export(command, hydra, config_name, overrides, args.multirun)
        if command != "train":
            return _use_run(command, hydra, config_name, overrides, args)
        if args.multirun or compose.value_of(overrides, "hydra.mode") == "MULTIRUN":
            from meshformer.command.sweep.run import run_sweep

            return run_sweep(args, overrides)
        if sweep_settings := [override for override in overrides if override.lstrip("+").startswith("sweep.")]:
            raise ConfigError("a sweep is several runs", *sweep_settings[0].split("=", 1), fix="Add -m.")
        cfg = compose.compose_config(hydra, config_name, overrides)
        if cfg.hydra.runtime.choices.get("sweep") is not None:
            raise ConfigError("a sweep is several runs", "sweep", cfg.hydra.runtime.choices["sweep"], fix="Add -m.")
        config = compose.plain(cfg)
        flags = [f"--config-dir={args.config_dir}"] if args.config_dir else []
        first = pretraining(config, overrides, flags, args.config_dir)
        if first is None:
            config = compose.settle(config, overrides)
    if first is not None and args.dry_run:
        say("two runs: the first pretrains as below, the second fine-tunes its weights (stage.pretrain)")
        return run_command("train", [*first.arguments, "--dry-run"])
    if first is not None:
        return _train_both(argv, first)
    return _train(args, hydra, cfg, config, write_overrides(overrides, args.config_dir, args.config_name), plan=plan)


def _train_both(argv: Sequence[str], first: FirstRun) -> int:
    """`stage.pretrain`: train the run `first` unless it exists already, then fine-tune from its weights."""
    with first.exclusive():
        found = first.find()
        if found is None or not found[1]:
            code = run_command("train", first.arguments if found is None else [f"resume={found[0]}", *first.trusted])
            found = first.find()
            if code or found is None:
                return code or 1
        else:
            say(f"pretrained already: {found[0]}")
    return run_command("train", [*argv, f"stage.init_from={compose.quoted(str(found[0]))}", "stage.pretrain=null"])


def _train(
    args: argparse.Namespace, hydra: Hydra, cfg: DictConfig, config: Config, overrides: str, run: Path | None = None, plan: Config | None = None
) -> int:
    """Train in `run` if given (resume), else in that of a start of this SLURM job without a checkpoint, else in hydra.run.dir or a new folder."""
    external = external_launcher()
    _refuse_missing_nodes(config)
    wanted, earlier, mark = str(cfg.hydra.run.dir), None, None
    if run is None:
        mark = job_mark(wanted, f"{config['fork']}\n{overrides}")
        earlier = earlier_start(config, wanted, mark)
    if earlier is not None and RunRecord(earlier).fields.get("state") == "finished":
        say(f"the run of this SLURM job is finished already: {earlier}")
        return 0
    if earlier is not None and candidates(earlier):
        allowed = [override for override in args.overrides if override.lstrip("+").startswith("allow=")]
        return _train_from(args, {"resume": str(earlier)}, allowed)
    _check_start(config)
    if args.dry_run:
        return say_run(config, wanted, run)
    new, writes = run is None and earlier is None, external is None or external.rank == 0
    folder = run or earlier or (Path(wanted).absolute() if wanted != "auto" else shared_folder(config, external))
    if writes:
        if new:
            claim_folder(folder)
        if mark is not None:
            atomic_write_text(folder / MARK, mark)
        if run is not None:  # a resumed run's files change only at its first step: until then the job may still fail
            atomic_write_text(folder / PENDING, overrides)
        else:
            _write_start(folder, config, overrides, plan, chooses=cfg.trainer.compile == "auto")
    with read_write(cfg.hydra.run):
        cfg.hydra.run.dir = str(folder)
    callbacks = Callbacks(cfg)
    callbacks.on_run_start(config=cfg, config_name=cfg.hydra.job.config_name)
    raised: list[Exception] = []

    def job(_: DictConfig) -> Config | None:
        try:
            return _launch(config, folder)
        except Exception as error:
            raised.append(error)
            raise

    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    named_below = Path(config["paths"]["runs"]).absolute() if wanted == "auto" else None
    try:
        done = run_job(task_function=job, config=cfg, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
    except KeyboardInterrupt:
        if writes and new and not RunRecord(folder).fields:  # before its first step
            forget_folder(folder, named_below)
        raise
    finally:
        if writes:
            (folder / PENDING).unlink(missing_ok=True)
    callbacks.on_run_end(config=cfg, config_name=cfg.hydra.job.config_name, job_return=done)
    if raised:
        if isinstance(raised[0], ConfigError) and new and writes:
            forget_folder(folder, named_below)
        raise raised[0]
    return 0


def _write_start(folder: Path, config: Config, overrides: str, plan: Config | None, chooses: bool) -> None:
    """Write the settings of a new run, and say what was chosen for it (`chooses`: trainer.compile was auto)."""
    write_settings(folder, config, overrides)
    if plan is not None:
        atomic_write_text(folder / CHOICE, json.dumps(plan, indent=1))
    if chooses and config["trainer"]["progress"]:
        chosen, reason = compiles(config)
        say(f"compile: {'yes' if chosen else 'no'}, {reason}", error=True)


def _check_start(config: Config) -> None:
    """Raise ConfigError if the job has no intact checkpoint to start from. The result is cached for the processes started from here."""
    sources = {"resume": config["resume"], "fork": config["fork"], "stage.init_from": config["stage"]["init_from"]}
    key, source = next(((key, source) for key, source in sources.items() if source is not None), ("", None))
    if source is not None:
        latest_checkpoint(Path(source), key)


def _refuse_missing_nodes(config: Config) -> None:
    if external_launcher() is None and config["trainer"]["num_nodes"] > 1:
        message = "one command starts only the processes of its own node, and would wait forever for the other nodes"
        raise ConfigError(message, "trainer.num_nodes", config["trainer"]["num_nodes"], fix="Start it with torchrun or srun on every node.")


def _train_from(args: argparse.Namespace, run_of: dict[str, str], overrides: list[str]) -> int:
    """`resume=RUN` continues RUN in its own folder; `fork=RUN` starts a new folder from RUN's state and may change any setting."""
    if len(run_of) > 1:
        raise ConfigError("resume= and fork= exclude each other", fix="Use one of them.")
    (key, spec), *_ = run_of.items()
    if args.multirun:
        raise ConfigError(f"{key} continues one run, not a sweep", "--multirun", fix="Leave -m out.")
    run = compose.locate(spec, str(compose.value_of(overrides, "paths.runs", "runs")), key)
    if not candidates(run):
        raise ConfigError(f"there is no checkpoint in {run} to continue from", key, spec)
    before, _, config_name = read_overrides(run, args.config_dir, key)
    if key == "resume" and any(override.startswith("hydra.run.dir=") for override in overrides):
        raise ConfigError("a resumed run stays in its folder", "hydra.run.dir", fix="Use fork= for a new one.")
    name = args.config_name or config_name or "train"
    hydra = compose.make_hydra(args.config_dir)
    with explain_errors(hydra, name, before):
        both = compose.combine(hydra, name, before, overrides)
    with explain_errors(hydra, name, both):
        if any(getattr(args, show) for show in SHOWING):
            _show(hydra, args, name, both)
            return 0
        config = compose.recorded(hydra, name, run, before, overrides, compose.RESUMABLE, _refuse_resume) if key == "resume" else None
        mine = compose.own(hydra, name, overrides)
        hydra = compose.make_hydra(args.config_dir)
        cfg = compose.compose_config(hydra, name, both)
        # As in `recorded`: an `allow` stored in the run folder is not trusted.
        config = config or {**compose.plain(cfg), "allow": compose.value_of(overrides, "allow", [])}
        config = compose.within(config, mine, overrides)
        config = compose.settle({**config, "resume": None, "fork": None, key: str(run)}, both)
    return _train(args, hydra, cfg, config, write_overrides(both, args.config_dir, name), run if key == "resume" else None)


def _refuse_resume(key: str, recorded: Any) -> ConfigError:
    shown = "null" if recorded is None else recorded
    return ConfigError(
        f"a resumed run keeps it, and the run has {shown}", key, fix="Leave it out, or use fork= to change it in a new folder."
    )


def _use_run(command: str, hydra: Hydra, config_name: str, overrides: list[str], args: argparse.Namespace) -> int:
    """`evaluate` and `generate`: their options come from their own small configuration, everything else from the run's config.yaml."""
    if args.multirun:
        raise ConfigError(f"meshformer {command} reads one run", "--multirun", fix="Leave -m out.")
    changes: list[str] = []
    text: dict[str, str] = {}
    if command == "evaluate":
        changes = [o for o in overrides if o.lstrip("+~").partition("=")[0].partition(".")[0] in ("trainer", "data", "strategy")]
        changes += [o for o in overrides if o.startswith("task.")]
        overrides = [o for o in overrides if o not in changes]
        _refuse_recorded(command, overrides)
    else:  # a prompt is free text: Hydra must not parse its commas, brackets and quotes
        text, overrides = compose.take(overrides, "prompt")
        _refuse_recorded(command, overrides)
    options = compose.plain(compose.compose_config(hydra, config_name, overrides))
    options = validate({**options, **text}, Evaluate if command == "evaluate" else Generate)
    source = compose.locate_weights(options["run"], options["paths"]["runs"], "run")
    run = run_of(source)
    if not candidates(run):
        raise ConfigError(f"there is no checkpoint in {run} to read", "run", options["run"])
    options["run"] = str(source)
    config = _in_one_process(_evaluated_config(run, changes, args.config_dir) if changes else read_config(run), options, changes)
    if command == "generate":  # it needs only the run folder: the training texts may have been deleted
        if config["data"].get("kind") == "speech":
            _check_audio(options)
        elif options["audio"] is not None:
            raise ConfigError("its model reads text, not sound", "audio", options["audio"], fix="Use prompt=….")
        elif not writes_text(config):
            task = str(config["task"].get("_target_", "")).rpartition(".")[2]
            raise ConfigError(f"its model cannot generate text (its task is {task})", "run", options["run"], fix="Use `meshformer evaluate`.")
        config["data"] = {**config["data"], **dict.fromkeys(("files", "validation_files", "test_files", "file", "validation_file"))}
    # Any value of `resume` skips the checks of stage.init_from: the run that fine-tuning started from is no longer needed.
    config = compose.settle({**config, "resume": str(run)})
    with heavy_imports():
        if command == "evaluate":
            from meshformer.job.evaluate import evaluate as use
        else:
            from meshformer.job.generate import generate as use
    use({**config, "resume": None}, options)
    return 0


def _in_one_process(config: Config, options: Config, changes: Sequence[str] = ()) -> Config:
    """The configuration of a run for a command that reads it in one process, whatever layout it was trained in. It builds no loggers and no
    callbacks. `changes`: the overrides that `evaluate` permits."""
    config["allow"] = options["allow"]
    paths = {"data": default_cache(), **options["paths"]}
    config = confine({**config, "callbacks": {}, "logger": {}}, paths, cache=compose.value_of(changes, "data.source.cache"))
    config["strategy"] = {"name": "single", "replicate": 1}
    config["trainer"] |= {
        "devices": 1,
        "num_nodes": 1,
        "threads": compose.value_of(changes, "trainer.threads", "auto"),
        "accumulate_grad_batches": 1,
        "compile": False,
    }
    config["trainer"]["limit_val_batches"] = compose.value_of(changes, "trainer.limit_val_batches")
    return config


def _check_audio(options: dict[str, Any]) -> None:
    """ConfigError unless `audio` names recordings that exist."""
    given = options["audio"]
    if not given:
        raise ConfigError("its model turns recordings into text: name one", "audio", fix="Add audio=FILE to the command.")
    for name in [given] if isinstance(given, str) else given:
        path = Path(os.path.expanduser(name))  # which leaves the name of an unknown user as it is
        if not path.is_file():
            nearby = sorted(p.name for p in path.parent.iterdir() if p.is_file()) if path.parent.is_dir() else []
            raise ConfigError("is a folder" if path.is_dir() else "there is no such file", "audio", name, fix=did_you_mean(path.name, nearby))


def _refuse_recorded(command: str, overrides: list[str]) -> None:
    """Raise ConfigError for an override of a setting of `train`, which the run has recorded."""
    schema = Evaluate if command == "evaluate" else Generate
    recorded = {spec.name for spec in dataclasses.fields(Root)} - {spec.name for spec in dataclasses.fields(schema)}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if re.split(r"[./@]", key, maxsplit=1)[0] in recorded:
            raise ConfigError(f"{command} takes it from the run", key, value or None, fix="Leave it out.")


def _convert_or_export(command: str, hydra: Hydra, config_name: str, overrides: list[str], multirun: bool) -> int:
    """`convert` and `export`: write a checkpoint or model in another format."""
    if multirun:
        raise ConfigError(
            f"meshformer {command} reads one {'checkpoint' if command == 'convert' else 'model'}", "--multirun", fix="Leave -m out."
        )
    text, overrides = compose.take(overrides, "output")  # a path, which Hydra must not parse
    options = compose.plain(compose.compose_config(hydra, config_name, overrides))
    options = validate({**options, **text}, Convert if command == "convert" else Export)
    if command == "convert" and options["to"] == "tfrecord":
        run, target = run_and_target(options)
        # Any value of `resume` skips the checks of stage.init_from, as for `evaluate`.
        config = compose.settle({**_in_one_process(read_config(run), options), "resume": str(run)})
        if config["data"]["kind"] in ("speech", "own"):
            message = f"writes text and images, and the run's data is {KINDS[config['data']['kind']]}"
            raise ConfigError(message, "to", "tfrecord", fix="Write its files with TensorFlow.")
        with heavy_imports():
            from meshformer.job.convert_data import convert_data

        convert_data({**config, "resume": None}, run, target)
    elif command == "convert":
        source, target = source_and_target(options)
        with heavy_imports():
            from meshformer.job.convert import convert

        convert(source, target, options["to"])
    else:
        source, target = export_source_and_target(options)
        with heavy_imports():
            from meshformer.job.export import export

        export(source, target, options["format"], options["litert"])
    return 0


def _evaluated_config(run: Path, changes: list[str], config_dir: str | None) -> Config:
    """Return the run's configuration with the changes that `evaluate` permits."""
    before, _, config_name = read_overrides(run, config_dir, "run")
    hydra, name = compose.make_hydra(config_dir), config_name or "train"

    def refuse(key: str, value: Any) -> ConfigError:
        return ConfigError(f"evaluate cannot change it; the run has {value}", key, fix="Leave it out.")

    with explain_errors(hydra, name, [*before, *changes]):
        return compose.recorded(hydra, name, run, before, changes, compose.EVALUABLE, refuse)


def _launch(config: Config, folder: Path) -> Config | None:
    from meshformer.command.launch import launch  # imports torch

    return launch(config, folder)


def _show(hydra: Hydra, args: argparse.Namespace, config_name: str, overrides: list[str]) -> None:
    if args.cfg:
        hydra.show_cfg(config_name, overrides, args.cfg, args.package, args.resolve)
    elif args.info:
        hydra.show_info(args.info, config_name, overrides)
    elif args.hydra_help:
        hydra.hydra_help(config_name, get_args_parser(), args)
    else:
        hydra.shell_completion(config_name, overrides)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = get_args_parser()
    parser.add_argument("--dry-run", action="store_true")

    def refuse(message: str) -> Any:
        raise ConfigError(message, fix="`meshformer --help` lists the flags.")

    parser.error = refuse
    args = parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun:
        raise ConfigError("reading a pickle runs whatever is in it", "--experimental-rerun", fix="Use resume=RUN or fork=RUN.")
    if args.config_path:
        raise ConfigError(
            "the package's own conf/ is always read", "--config-path", args.config_path, fix="Use --config-dir to add a folder."
        )
    if sum(bool(getattr(args, name)) for name in (*SHOWING, "multirun")) > 1:
        raise ConfigError("--cfg, --info, --multirun and --shell-completion exclude each other", fix="Use one of them.")
    if args.resolve and not args.cfg:
        raise ConfigError("goes with --cfg", "--resolve")
    return args
