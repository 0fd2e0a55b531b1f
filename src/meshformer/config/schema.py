"""The typed schema of a configuration. `validate` checks a plain dict against it.

The dataclasses below are the fixed part. A node with `_target_` gets its keys and types from the signature of that class or function, so that
a new component needs only a Python file and a YAML file. types.py interprets the annotations as text; they are never evaluated.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from meshformer.config import types
from meshformer.config.allow import check_target
from meshformer.config.errors import ConfigError
from meshformer.config.paths import conf_dir
from meshformer.config.signature import Signature, TargetNotFound, signature
from meshformer.config.suggest import did_you_mean
from meshformer.config.trainer_keys import INSTEAD

if TYPE_CHECKING:
    PositiveInt = Count = int
    PositiveFloat = NonNegativeFloat = Share = float
    LayoutName = str  # one of the files of conf/strategy/
    Target = dict[str, Any]  # a node with _target_
    Targets = dict[str, Any]  # name -> a node with _target_, or null

MISSING = "???"
FROM_THE_MODEL = ("named_parameters", "all_names", "blocks")  # arguments of an optimizer that tasks/base.py passes
PLAN = "meshformer.model.layout.Plan"
# job/build.py passes further arguments to the objects of these nodes, so their required arguments may be absent here.
FILLED_BY_BUILD = ("model", "task", "callbacks", "logger")
# Names in torch and in papers for pipeline schedules that keep the first and the last stage on one rank.
V_SHAPED = re.compile(r"zbv|dual_?pipe|^v_|bubble_?v", re.IGNORECASE)
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_"}


@dataclass
class Paths:
    data: str
    runs: str


@dataclass
class Trainer:
    max_steps: PositiveInt | None
    devices: Literal["auto"] | PositiveInt = "auto"
    num_nodes: PositiveInt = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    threads: Literal["auto"] | PositiveInt = "auto"
    max_epochs: PositiveInt | None = None
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "auto"
    matmul_precision: Literal["highest", "high"] = "highest"
    log_every_n_steps: PositiveInt = 10
    val_check_interval: PositiveInt = 500
    limit_val_batches: PositiveInt | None = None
    gradient_clip_val: PositiveFloat | None = None
    accumulate_grad_batches: PositiveInt = 1
    progress: bool = True
    deterministic: bool = False
    overfit_batches: PositiveInt | None = None
    detect_anomaly: bool = False
    profiler: Literal["simple", "advanced"] | None = None
    compile: Literal["auto"] | bool = False  # the default for recorded runs that are older than this setting
    float8: bool = False


@dataclass
class Data:
    source: Target
    batch_size: PositiveInt
    context_length: PositiveInt
    eval_batch_size: PositiveInt | None = None
    tokenizer: Literal["char", "bpe", "pretrained"] = "char"
    vocab_size: PositiveInt = 1024
    workers: Count = 0
    files: str | list[str] | None = None
    kind: Literal["corpus", "texts", "images", "speech", "own", "auto"] = "corpus"
    validation_files: str | list[str] | None = None
    test_files: str | list[str] | None = None
    text_feature: str | None = None
    tokens_feature: str | None = None
    image_feature: str | None = None
    label_feature: str | None = None
    file: str | None = None
    validation_file: str | None = None
    text_column: str = "text"
    label_column: str | None = None
    pair_column: str | None = None
    validation_fraction: Share = 0.2
    classes: list[str] | None = None
    packing: bool = False
    image_size: PositiveInt | None = None
    shift: NonNegativeFloat = 0.0
    rotate: NonNegativeFloat = 0.0
    zoom: NonNegativeFloat = 0.0
    language: str = "en"
    folder: str | None = None
    audio_column: str = "file"
    sample_rate: PositiveInt = 16000
    mels: PositiveInt | None = None
    scaling: Literal["clip", "whisper"] = "clip"
    frames_per_token: Literal[2, 4] | None = None
    speeds: list[PositiveFloat] = field(default_factory=lambda: [1.0])
    mask_mels: Count = 0
    mask_frames: Count = 0
    skip_bad: bool = False


@dataclass
class Lora:
    """Low-rank adapters (LoRA); rank=null disables them."""

    rank: PositiveInt | None = None
    alpha: PositiveFloat = 16.0
    targets: list[str] = field(default_factory=lambda: ["q", "v"])


@dataclass
class Stage:
    name: Literal["pretrain", "finetune"]
    init_from: str | None = None
    pretrain: list[str] | None = None
    lr_scale: PositiveFloat = 1.0
    freeze: list[str] = field(default_factory=list)
    reinit: list[str] = field(default_factory=list)
    layer_decay: Share = 1.0
    head_lr_scale: PositiveFloat = 1.0
    unfreeze_every: PositiveInt | None = None
    lora: Lora = field(default_factory=lambda: {"rank": None, "alpha": 16.0, "targets": ["q", "v"]})  # pyright: ignore[reportAssignmentType]


@dataclass
class Strategy:
    """`single` and `ddp` use Lightning's strategies; every other name is our mesh strategy with different degrees."""

    name: LayoutName
    replicate: Literal[-1] | PositiveInt = 1
    shard: Literal[-1] | PositiveInt = 1
    context: Literal[-1] | PositiveInt = 1
    tensor: Literal[-1] | PositiveInt = 1
    pipeline: Literal[-1] | PositiveInt = 1
    timeout: PositiveFloat = 600
    sequence_parallel: bool = True
    loss_parallel: bool = False
    async_tensor_parallel: bool = False
    context_method: Literal["all_gather", "ulysses"] = "all_gather"
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble"] = "1f1b"
    microbatches: Literal["auto"] | PositiveInt = "auto"
    stages_per_rank: Literal["auto"] | PositiveInt = "auto"
    blocks_per_stage: list[PositiveInt] | None = None
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    param_dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    reduce_dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    reshard_after_forward: Literal["auto"] | bool = "auto"
    cpu_offload: bool = False
    reduce_gradients: Literal["last", "every"] = "last"


@dataclass
class Launch:
    max_restarts: Count = 0
    requeue: bool = False


@dataclass
class Root:
    """The configuration of `meshformer train`, also stored as config.yaml."""

    seed: Count
    experiment: str
    paths: Paths
    trainer: Trainer
    data: Data
    model: Target
    optimizer: Target
    schedule: Target
    task: Target
    stage: Stage
    strategy: Strategy
    launch: Launch = field(default_factory=lambda: {"max_restarts": 0, "requeue": False})  # pyright: ignore[reportAssignmentType]  # configs are dicts
    callbacks: Targets = field(default_factory=dict)
    logger: Targets = field(default_factory=dict)
    allow: list[str] = field(default_factory=list)
    run: str | None = None
    resume: str | None = None
    fork: str | None = None


@dataclass
class RunsPath:
    runs: str


@dataclass
class Evaluate:
    """Options of `meshformer evaluate`."""

    run: str
    paths: Paths
    split: Literal["val", "test"] = "val"
    allow: list[str] = field(default_factory=list)


@dataclass
class Generate:
    """Options of `meshformer generate`."""

    run: str
    paths: RunsPath
    prompt: str = "\n"
    audio: str | list[str] | None = None
    max_tokens: PositiveInt = 500
    temperature: NonNegativeFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: Share | None = None
    seed: Count = 1
    count: PositiveInt = 1
    allow: list[str] = field(default_factory=list)


@dataclass
class Convert:
    """Options of `meshformer convert`."""

    run: str
    to: Literal["sharded", "single", "safetensors", "tfrecord"]
    paths: Paths
    checkpoint: Count | str | None = None
    output: str | None = None
    allow: list[str] = field(default_factory=list)


@dataclass
class Litert:
    """Of `meshformer export format=litert`."""

    python: str | None = None
    length: PositiveInt | None = None


@dataclass
class Export:
    """Options of `meshformer export`."""

    run: str
    format: Literal["huggingface", "safetensors", "adapter", "onnx", "torch_export", "litert"]
    paths: Paths
    checkpoint: Count | str | None = None
    output: str | None = None
    litert: Litert = field(default_factory=lambda: {"python": None, "length": None})  # pyright: ignore[reportAssignmentType]


@dataclass
class Sweep:
    """Options of `-m`, which are not part of the runs' own configuration."""

    jobs: Literal["auto"] | PositiveInt = "auto"
    fail_fast: bool = False
    resume: str | None = None
    retry_failed: bool = False
    minimize: list[str] = field(default_factory=lambda: ["val/loss"])
    maximize: list[str] = field(default_factory=list)
    search: Literal["tpe", "random"] | None = None
    trials: PositiveInt = 20
    pruner: Literal["median", "hyperband"] | None = None


@dataclass
class SweepOptions:
    sweep: Sweep


def layouts() -> list[str]:
    """Return the option names of conf/strategy/."""
    return sorted(file.stem for file in (conf_dir() / "strategy").glob("*.yaml"))


# Sizes of models that conf/model/ takes from the data: an example of data that has them.
FROM_DATA = {
    "model.image_size": "task=image_classification data=digits, or give data.image_size",
    "model.mels": "task=speech_recognition data=prompts",
    "model.subsampling": "task=speech_recognition data=prompts",
}
SECTIONS: dict[str, type] = {c.__name__: c for c in (Paths, Trainer, Data, Lora, Stage, Strategy, Launch, RunsPath, Litert, Sweep)}


def validate(config: dict[str, Any], schema: type = Root) -> dict[str, Any]:
    """Check keys and types, and return the same settings with the schema's defaults filled in.

    Raises ConfigError with the key, the value, what is expected and a suggestion. Components are not imported: their sources are parsed.
    """
    allow = config.get("allow")
    return _section(config, schema, "", tuple(allow) if isinstance(allow, list) else ())


def _section(node: Any, schema: type, path: str, allow: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise ConfigError("must be a group of settings", path, node)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key in node:
        if schema is Trainer and key in INSTEAD:
            raise ConfigError("is an argument of Lightning's that is no setting here", _join(path, key), fix=INSTEAD[key])
        if key not in fields:
            raise ConfigError("there is no such setting", _join(path, key), fix=did_you_mean(key, fields))
    checked: dict[str, Any] = {}
    for name, spec in fields.items():
        key = _join(path, name)
        if name not in node:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise ConfigError("is missing from the configuration", key)
            checked[name] = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        else:
            checked[name] = _value(node[name], str(spec.type), key, allow)
    return checked


def _value(value: Any, kind: str, key: str, allow: tuple[str, ...]) -> Any:
    if kind == "LayoutName":
        kind = f"Literal[{', '.join(map(repr, layouts()))}]"
    if kind in SECTIONS:
        return _section(value, SECTIONS[kind], key, allow)
    if kind == "Target":
        _target(value, key, allow)
    elif kind == "Targets":
        if not isinstance(value, dict):
            raise ConfigError("must be a group of named parts, or {}", key, value)
        for name, node in value.items():
            if node is not None:
                _target(node, _join(key, name), allow)
    else:
        _typed(value, types.parse(kind), key)
    return value


def _target(node: Any, key: str, allow: tuple[str, ...]) -> None:
    """Check a node with `_target_` and those inside it: the target is allowed and exists, and the arguments fit its signature."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError("needs a _target_: the dotted name of a class or function", key, None if isinstance(node, dict) else node)
    target = node["_target_"]
    at = f"{key}._target_"
    check_target(target, allow, at)
    try:
        found = signature(target)
    except TargetNotFound as error:
        raise ConfigError(f"{error}", at, target, fix=did_you_mean(target.rpartition(".")[2], error.known)) from None
    check_target(target, allow, at, module=found.module)
    _arguments(node, found, key, allow)


def _arguments(node: dict[str, Any], found: Signature, key: str, allow: tuple[str, ...]) -> None:
    name = node["_target_"].rpartition(".")[2]
    for argument, value in node.items():
        at = _join(key, argument)
        if argument in HYDRA_KEYS:
            fits = isinstance(value, bool) if argument in ("_partial_", "_recursive_") else isinstance(value, str)
            if not fits:
                raise ConfigError("is not a valid value here", at, value, fix="Leave it out.")
            continue
        if key == "optimizer" and argument in FROM_THE_MODEL:
            raise ConfigError("comes from the model", at, fix="Leave it out.")
        if at == "schedule.optimizer":
            raise ConfigError("is the run's own optimizer", at, fix="Leave it out.")
        parameter = found.parameters.get(argument)
        if at == "model.plan" and parameter is None:
            _plan(value, allow)
            continue
        if parameter is None and not found.open_ended:
            fix = did_you_mean(argument, found.parameters) if found.parameters else None
            raise ConfigError(f"{name} takes no such argument", at, fix=fix)
        if isinstance(value, dict) and "_target_" in value:
            _target(value, at, allow)
        else:
            _typed(value, parameter.annotation if parameter else None, at)
            for index, item in enumerate(value if isinstance(value, list) else []):
                if isinstance(item, dict) and "_target_" in item:
                    _target(item, f"{at}[{index}]", allow)
    if not node.get("_partial_") and (key == "model" or key.partition(".")[0] not in FILLED_BY_BUILD):
        filled = {"model": ("seed", "vocab_size"), "schedule": ("optimizer", "max_steps")}.get(key, ())
        for argument, parameter in found.parameters.items():
            if parameter.required and argument not in node and argument not in filled:
                raise ConfigError(f"{name} needs it", _join(key, argument), fix=f"Add {_join(key, argument)}=…")


def _plan(value: Any, allow: tuple[str, ...]) -> None:
    """Check model.plan, which says how to parallelise a class without a plan of its own: settings of a Plan, or the dotted name of one."""
    if isinstance(value, str) and value != MISSING:
        check_target(value, allow, "model.plan")
        return
    if not isinstance(value, dict):
        raise ConfigError("must be the settings of a plan, or the dotted name of one", "model.plan", value)
    fields = signature(PLAN).parameters
    for key, setting in value.items():
        if key not in fields:
            raise ConfigError("a plan has no such setting", f"model.plan.{key}", fix=did_you_mean(str(key), fields))
        _typed(setting, fields[key].annotation, f"model.plan.{key}")


def _as_text(value: Any) -> Any:
    """Convert numbers and booleans to the text that the user may have meant."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


def _typed(value: Any, annotation: Any, key: str) -> None:
    if value == MISSING:
        raise ConfigError("needs a value", key, fix=f"Add {key}=… to the command.")
    if key == "model.vocab_size" and value is None:
        return  # taken from the tokenizer, which exists only after the text is read
    if types.fits(value, annotation):
        return
    if value is None and key in FROM_DATA:
        raise ConfigError("is taken from the data, which has none", key, fix=f"Use {FROM_DATA[key]}, or another model.")
    if key == "strategy.schedule" and V_SHAPED.search(str(value)):
        raise ConfigError("V-shaped schedules cannot evaluate in torch 2.13", key, value, fix="Use interleaved_zero_bubble.")
    if isinstance(value, int) and abs(value) >= types.LARGEST:
        raise ConfigError("is too large", key, value, fix="Use a number below 2^63.")
    if types.fits(as_text := _as_text(value), annotation) and as_text != value:
        written = ",".join(f'"{item}"' for item in as_text) if isinstance(as_text, list) else f'"{as_text}"'
        quoted = f"'{key}=[{written}]'" if isinstance(as_text, list) else f"'{key}={written}'"
        raise ConfigError(f"expected {types.describe(annotation)}", key, value, fix=f"Write {quoted}.")
    choices = types.literals(annotation)
    fix = did_you_mean(value, choices) if choices and isinstance(value, str) else None
    expected = f"expected {types.describe(annotation)}"
    raise ConfigError(expected if value is not None else f"null is not allowed here; {expected}", key, value, fix=fix)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
