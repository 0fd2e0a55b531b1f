"""A training job in one of its processes: from the resolved configuration to the record of the run."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import yaml

from meshformer.callbacks import Rows
from meshformer.callbacks.ema import averaged
from meshformer.callbacks.media import log_figure
from meshformer.callbacks.preemption import Preemption, StopSignals
from meshformer.callbacks.samples import continuation
from meshformer.checkpoint.find import checkpoints, latest_checkpoint
from meshformer.checkpoint.read import read_rest, refuse_misfits, tensor_sizes
from meshformer.checkpoint.weights import PREFIX, load_weights, misfits_of
from meshformer.config.errors import ConfigError, Stopped
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.config.signature import signature
from meshformer.data import SampledData, load_tokenizer
from meshformer.data.images import PIXELS, ImageData
from meshformer.huggingface.source import tokenizer_of
from meshformer.job import loggers
from meshformer.job.build import build_callbacks, build_data, build_loggers, build_task, build_trainer
from meshformer.job.summary import resume_command, summary
from meshformer.model import Transformer, training_flops_per_token
from meshformer.model.layout import blocks_of
from meshformer.model.lora import ADAPTERS
from meshformer.model.meta_device import parameters_on_meta
from meshformer.model.settings import HEAD_PARAMETERS
from meshformer.optim.muon import multiplies_bfloat16
from meshformer.parallel.check import BF16, no_bf16
from meshformer.parallel.memory_options import apply_memory_options
from meshformer.parallel.products import in_float8
from meshformer.parallel.strategy import MeshStrategy, fill
from meshformer.printing import say
from meshformer.record.run_folder import PENDING, atomic_write_text
from meshformer.record.run_json import RunRecord
from meshformer.tasks import Evaluated
from meshformer.tasks.check import has_own_head
from meshformer.tasks.plain import Hosted

Config = dict[str, Any]
# mallopt's M_MMAP_THRESHOLD (its maximum), M_TRIM_THRESHOLD and M_TOP_PAD, in bytes.
MALLOC_OPTIONS = {-3: 32 * 2**20, -1: 2**31 - 1, -2: 64 * 2**20}
TEXT_TOKENS = 400  # length of the sample text at the end of a run


def train(config: Config, folder: Path, signals: StopSignals | None = None) -> dict[str, float]:
    """Trains a run in `folder`; returns the final metrics. Every rank calls it; rank 0 writes the files.

    Raises Stopped on every rank after a stop signal and a save. `signals`: default, the signals of this process.
    """
    opened: list[Any] = []
    try:
        with signals or StopSignals(by_agent=False) as listening:
            final = _train(config, folder, listening, opened)
    except BaseException:
        loggers.close(opened, failed=True)
        raise
    loggers.close(opened, failed=False)
    return final


def leave_together() -> None:
    """A last barrier, so that no rank exits while another is still in a collective.

    Otherwise the last collective of the other rank could fail although the run is complete, and torchrun's agents wait up to 300 seconds for the
    other node.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):  # timeout: rank 0 may still generate the final text; the run is complete, so this is no failure
            dist.barrier()
        dist.destroy_process_group()


def _train(config: Config, folder: Path, signals: StopSignals, opened: list[Any]) -> dict[str, float]:
    """`opened` receives the loggers, which the caller closes."""
    prepare_process(config["trainer"])
    data = prepare_data(config)
    max_steps = total_steps(config, data.steps_per_epoch)
    start = starting_point(config, folder, data, max_steps)  # before anything in the run folder is changed
    settle_sizes(config, data)

    named, callbacks = build_loggers(config, folder), build_callbacks(config, folder, data.steps_per_epoch)
    opened += named.values()
    trainer = build_trainer(config, folder, max_steps, [*callbacks, Preemption(signals)], opened)
    refuse_emulation(trainer.strategy.root_device, config["trainer"]["precision"])
    task: Any = build_task(config, max_steps)
    configure_model(config, task, trainer.strategy, start)
    if start.resume_from:
        check_weights(task.model, start.resume_from)
        trainer.strategy.checkpoint_io.fresh_optimizer = other_optimizer(config, trainer.is_global_zero)  # pyright: ignore[reportAttributeAccessIssue]
    count_work(task, data)

    rows = next(callback for callback in callbacks if isinstance(callback, Rows))
    recording = Recording(config, folder, trainer, task, data, rows.tolerant, named)
    trainer.callbacks.insert(0, recording)  # pyright: ignore[reportAttributeAccessIssue]
    with recording:
        if not config["resume"]:  # the record of a resumed run changes when its first step begins
            recording.begin()
        fit(trainer, task, data, start, rows, recording)
    final = {**rows.latest, **{k: float(v) for k, v in trainer.callback_metrics.items()}}
    text = final_text(task, trainer, data)
    recording.finish(final)
    if trainer.is_global_zero:
        say(summary(task, text, folder, final, config, data))
    return final


def prepare_process(trainer: Config) -> None:
    quiet_libraries()
    keep_freed_memory()
    torch.set_num_threads(trainer["threads"])
    choose_tf32(trainer["matmul_precision"])


def prepare_data(config: Config) -> SampledData:
    """Builds and prepares the data module. Fine-tuning uses the tokenizer of the pretrained weights; otherwise it is trained on the data."""
    tokenizer = None
    pretrained = config["stage"]["name"] == "finetune" or config["stage"]["init_from"] is not None
    source = config["resume"] or config["fork"] or config["stage"]["init_from"]
    foreign_speech = config["data"]["kind"] == "speech" and pretrained and not (run_of(Path(source)) / "config.yaml").is_file()
    if pretrained and config["data"]["kind"] not in ("images", "own") and not foreign_speech:  # an encoder of sound brings no characters
        tokenizer = load_tokenizer(tokenizer_file(Path(source)))
    data = build_data(config, tokenizer)
    data.prepare_data()
    return data


@dataclass(frozen=True)
class Start:
    """Where a run starts: from a checkpoint (`resume_from`), from pretrained weights (`weights`), or from scratch (both None)."""

    resume_from: Path | None
    at_end: bool  # the checkpoint is that of the last step, so only the validation is missing
    weights: Path | None


def starting_point(config: Config, folder: Path, data: SampledData, max_steps: int) -> Start:
    """Finds the checkpoint to start from, without writing anything. ConfigError if it belongs to other data or the run is complete."""
    continued = config["resume"] or config["fork"]
    if not continued:
        init_from = config["stage"]["init_from"]
        return Start(None, False, latest_checkpoint(Path(init_from), key="stage.init_from") if init_from else None)
    checkpoint = latest_checkpoint(Path(continued), key="resume" if config["resume"] else "fork")
    unfinished = bool(config["resume"]) and not _is_finished(folder)
    return Start(checkpoint, _check_continues(read_rest(checkpoint), data, max_steps, unfinished), None)


def configure_model(config: Config, task: Any, strategy: Any, start: Start) -> None:
    """Builds the model with its initial weights. With MeshStrategy it is on the meta device, and the strategy allocates this rank's shards."""
    stage, float8 = config["stage"], config["trainer"]["float8"]
    reinit = None if (stage.get("lora") or {}).get("rank") else stage.get("reinit") or ()  # with adapters, no other parameter is reinitialised
    torch.manual_seed(config["seed"])  # for users' models, which draw from the global generator
    if isinstance(strategy, MeshStrategy):
        with torch.device("meta"):
            task.configure_model()
        if isinstance(task.model, Hosted) or not type(task.model).__module__.startswith("meshformer."):
            # A user's model, which may compute buffers in its constructor.
            # Without `initial_value` only the constructor can draw the weights, so every rank builds all of them.
            by_name, task.model = hasattr(task.model, "initial_value"), None
            torch.manual_seed(config["seed"])
            with parameters_on_meta() if by_name else nullcontext():
                task.configure_model()
        strategy.init_from, strategy.new_parts, strategy.reinit = start.weights, new_parts(config, task.model), reinit
    else:
        task.configure_model()
        if hasattr(task.model, "initial_value") and not hasattr(task.model, "initialise"):  # Transformer's constructor has called `initialise`
            fill(task.model, task.seed, {})
        if start.weights:
            load_weights(task.model, start.weights, new=new_parts(config, task.model), reinit=reinit)
    if float8:
        in_float8(task.model)
    if not isinstance(strategy, MeshStrategy):
        model: Any = task.model
        apply_memory_options(blocks_of(model), config["strategy"]["activation_checkpointing"], config["trainer"]["compile"])


def new_parts(config: Config, model: Any) -> tuple[str, ...]:
    """Patterns of the parameters that pretrained weights may lack: adapters, and the head of a task that trains its own."""
    return (*(getattr(model, "head_parameters", HEAD_PARAMETERS) if has_own_head(config) else ()), *ADAPTERS)


def count_work(task: Any, data: SampledData) -> None:
    """Sets the tokens per step and FLOPs per token that callbacks.Throughput reads."""
    if isinstance(task.model, Transformer):
        length = data.mean_length or task.model.context_length
        task.tokens_per_step = data.batch_size * length
        task.flops_per_token = training_flops_per_token(task.model, round(length))


def fit(trainer: pl.Trainer, task: Any, data: SampledData, start: Start, rows: Rows, recording: Recording) -> None:
    trainer.fit(task, datamodule=data, ckpt_path=start.resume_from, weights_only=True)
    if start.at_end:  # Lightning has restored the state and run no step
        recording.begin()
        rows.begin(trainer)
    if rows.validated_step != trainer.global_step:  # the last step was not a validation step
        trainer.validate(task, datamodule=data, verbose=False)


def final_text(task: Any, trainer: pl.Trainer, data: SampledData) -> str | None:
    """A sample text at the end of the run, or None if the model writes no text. A collective."""
    if not getattr(task, "writes_text", False) or data.tokenizer is None:
        return None
    with averaged(trainer):
        return continuation(task, data.tokenizer, "\n", TEXT_TOKENS, temperature=0.8, top_p=0.95, seed=1)


class Recording(pl.Callback):
    """Writes the record of the run (run.json and configuration) when training starts, and the outcome on leaving its context. Rank 0 only."""

    def __init__(
        self, config: Config, folder: Path, trainer: pl.Trainer, task: Any, data: SampledData, tolerant: bool, named: dict[str, Any]
    ) -> None:
        self.loggers = named
        self.config, self.folder, self.trainer, self.task, self.data, self.tolerant = config, folder, trainer, task, data, tolerant
        self.parameters = sum(p.numel() for p in task.parameters())  # before the strategy shards the model
        self.record = RunRecord(folder) if trainer.is_global_zero else None
        self.begun = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return
        if self.record and self.begun:
            with tolerating(self.tolerant, "run.json"):
                self.record.finish("preempted" if isinstance(error, Stopped) else "failed", error=error)
        if isinstance(error, Stopped) and self.record and checkpoints(self.folder):
            say(f"continue with  {resume_command(self.folder, self.config)}", error=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.begin()

    def begin(self) -> None:
        if self.begun or self.record is None:
            return
        self.begun, config, folder = True, self.config, self.folder
        if not config["resume"] and self.data.tokenizer is not None:
            self.data.tokenizer.save(folder / "tokenizer.json")
        if not config["resume"] and isinstance(self.data, ImageData) and self.data.scale is not None:
            self.data.scale.save(folder / PIXELS)
        atomic_write_text(folder / "config.yaml", yaml.safe_dump({**config, "resume": None}, sort_keys=False, allow_unicode=True))
        if (folder / PENDING).exists():
            (folder / PENDING).replace(folder / "overrides.txt")
        layout = {**config["strategy"], "processes": self.trainer.world_size}
        device = {
            "accelerator": str(self.trainer.strategy.root_device),
            "precision": config["trainer"]["precision"],
            "threads": torch.get_num_threads(),
        }
        self.record.start(device=device, layout=layout, parameters=self.parameters)
        loggers.begin(self.loggers, config, folder)

    def finish(self, final: dict[str, float]) -> None:
        if self.record is None:
            return
        with tolerating(self.tolerant, "what the run ends with"):
            for name, content in self.task.results(self.data).items() if isinstance(self.task, Evaluated) else ():
                atomic_write_text(self.folder / name, content)
            self.record.finish("finished", None, **final)
            if self.loggers and isinstance(self.task, Evaluated):
                for name, figure in self.task.drawings(self.data).items():
                    log_figure(self.loggers.values(), name, figure, self.trainer.global_step)


@contextmanager
def tolerating(tolerant: bool, what: str) -> Iterator[None]:
    """Context that turns an OSError (a full disk) into a warning if `tolerant` (callbacks.checkpoint.on_failure=warn); `what` names the file."""
    try:
        yield
    except OSError as error:
        if not tolerant:
            raise
        say(f"warning: {what} could not be written ({error.strerror})", error=True)


def _is_finished(folder: Path) -> bool:
    return RunRecord(folder).fields.get("state") == "finished"


def check_weights(model: Any, checkpoint: Path) -> None:
    """ConfigError if the names or shapes of the checkpoint's tensors do not match the model. Reads no tensor."""
    saved = {key.removeprefix(PREFIX): size for key, (size, _) in tensor_sizes(checkpoint).items() if key.startswith(PREFIX)}
    refuse_misfits(misfits_of(model, saved), f"the weights in {checkpoint} are not those of this run's model")


def other_optimizer(config: Config, print_notice: bool) -> bool:
    """Whether a fork uses another optimizer than its source run, and so starts without optimizer state."""
    if not config["fork"]:
        return False
    before = read_config(Path(config["fork"]))["optimizer"].get("_target_")
    if before == config["optimizer"]["_target_"]:
        return False
    if print_notice:
        names = [str(target).rpartition(".")[2] for target in (before, config["optimizer"]["_target_"])]
        say(f"the run to fork was trained with optimizer={names[0]}: {names[1]} starts without state", error=True)
    return True


def _check_continues(checkpoint: Config, data: SampledData, max_steps: int, unfinished: bool) -> bool:
    """Whether only the final validation is missing. ConfigError if the checkpoint belongs to other data, or if the run is complete. Also restores
    the position in `data`."""
    data.load_state_dict(checkpoint.get(type(data).__name__, {"identity": None}))
    if checkpoint["step"] == max_steps and unfinished:
        return True
    if checkpoint["step"] >= max_steps:
        raise ConfigError(
            f"the run has reached step {checkpoint['step']} already",
            "trainer.max_steps",
            max_steps,
            fix=f"Use more than {checkpoint['step']}.",
        )
    return False


def tokenizer_file(source: Path) -> Path:
    """Path of the tokenizer that the weights `source` were trained with. ConfigError if it is missing."""
    found = tokenizer_of(source)
    if found is None:
        fix = f"Put the model's tokenizer.json (as `tokenizers` and transformers write it) into {source if source.is_dir() else source.parent}."
        raise ConfigError(
            "no tokenizer comes with these weights, so what their token ids stand for is not known", "stage.init_from", source, fix
        )
    return found


def settle_sizes(config: Config, data: SampledData) -> None:
    """Sets the model's sizes that depend on the data (vocabulary, classes). ConfigError if a given size contradicts the data."""
    model = config["model"]
    accepted = signature(model["_target_"])
    for key, size in data.model_settings().items():
        if not accepted.open_ended and key not in accepted.parameters:
            continue  # a user's model without that argument
        if key == "vocab_size":
            size = vocabulary(model.get(key), size)
        elif model.get(key) not in (None, size):
            raise ConfigError(f"the data has {size} classes", f"model.{key}", model[key], fix="Leave it out.")
        model[key] = size
    if config["data"]["kind"] == "texts" and data.classes is not None:
        config["data"]["classes"] = data.classes  # so that an evaluation on other data uses the same class ids
    if "classes" in config["data"]["source"] and data.classes is not None:
        config["data"]["source"]["classes"] = list(data.classes)  # the same for records


def vocabulary(wanted: int | None, tokens: int) -> int:
    """Rows of the embedding: the tokenizer's number of tokens, or `wanted` if that is larger, as in some pretrained models."""
    if wanted is not None and wanted < tokens:
        raise ConfigError(f"the tokenizer has more tokens, {tokens}", "model.vocab_size", wanted, fix="Leave it out.")
    return wanted or tokens


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """The optimizer step at which training ends: the earlier of `trainer.max_steps` and `trainer.max_epochs`."""
    trainer = config["trainer"]
    limits = [trainer["max_steps"], trainer["max_epochs"] and trainer["max_epochs"] * steps_per_epoch]
    return min(limit for limit in limits if limit is not None)


def quiet_libraries() -> None:
    """Silences Lightning's start-up messages and hints, which every rank would print."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "torch.distributed.tensor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(lightning|torch)\b.*")


def refuse_emulation(device: torch.device, precision: str) -> None:
    """ConfigError for bf16 on a GPU that emulates it. config/resolve.py checks this earlier, but cannot always query the GPU."""
    if device.type == "cuda" and precision in BF16 and not multiplies_bfloat16(device.type):
        raise no_bf16(precision)


def choose_tf32(precision: str) -> None:
    """Sets TF32 (`high`) or fp32 (`highest`) for fp32 matrix products and convolutions on GPUs; torch's default for convolutions is TF32."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def keep_freed_memory() -> None:
    """Configures glibc's malloc to keep freed memory for the next step, which allocates the same sizes again.

    By default it returns large blocks to the system, and a new block costs a page fault per page, thousands per step (measured with
    `python -m meshformer.bench memory`). Does nothing with other C libraries, or if a MALLOC_ variable is set.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "gnu_get_libc_version") and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, size in MALLOC_OPTIONS.items():
            library.mallopt(option, size)  # pyright: ignore[reportOptionalMemberAccess]
