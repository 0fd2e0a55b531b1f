"""What one process of a training job does, from the resolved configuration to the record of the run."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from meshformer.build import build_callbacks, build_data, build_loggers, build_task, build_trainer
from meshformer.callbacks import Rows
from meshformer.callbacks.preemption import Preemption, StopSignals
from meshformer.callbacks.samples import continuation
from meshformer.checkpoint.find import latest_checkpoint
from meshformer.checkpoint.folder import read_rest
from meshformer.checkpoint.weights import load_weights
from meshformer.config.errors import ConfigError, Stopped
from meshformer.config.paths import run_of
from meshformer.data import TextData, load_tokenizer
from meshformer.model import Transformer, training_flops_per_token
from meshformer.parallel.levers import apply_levers
from meshformer.parallel.strategy import MeshStrategy
from meshformer.record.run_folder import atomic_write_text
from meshformer.record.run_json import RunRecord

Config = dict[str, Any]


def train(config: Config, folder: Path, signals: StopSignals | None = None) -> dict[str, float]:
    """Trains in `folder`; returns the final metrics. The same on every rank; rank 0 writes.

    Raises Stopped, on every rank, where `signals` (default: those to this process) asked for it and the run was saved.
    """
    with signals or StopSignals(by_agent=False) as listening:
        return _train(config, folder, listening)


def _train(config: Config, folder: Path, signals: StopSignals) -> dict[str, float]:
    quiet_libraries()
    torch.set_num_threads(config["trainer"]["threads"])
    folder = Path(folder)
    continued = config["resume"] or config["fork"]
    init_from = config["stage"]["init_from"] if not continued else None  # a continued run has its weights already
    tokenizer = None  # made from the data, except in fine-tuning, which keeps the ids that the weights were trained with
    if config["stage"]["name"] == "finetune":
        tokenizer = load_tokenizer(run_of(continued or config["stage"]["init_from"]) / "tokenizer.json")
    data = build_data(config, tokenizer)
    data.prepare_data()
    max_steps = total_steps(config, data.steps_per_epoch)
    resume_from = latest_checkpoint(Path(continued), key="resume" if config["resume"] else "fork") if continued else None
    if resume_from:  # before anything in the run folder is touched
        _check_continues(read_rest(resume_from), data, max_steps)
    config["model"]["vocab_size"] = data.vocab_size
    loggers = build_loggers(config, folder)
    callbacks = build_callbacks(config, folder, data.steps_per_epoch)
    rows = next(callback for callback in callbacks if isinstance(callback, Rows))
    trainer = build_trainer(config, folder, max_steps, [*callbacks, Preemption(signals)], loggers)
    task: Any = build_task(config, max_steps)
    strategy: Any = trainer.strategy
    weights = latest_checkpoint(Path(init_from), key="stage.init_from") if init_from else None
    torch.manual_seed(config["seed"])  # of models that draw their weights as torch's modules do
    if isinstance(strategy, MeshStrategy):
        with torch.device("meta"):  # the strategy makes this rank's part real
            task.configure_model()
        if not hasattr(task.model, "initial_value"):  # a model of the user's, whose weights come with it
            task.model = None
            torch.manual_seed(config["seed"])
            task.configure_model()
        strategy.init_from = weights
    else:
        task.configure_model()
        if weights:
            load_weights(task.model, weights)
        apply_levers(getattr(task.model, "blocks", ()), config["strategy"]["activation_checkpointing"], config["trainer"]["compile"])
    if isinstance(task.model, Transformer):
        task.flops_per_token = training_flops_per_token(task.model, data.context_length)
    parameters = sum(p.numel() for p in task.parameters())

    record = RunRecord(folder) if trainer.is_global_zero else None
    if record:
        if not config["resume"]:
            data.tokenizer.save(folder / "tokenizer.json")
        atomic_write_text(folder / "config.yaml", yaml.safe_dump({**config, "resume": None}, sort_keys=False, allow_unicode=True))
        layout = {**config["strategy"], "processes": trainer.world_size}
        device = {
            "accelerator": str(trainer.strategy.root_device),
            "precision": config["trainer"]["precision"],
            "threads": torch.get_num_threads(),
        }
        record.start(device=device, layout=layout, parameters=parameters)
    try:
        for logger in loggers if record else []:
            logger.log_hyperparams(config)
        trainer.fit(task, datamodule=data, ckpt_path=resume_from, weights_only=True)
        if rows.validated_step != trainer.global_step:  # the last step was not a validation step
            trainer.validate(task, datamodule=data, verbose=False)
    except BaseException as error:
        if record:
            record.finish("preempted" if isinstance(error, Stopped) else "failed", error=error)
        if isinstance(error, Stopped) and trainer.is_global_zero:
            print(f"continue with  meshformer train resume={folder}", file=sys.stderr, flush=True)
        raise
    final = {k: float(v) for k, v in trainer.callback_metrics.items()}
    final = {**rows.latest, **final}
    text = continuation(task, data.tokenizer, "\n", 400, temperature=0.8, top_p=0.95, seed=1)  # takes every rank
    if record:
        record.finish("finished", None, **final)
        print(summary(text, folder, final), flush=True)
    return final


def _check_continues(checkpoint: Config, data: TextData, max_steps: int) -> None:
    """ConfigError when the checkpoint belongs to other data, or to a run that has nothing left to do."""
    data.load_state_dict(checkpoint["TextData"])
    if checkpoint["step"] >= max_steps:
        raise ConfigError(
            f"the run has reached step {checkpoint['step']} already",
            "trainer.max_steps",
            max_steps,
            fix=f"Use more than {checkpoint['step']}.",
        )


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """The optimizer step at which training ends: the earlier of `trainer.max_steps` and `trainer.max_epochs`."""
    trainer = config["trainer"]
    limits = [trainer["max_steps"], trainer["max_epochs"] and trainer["max_epochs"] * steps_per_epoch]
    return min(limit for limit in limits if limit is not None)


def summary(text: str, folder: Path, final: dict[str, float]) -> str:
    """What a person wants to see at the end: the loss, a paragraph of text, and what to type next."""
    loss, bits = final["val/loss"], final.get("val/bits_per_byte")
    lines = [
        "",
        f"validation loss {loss:.4f} nats a token" + (f" ({bits:.3f} bits a byte)" if bits is not None else ""),
        "",
        text.strip(),
        "",
        f"run folder  {folder}",
        f"  continue  meshformer train resume={folder} trainer.max_steps=…",
        f"  evaluate  meshformer evaluate run={folder}",
        f"  generate  meshformer generate run={folder} prompt='ROMEO:'",
    ]
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Lightning's start-up lines and hints repeat what the run record says, on every rank."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "torch.distributed.tensor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(lightning|torch)\b.*")
