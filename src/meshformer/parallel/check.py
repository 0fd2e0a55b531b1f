"""Checks of the parallel layout: its degrees against the processes, the model and the batch, and settings that it would ignore.

Each function takes a resolved configuration and raises ConfigError for the first error.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from math import gcd
from typing import Any

from meshformer.config.degrees import AXES, Degrees, uses_fsdp
from meshformer.config.errors import ConfigError
from meshformer.config.resolve import compute_capability, external_launcher, gpus_multiply_bf16, microbatch_counts, visible_gpus
from meshformer.config.schema import Strategy
from meshformer.config.signature import attribute, declares, signature
from meshformer.model.settings import feed_forward_width, sequence_length

Config = dict[str, Any]
# Settings that belong to one mesh axis; settings that every mesh layout has.
OF_AXIS = {
    "sequence_parallel": "tensor", "loss_parallel": "tensor", "async_tensor_parallel": "tensor", "context_method": "context", "schedule": "pipeline",
    "microbatches": "pipeline", "stages_per_rank": "pipeline", "blocks_per_stage": "pipeline",
}  # fmt: skip
OF_MESH = ("param_dtype", "reduce_dtype", "reshard_after_forward", "cpu_offload", "reduce_gradients")
# The resolved value of each setting that was not given: the schema's default, or what `auto` becomes without that axis or without a mesh.
UNSET = {field.name: field.default for field in fields(Strategy)} | {
    "microbatches": 1, "stages_per_rank": 1, "param_dtype": None, "reduce_dtype": None, "reshard_after_forward": True,
}  # fmt: skip
BF16 = ("bf16-mixed", "bf16-true")
FLOAT8_CAPABILITY = (8, 9)  # compute capability from which GPUs have float8 matrix units


def check_processes(config: Config) -> None:
    """Checks the degrees against trainer.devices, trainer.num_nodes and the visible GPUs."""
    trainer, strategy = config["trainer"], config["strategy"]
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    if strategy["name"] == "single" and devices * nodes != 1:
        key, value = ("trainer.devices", devices) if devices != 1 else ("trainer.num_nodes", nodes)
        if (around := external_launcher()) is not None:
            message = f"{around.variables} in the environment say that a launcher started {around.world} processes, and strategy=single is one"
            raise ConfigError(message, fix=f"Use strategy=ddp, or, where they are left over, unset {around.variables.replace(' and ', ' ')}.")
        raise ConfigError("strategy=single is one process", key, value, fix="Use strategy=ddp, or leave it out.")
    if strategy["name"] in ("single", "ddp"):
        _refuse_axes(strategy)
    Degrees.from_config(strategy).resolved(devices * nodes, nodes)
    if trainer["accelerator"] == "gpu":
        gpus = visible_gpus()
        if not gpus:
            raise ConfigError("no NVIDIA GPU that this torch can use is visible", "trainer.accelerator", "gpu", fix="Use cpu or auto.")
        if devices > gpus:
            raise ConfigError(f"only {gpus} GPUs are visible", "trainer.devices", devices, fix=f"Use at most {gpus}.")


def _refuse_axes(strategy: Config) -> None:
    """strategy=single and ddp are Lightning's, which split the batch only: every other axis must be 1."""
    name = strategy["name"]
    for axis in AXES if name == "single" else AXES[1:]:
        degree = strategy[axis]
        if degree == 1:
            continue
        if name == "single":
            message = "strategy=single holds one copy of the model" if axis == "replicate" else "strategy=single is one process"
            fix = {"replicate": "ddp", "shard": "fsdp"}.get(axis, axis)
            raise ConfigError(message, f"strategy.{axis}", degree, fix=f"Use strategy={fix}.")
        message = "strategy=ddp holds whole copies of the model"
        if axis == "pipeline":
            message = "DDP in a pipeline dies in an internal assert or silently gives wrong gradients"
        instead = "hsdp" if axis == "shard" else f"fsdp_{axis}"
        fix = f"Use strategy={instead}, or strategy=mesh strategy.replicate={2 if degree == -1 else -1} strategy.{axis}={degree}."
        raise ConfigError(message, f"strategy.{axis}", degree, fix=fix)


def check_settings(config: Config) -> None:
    """Refuses settings that this layout would ignore or does not support."""
    trainer, strategy = config["trainer"], config["strategy"]
    name = strategy["name"]
    if trainer["float8"]:
        _float8(config)
    for setting, axis in OF_AXIS.items():
        if strategy[axis] == 1 and strategy[setting] != UNSET[setting]:
            message = f"is about the {axis} axis and would be ignored, as strategy.{axis} is 1"
            fix = f"Leave it out, or use a layout with that axis, such as strategy={axis}."
            raise ConfigError(message, f"strategy.{setting}", _plain(strategy[setting]), fix=fix)
    if name in ("single", "ddp"):
        for setting in OF_MESH:
            if strategy[setting] != UNSET[setting]:
                message = f"strategy={name} has no such setting and would ignore it"
                fix = "Leave it out, or use another layout, such as strategy=fsdp."
                raise ConfigError(message, f"strategy.{setting}", _plain(strategy[setting]), fix=fix)
        return
    if trainer["precision"] == "16-mixed":
        message = f"strategy={name} has no gradient scaler, without which half precision loses small gradients"
        raise ConfigError(message, "trainer.precision", "16-mixed", fix="Use bf16-mixed, or strategy=ddp.")
    if strategy["cpu_offload"] and trainer["accelerator"] == "cpu":
        raise ConfigError("on a CPU there is nothing to offload from", "strategy.cpu_offload", "true", fix="Leave it out.")
    _fsdp_alone(strategy)
    if strategy["async_tensor_parallel"]:
        _async_tensor_parallel(trainer, strategy)
    for axis in ("tensor", "context", "pipeline"):
        if strategy[axis] > 1 and not has_plan(config["model"]):
            message = f"declares no plan (meshformer.model.Plan), which strategy.{axis}={strategy[axis]} needs"
            fix = "See docs/make_it_yours/model.md, or use strategy=fsdp or ddp."
            raise ConfigError(message, "model._target_", config["model"]["_target_"], fix=fix)


def has_plan(model: Config) -> bool:
    """Whether the model declares a Plan, judged by its source. A `_target_` that is a function counts as yes: only the job can tell."""
    target = model["_target_"]
    return bool(model.get("plan")) or declares(target, "plan") or not signature(target).is_class


def _float8(config: Config) -> None:
    """Checks trainer.float8 (parallel/products.py)."""
    trainer, model, strategy = config["trainer"], config["model"], config["strategy"]
    width, heads = model.get("d_model") or 16, model.get("n_heads") or 1
    head = model.get("head_dim") or width // heads
    sizes = {
        "d_model": width,
        "d_ff": model.get("d_ff") or 16,
        "n_heads": heads * head,
        "n_kv_heads": (model.get("n_kv_heads") or heads) * head,
    }
    odd = [key for key, size in sizes.items() if size % 16]
    least = compute_capability()
    refusals = [
        (trainer["accelerator"] != "gpu", "only GPUs multiply float8 matrices", "Leave it out."),
        (least is not None and least < FLOAT8_CAPABILITY, "this machine's GPUs multiply no float8 matrices", "Leave it out."),
        (find_spec("torchao") is None, "needs the package torchao, which is not installed", "Install it with pip install torchao."),
        (not trainer["compile"], "is slower than bfloat16 unless it is compiled", "Add trainer.compile=true."),
        (
            not trainer["precision"].startswith("bf16"),
            f"works with bfloat16 only, not {trainer['precision']}",
            "Use trainer.precision=bf16-mixed.",
        ),
        (strategy["tensor"] > 1, "does not work with tensor parallelism (strategy.tensor)", "Leave it out, or use strategy=fsdp."),
        (not model["_target_"].startswith("meshformer.model."), "is for the blocks of this package's models", "Leave it out."),
        ((config["stage"].get("lora") or {}).get("rank"), "is not for layers with adapters", "Leave it or stage.lora.rank out."),
        (
            odd,
            f"needs layer sizes that are multiples of 16, and that of model.{odd[0] if odd else ''} is not",
            "Leave it out, or use another size.",
        ),
    ]
    for wrong, message, fix in refusals:
        if wrong:
            raise ConfigError(message, "trainer.float8", "true", fix=fix)


def _async_tensor_parallel(trainer: Config, strategy: Config) -> None:
    refusals = [
        (trainer["accelerator"] != "gpu", "overlaps products with transfers between GPUs, and this run is on a CPU", "Leave it out."),
        (not trainer["compile"], "is torch.compile's work", "Add trainer.compile=true."),
        (not strategy["sequence_parallel"], "overlaps the exchanges of sequence parallel", "Leave strategy.sequence_parallel=false out."),
        (
            trainer["devices"] % strategy["tensor"],
            f"needs each group of strategy.tensor={strategy['tensor']} inside a node, and a node has trainer.devices={trainer['devices']}",
            "Use a degree that divides it.",
        ),
    ]
    for wrong, message, fix in refusals:
        if wrong:
            raise ConfigError(message, "strategy.async_tensor_parallel", "true", fix=fix)


def check_precision(config: Config) -> None:
    """Checks trainer.precision against the matrix units of the device."""
    if config["trainer"]["precision"] == "16-mixed" and config["trainer"]["accelerator"] == "cpu":
        raise ConfigError("half precision needs a GPU", "trainer.precision", "16-mixed", fix="Use bf16-mixed, 32-true or auto.")
    if config["trainer"]["accelerator"] == "gpu" and config["trainer"]["precision"] in BF16 and not gpus_multiply_bf16():
        raise no_bf16(config["trainer"]["precision"])


def no_bf16(precision: str) -> ConfigError:
    """The error for a GPU older than Ampere (V100, T4)."""
    message = "this machine's GPU has no bfloat16 matrix units, and would emulate them"
    return ConfigError(message, "trainer.precision", precision, fix="Use 32-true, or 16-mixed with strategy=single or ddp.")


def _fsdp_alone(strategy: Config) -> None:
    """Refuses FSDP settings that would be ignored."""
    pipeline, uses = strategy["pipeline"] > 1, uses_fsdp(strategy)
    if not uses and strategy["reshard_after_forward"] == pipeline:  # `auto` resolves to the opposite value
        message = "is a setting of FSDP and would be ignored, since this layout does not shard parameters over the data"
        value = _plain(strategy["reshard_after_forward"])
        raise ConfigError(message, "strategy.reshard_after_forward", value, fix="Leave it out, or use strategy=fsdp.")
    if strategy["reduce_gradients"] == "every" and (pipeline or not uses):
        message = "would be ignored: " + ("a pipeline reduces at the end of each schedule" if pipeline else "nothing is reduced by FSDP")
        raise ConfigError(message, "strategy.reduce_gradients", "every", fix="Leave it out, or use strategy=fsdp.")


def check_batch(config: Config) -> None:
    """Checks that data.batch_size divides by the data-parallel degree times the accumulation."""
    batch, accumulation = config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"]
    degrees = Degrees.from_config(config["strategy"])
    slices = degrees.data * accumulation
    if batch % slices:
        factors = [f"strategy.{axis}={getattr(degrees, axis)}" for axis in ("replicate", "shard") if getattr(degrees, axis) > 1]
        factors += [f"trainer.accumulate_grad_batches={accumulation}"] if accumulation > 1 else []
        sizes = _nearest(batch, slices)
        fix = f"The nearest sizes that do are {' and '.join(sizes)}." if len(sizes) > 1 else f"The nearest size that does is {sizes[0]}."
        raise ConfigError(f"does not divide by {slices} ({' × '.join(factors)})", "data.batch_size", batch, fix=fix)


def check_cut(config: Config) -> None:
    """Checks the model, the sequence length and the micro-batches against the tensor, context and pipeline axes."""
    _tensor(config)
    _context(config)
    _pipeline(config)


def _tensor(config: Config) -> None:
    model, strategy, tensor = config["model"], config["strategy"], config["strategy"]["tensor"]
    width = model.get("d_ff")
    if width is None and "d_model" in model and attribute(model["_target_"], "usual_settings"):
        width = feed_forward_width(model["d_model"], model.get("activation", ""))
    sizes = {key: size for key, size in {**_heads(model), "d_ff": width}.items() if isinstance(size, int)}
    for key, size in sizes.items():
        if size % tensor:
            usable = [n for n in _divisors(gcd(*sizes.values())) if n < tensor]
            fix = f"Use strategy.tensor={_either(usable)}, or another model.{key}."
            raise ConfigError(f"model.{key}={size} does not divide by it", "strategy.tensor", tensor, fix=fix)
    parts, length = tensor * strategy["context"], sequence_length(model, config["data"]["context_length"])
    if tensor > 1 and strategy["sequence_parallel"] and length % parts:
        factors = " × ".join(f"strategy.{axis}={strategy[axis]}" for axis in ("tensor", "context") if strategy[axis] > 1)
        message = f"does not divide by {parts} ({factors}), as sequence parallel must"
        if model.get("patch_size"):
            key, fix = ("pooling", "model.pooling=mean") if model.get("pooling") == "cls" else ("patch_size", "another model.patch_size")
            message = f"the number of an image's tokens, {length}, {message}"
            raise ConfigError(message, f"model.{key}", model[key], fix=f"Use {fix}, or strategy.sequence_parallel=false.")
        fix = f"Use {_either(_nearest(length, parts))}, or strategy.sequence_parallel=false."
        raise ConfigError(message, "data.context_length", length, fix=fix)


def _context(config: Config) -> None:
    model, strategy = config["model"], config["strategy"]
    context, tensor, length = strategy["context"], strategy["tensor"], config["data"]["context_length"]
    if length % context:
        fix = f"Use {_either(_nearest(length, context))}."
        raise ConfigError(f"does not divide by strategy.context={context}", "data.context_length", length, fix=fix)
    if strategy["context_method"] != "ulysses":
        return
    for key, heads in _heads(model).items():
        if heads // tensor % context:
            each = f"model.{key}={heads}" + (f" / strategy.tensor={tensor} = {heads // tensor}" if tensor > 1 else "")
            message = f"ulysses shards the heads, and {each} does not divide by it"
            usable = [n for n in _divisors(gcd(*(n // tensor for n in _heads(model).values()))) if n < context]
            fix = f"Use strategy.context={_either(usable)}, or strategy.context_method=all_gather."
            raise ConfigError(message, "strategy.context", context, fix=fix)


def _pipeline(config: Config) -> None:
    strategy, layers = config["strategy"], config["model"].get("n_layers")  # None: a model without that setting
    pipeline, per_rank, schedule = strategy["pipeline"], strategy["stages_per_rank"], strategy["schedule"]
    if pipeline == 1:
        return
    interleaved = schedule.startswith("interleaved")
    if interleaved == (per_rank == 1):
        needs = "at least 2 stages a process" if interleaved else "one stage a process"
        fix = "Use strategy.schedule=1f1b, or 2 and more." if interleaved else "Leave it out, or use strategy.schedule=interleaved_1f1b."
        raise ConfigError(f"strategy.schedule={schedule} has {needs}", "strategy.stages_per_rank", per_rank, fix=fix)
    stages = pipeline * per_rank
    product = f"strategy.pipeline={pipeline}" + (f" × strategy.stages_per_rank={per_rank} = {stages}" if per_rank > 1 else "")
    if layers is not None and layers < stages:
        fewer = f", or at most strategy.pipeline={layers // per_rank}" if layers // per_rank > 1 else ""
        fewer += ", or strategy.schedule=1f1b" if interleaved and layers >= pipeline else ""
        message = f"fewer layers than pipeline stages ({product}), each of which needs a block"
        raise ConfigError(message, "model.n_layers", layers, fix=f"Use at least {stages}{fewer}.")
    blocks = strategy["blocks_per_stage"]
    if blocks is not None and (len(blocks) != stages or (layers is not None and sum(blocks) != layers)):
        wrong = f"{len(blocks)} numbers for {stages} stages ({product})" if len(blocks) != stages else f"the sum is {sum(blocks)}"
        known = "the number of the model's blocks" if layers is None else f"model.n_layers={layers}"
        fix = f"Give {stages} numbers that add up to {known}, or null."
        raise ConfigError(wrong, "strategy.blocks_per_stage", _plain(blocks), fix=fix)
    if schedule == "interleaved_zero_bubble":  # two backward passes per block: one for the inputs, one for the weights
        if strategy["activation_checkpointing"] == "selective":
            message = "selective checkpointing allows one backward pass, and strategy.schedule=interleaved_zero_bubble makes two"
            fix = "Use full, or strategy.schedule=interleaved_1f1b."
            raise ConfigError(message, "strategy.activation_checkpointing", "selective", fix=fix)
        if config["trainer"]["compile"]:
            message = "a compiled block has one backward pass, and strategy.schedule=interleaved_zero_bubble needs two"
            raise ConfigError(message, "trainer.compile", "true", fix="Use trainer.compile=false, or strategy.schedule=interleaved_1f1b.")
    _microbatches(config)


def _microbatches(config: Config) -> None:
    strategy, batch = config["strategy"], config["data"]["batch_size"]
    pipeline, schedule, asked = strategy["pipeline"], strategy["schedule"], strategy["microbatches"]
    slices = Degrees.from_config(strategy).data * config["trainer"]["accumulate_grad_batches"]
    samples = batch // slices
    usable = microbatch_counts(samples, pipeline, schedule)
    if asked in usable:
        return
    have = f"data.batch_size={batch}" + (f" / {slices} = {samples}" if slices > 1 else "")
    if samples % asked:
        message = f"a replica's samples at a time, {have}, do not divide by it"
    elif asked < pipeline:
        message = f"{schedule} needs at least strategy.pipeline={pipeline} of them"
    else:
        message = f"{schedule} needs a multiple of strategy.pipeline={pipeline}"
    if usable:
        fix = f"Use {'auto, or ' if usable[0] <= 4 * pipeline else ''}{_either(usable)}."
    else:
        fix = f"No number suits {have}: use data.batch_size={_either(_nearest(batch, slices * pipeline))}."
    raise ConfigError(message, "strategy.microbatches", asked, fix=fix)


def _heads(model: Config) -> dict[str, int]:
    """n_heads and n_kv_heads, if the model has these settings."""
    heads = model.get("n_heads")
    return {} if not isinstance(heads, int) else {"n_heads": heads, "n_kv_heads": model.get("n_kv_heads") or heads}


def _nearest(value: int, step: int) -> list[str]:
    """The multiples of `step` just below and above `value`."""
    below = value // step * step
    return [str(n) for n in (below, below + step) if n]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _either(choices: list[Any]) -> str:
    *most, last = [str(choice) for choice in choices]
    return f"{', '.join(most)} or {last}" if most else last


def _plain(value: Any) -> str:
    """The value as a user types it on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
