"""Replace `auto` by the values for this machine, and make files and paths absolute. Without torch."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from meshformer.config.degrees import AXES, Degrees, uses_fsdp
from meshformer.config.errors import ConfigError

BF16_FROM = 8  # major compute capability of Ampere
CPU_PROCESSES = 2  # degree of an axis of -1 on a CPU, if trainer.devices is auto


@dataclass(frozen=True)
class ExternalLauncher:
    """This process's place among those that torchrun or srun started."""

    rank: int
    world: int
    local_world: int
    variables: str = field(default="", compare=False)  # the environment variables it was detected by, for messages

    @property
    def nodes(self) -> int:
        return self.world // self.local_world


def external_launcher(env: Mapping[str, str] | None = None) -> ExternalLauncher | None:
    """Detect torchrun or srun from the environment; return None if neither started this process."""
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _number(env, "WORLD_SIZE", 1)
        return ExternalLauncher(_number(env, "RANK", 0), world, _number(env, "LOCAL_WORLD_SIZE", 1, world), "RANK and WORLD_SIZE")
    # Only srun sets SLURM_STEP_NUM_TASKS; SLURM_NTASKS is also set in a batch script, before srun has started anything.
    if "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1, 1) > 1:
        world, nodes = _number(env, "SLURM_STEP_NUM_TASKS", 1), _number(env, "SLURM_STEP_NUM_NODES", 1, 1)
        return ExternalLauncher(_number(env, "SLURM_PROCID", 0), world, world // nodes, "SLURM_PROCID and SLURM_STEP_NUM_TASKS")
    return None


def _number(env: Mapping[str, str], name: str, least: int, default: int | None = None) -> int:
    text = env.get(name, str(default))
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise ConfigError(f"expected a whole number of at least {least}", f"the environment variable {name}", text, fix=f"Unset it: unset {name}.")
    return int(text)


def resolve(config: dict[str, Any], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a copy of a validated configuration with every `auto` and -1 of trainer and strategy replaced, and data.files and paths absolute.

    trainer.compile stays `auto`, since it depends on the resolved configuration.
    """
    env = os.environ if env is None else env
    config = {**config, **{name: dict(config[name]) for name in ("trainer", "strategy", "data", "paths")}}
    trainer, strategy, data, paths = config["trainer"], config["strategy"], config["data"], config["paths"]
    paths["data"] = str(Path(paths["data"]).expanduser())
    if data["source"].get("cache") is not None:
        data["source"] = {**data["source"], "cache": str(Path(data["source"]["cache"]).expanduser())}
    if data["kind"] == "auto":
        data["kind"] = _kind_of_records(data)
    for key in ("files", "validation_files", "test_files"):
        if data[key] is not None:
            data[key] = _files(data[key], f"data.{key}")
            data["source"] = {**data["source"], key: list(data[key])}  # a copy: YAML would write an alias
    for key in ("file", "validation_file"):
        if data[key] is not None:
            data[key] = os.path.abspath(os.path.expanduser(data[key]))
            data["source"] = {**data["source"], key: data[key]}

    gpus = visible_gpus(env)
    if trainer["accelerator"] == "auto":
        trainer["accelerator"] = "gpu" if gpus else "cpu"
    on_gpu = trainer["accelerator"] == "gpu"
    external = external_launcher(env)
    if external is not None:
        _apply_launcher(trainer, external)
    if trainer["devices"] == "auto":
        trainer["devices"] = _devices(strategy, trainer["num_nodes"], gpus if on_gpu else 0)
    _settle_strategy(strategy, trainer, data["batch_size"])
    if trainer["threads"] == "auto":
        trainer["threads"] = max(1, cores() // trainer["devices"])
    if trainer["precision"] == "auto":
        trainer["precision"] = "bf16-mixed" if (gpus_multiply_bf16() if on_gpu else cpu_multiplies_bf16()) else "32-true"
    _settle_types(strategy, trainer["precision"], on_gpu or config["model"]["_target_"].startswith("meshformer.model."))
    if config["optimizer"].get("dtype") == "auto" and trainer["precision"] == "32-true":
        # With Muon in bf16, rounding differences between layouts grow to 1e-5 of the loss within ten steps.
        config["optimizer"]["dtype"] = "float32"
    return config


def visible_gpus(env: Mapping[str, str] | None = None) -> int:
    """Count the NVIDIA GPUs that this process may use; 0 if the installed torch has no CUDA."""
    env = os.environ if env is None else env
    if not _torch_has_cuda():
        return 0
    shown = env.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len(list(takewhile(lambda entry: entry.strip() not in {"", "-1"}, shown.split(","))))  # CUDA ignores all entries after an invalid one
    return len(glob.glob("/dev/nvidia[0-9]*"))


def cores() -> int:
    """Count the cores this process may use: its affinity, limited by the container's CPU quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(affinity, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or no limit ("max")
        return affinity


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bfloat16 matrix or vector units; without them bf16 is far slower than fp32."""
    try:
        return re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text()) is not None
    except OSError:
        return False


def gpus_multiply_bf16() -> bool:
    """Whether all NVIDIA GPUs have bfloat16 matrix units. True if that cannot be determined; the job checks again."""
    least = compute_capability()
    return least is None or least[0] >= BF16_FROM


def compute_capability() -> tuple[int, int] | None:
    """Return the lowest compute capability of this machine's NVIDIA GPUs, or None if it cannot be determined.

    This calls NVML rather than CUDA, because CUDA cannot be used in a process forked after it was initialised.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    count, device, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    found = []
    try:
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            known = not nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
            if known and not nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
                found.append((major.value, minor.value))
    finally:
        nvml.nvmlShutdown()
    return min(found, default=None)


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    try:
        text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


def microbatch_counts(samples: int, pipeline: int, schedule: str) -> list[int]:
    """Return the numbers of equal micro-batches that a pipeline schedule can split `samples` (of one replica) into."""
    least = 1 if schedule == "gpipe" else pipeline
    step = pipeline if schedule.startswith("interleaved") else 1
    small = [n for n in range(1, math.isqrt(max(samples, 0)) + 1) if samples % n == 0]
    divisors = sorted({*small, *(samples // n for n in small)})
    return [n for n in divisors if n >= least and n % step == 0]


def _degrees(strategy: dict[str, Any]) -> Degrees:
    """Return the strategy's degrees; for `single` and `ddp` only `replicate`, since check_settings refuses the others."""
    given = Degrees.from_config(strategy)
    return Degrees(given.replicate) if strategy["name"] in ("single", "ddp") else given


def _devices(strategy: dict[str, Any], num_nodes: int, gpus: int) -> int:
    if strategy["name"] == "single":
        return 1
    degrees = _degrees(strategy)
    if degrees.open_axis is not None:
        return gpus or CPU_PROCESSES * degrees.fixed
    if degrees.processes % num_nodes:
        axis = max(AXES, key=lambda axis: getattr(degrees, axis))
        message = f"{degrees} = {degrees.processes} does not divide by trainer.num_nodes={num_nodes}"
        raise ConfigError(message, f"strategy.{axis}", getattr(degrees, axis), f"Use a multiple of {num_nodes}.")
    return degrees.processes // num_nodes


def _settle_strategy(strategy: dict[str, Any], trainer: dict[str, Any], batch_size: int) -> None:
    degrees = _degrees(strategy)
    if (axis := degrees.open_axis) is not None:
        degrees = degrees.resolved(trainer["devices"] * trainer["num_nodes"], trainer["num_nodes"])
        strategy[axis] = getattr(degrees, axis)
    pipeline, schedule = degrees.pipeline, strategy["schedule"]
    if strategy["reshard_after_forward"] == "auto":
        strategy["reshard_after_forward"] = pipeline == 1  # in a pipeline, each micro-batch would gather all parameters again
    if strategy["stages_per_rank"] == "auto":
        strategy["stages_per_rank"] = 2 if pipeline > 1 and schedule.startswith("interleaved") else 1
    if strategy["microbatches"] == "auto":
        samples = max(1, batch_size // (degrees.data * trainer["accumulate_grad_batches"]))
        counts = [n for n in microbatch_counts(samples, pipeline, schedule) if n <= 4 * pipeline]
        # If no count suits the schedule, any divisor will do here: the check then reports the conflict.
        counts = counts or [n for n in microbatch_counts(samples, 1, "gpipe") if n <= 4 * pipeline]
        strategy["microbatches"] = counts[-1] if pipeline > 1 else 1


def _settle_types(strategy: dict[str, Any], precision: str, mixes: bool) -> None:
    """Set FSDP's mixed precision: with bf16-mixed, parameters are gathered and used in bf16; bf16 gradients are reduced in fp32 by default.

    `mixes`: the model's norms accept bf16 weights with fp32 activations. torch's own norms, which a user's model may have, do not on a CPU.
    """
    uses = uses_fsdp(strategy)
    if strategy["param_dtype"] == "auto":
        strategy["param_dtype"] = "bfloat16" if uses and mixes and precision == "bf16-mixed" else None
    in_bf16 = strategy["param_dtype"] == "bfloat16" or precision == "bf16-true"
    if strategy["reduce_dtype"] in ("auto", None):
        strategy["reduce_dtype"] = "float32" if uses and in_bf16 else None


def _apply_launcher(trainer: dict[str, Any], external: ExternalLauncher) -> None:
    for key, here in (("devices", external.local_world), ("num_nodes", external.nodes)):
        asked = trainer[key]
        if asked not in ("auto", here) and not (key == "num_nodes" and asked == 1):
            message = f"{external.variables} say that a launcher started {here} {'processes on this node' if key == 'devices' else 'nodes'}"
            fix = f"Leave it out, or unset {external.variables.replace(' and ', ' ')} where they are left over."
            raise ConfigError(message, f"trainer.{key}", asked, fix=fix)
        trainer[key] = here


def _kind_of_records(data: dict[str, Any]) -> str:
    """The `data.kind` of records, by the features that are named."""
    named = [name for name in ("text", "tokens", "image") if data[f"{name}_feature"] is not None]
    if not named:
        fix = "Add data.text_feature=…, data.tokens_feature=…, or data.image_feature=… data.label_feature=…."
        raise ConfigError("says nothing about what the records hold", "data", "tfrecord", fix=fix)
    if len(named) > 1:
        raise ConfigError(f"data.{named[0]}_feature is given too", f"data.{named[1]}_feature", data[f"{named[1]}_feature"], fix="Use one of them.")
    label = data["label_feature"]
    if named == ["image"] and label is None:
        raise ConfigError("images are learnt with their classes: say which feature holds them", "data.label_feature", fix="Add data.label_feature=….")
    if named == ["tokens"] and label is not None:
        raise ConfigError("labels belong to texts or images, and these are token ids", "data.label_feature", label, fix="Leave it out.")
    return "images" if named == ["image"] else "texts" if label is not None else "corpus"


def _files(given: str | list[str], key: str) -> list[str]:
    """Return absolute paths, since a run may be resumed from another folder, with patterns expanded in name order."""
    found: list[str] = []
    for item in [given] if isinstance(given, str) else given:
        path = os.path.abspath(os.path.expanduser(item))
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        if not matches:
            raise ConfigError("no file has a name like that", key, item)
        found += matches
    return found
