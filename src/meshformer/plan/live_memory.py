"""The bytes that one optimizer step of a run needs on one rank, counted without running it.

The run's own objects (model, strategy, optimizer, step) work on fake tensors, which have sizes and no memory, in a process group that
communicates with nobody. Counted is every tensor that is alive, as in torch's `memory_allocated`, and what its allocator would reserve for them.

Not counted: the context of a driver, NCCL's buffers, memory that a kernel uses inside, callbacks (an EMA is one more copy of the weights).
The operations are those of a CPU, also for a run on GPUs: there fused kernels make a chunk of the head's loss (model/head.py) and, with tensor
parallelism, norms that are not recomputed smaller. A run with trainer.compile is counted as if it were not compiled, which needs more.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshformer.compat.lightning import without_transfer_hook
from meshformer.compat.torch import fake_tensor_mode
from meshformer.compat.torch_distributed import init_fake_process_group
from meshformer.config.degrees import Degrees
from meshformer.config.errors import ConfigError
from meshformer.job.build import build_task, build_trainer, task_class
from meshformer.job.train import Start, configure_model, quiet_libraries
from meshformer.model.layout import retie, ties
from meshformer.optim.gather_compute_scatter import mesh_ranks
from meshformer.parallel.sharded import reshard
from meshformer.parallel.strategy import MeshStrategy

from .counted import LiveMemory
from .live_bytes import LiveBytes

Config = dict[str, Any]
STEPS = 2  # from the second step on the optimizer has its state


def live_memory(config: Config, rank: int = 0, steps: int = STEPS) -> LiveMemory:
    """`config`: a resolved configuration of any number of processes. In a process without a process group: see `counted.live_memory_apart`.

    `steps`: 1 makes the optimizer's state by an update alone, not by a whole step before the counted one; `reserved` then knows one step less.

    ConfigError for what cannot be counted: cpu_offload, 16-mixed, an unknown vocabulary.
    """
    began = time.perf_counter()
    with counting(config, rank) as (live, task, optimizer):
        start = 0
        if steps < STEPS:
            step_alone(task, optimizer)
        for _ in range(steps):
            live.at = "forward"
            batches = [batch(config) for _ in range(config["trainer"]["accumulate_grad_batches"])]
            live.find_gradients()
            live.reset()
            start = live.now
            task.training_step(batches, 0)
        end = live.now
    seconds = time.perf_counter() - began
    return LiveMemory(rank, live.peak, live.where, live.kinds, start, end, live.reserved, seconds, live.highest)


def optimizer_memory(config: Config, rank: int = 0) -> dict[str, int]:
    """The bytes by kind at the peak of an optimizer's step on gradients that are there already."""
    with counting(config, rank) as (live, task, optimizer):
        for _ in range(STEPS):  # after the first one it has its state
            step_alone(task, optimizer, live)
    return live.kinds


def step_alone(task: Any, optimizer: Any, live: LiveBytes | None = None) -> None:
    """The optimizer's step on gradients that are there already, and stay, as after a whole step. `live` counts it alone."""
    for p in task.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    if live is not None:
        live.find_gradients()
        live.at = "optimizer"
        live.reset()
    optimizer.step()


@contextmanager
def counting(config: Config, rank: int) -> Iterator[tuple[LiveBytes, Any, Any]]:
    """The counter, the task and its optimizer, in the process group and on the tensors of a plan."""
    quiet_libraries()
    config = countable(config)
    world = config["trainer"]["devices"] * config["trainer"]["num_nodes"]
    init_fake_process_group(rank, world)
    try:
        with tempfile.TemporaryDirectory() as folder:
            task = build(config, rank, Path(folder))
        for p in task.parameters():
            if isinstance(p, DTensor):
                mesh_ranks(p.device_mesh)  # Muon asks for them again
        with fake_tensor_mode(), LiveBytes() as live, sent_until_waited_for():
            optimizer = allocate(task, config)
            live.watch(task.model, optimizer)
            yield live, task, optimizer
    finally:
        dist.destroy_process_group()


class Sent(NamedTuple):
    """A send that keeps its tensor until the pipeline's schedule has waited for it, as gloo and NCCL do; the fake process group keeps nothing."""

    work: Any
    tensor: Tensor

    def wait(self) -> None:
        self.work.wait()


@contextmanager
def sent_until_waited_for() -> Iterator[None]:
    """Inside, a pipeline's sends return a `Sent`."""
    original = dist.isend

    def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Sent:
        return Sent(original(tensor, *args, **kwargs), tensor)

    places: tuple[Any, ...] = dist, dist.distributed_c10d  # P2POp compares with the second
    for place in places:
        place.isend = isend
    try:
        yield
    finally:
        for place in places:
            place.isend = original


def countable(config: Config) -> Config:
    """A copy of `config` for this machine: on the CPU, with the attention kernel and the vocabulary that the run would use."""
    config = deepcopy(config)
    for key, value, message in (
        ("strategy.cpu_offload", True, "weights on the host cannot be told from those on the device"),
        ("trainer.precision", "16-mixed", "the loss scaling reads numbers, and a plan has none"),
    ):
        room, _, name = key.partition(".")
        if config[room].get(name) == value:
            raise ConfigError(message, key, value)
    model, data = config["model"], config["data"]
    on_gpu, config["trainer"]["accelerator"] = config["trainer"]["accelerator"] == "gpu", "cpu"
    config["trainer"]["compile"] = False
    if on_gpu and (model.get("attention") or {}).get("_target_", "").endswith(".attend_auto"):  # `auto` would choose a kernel for the CPU
        model["attention"]["_target_"] = model["attention"]["_target_"].replace("attend_auto", "attend_fused")
    if data["kind"] != "images" and "vocab_size" in model and model["vocab_size"] is None:
        if data["tokenizer"] != "bpe":
            raise ConfigError("only the data says how many tokens there are", "model.vocab_size", None, fix="Give a number.")
        model["vocab_size"] = data["vocab_size"]
    return config


def build(config: Config, rank: int, folder: Path) -> Any:
    """The task with its model cut for `rank` on the meta device, and a Trainer that is not run."""
    trainer = build_trainer(config, folder, STEPS, [], [])
    strategy: Any = trainer.strategy
    task: Any = build_task(config, STEPS)
    with torch.device("meta"):  # unlike in a run, for every strategy
        configure_model(config, task, strategy, Start(None, False, None))
    task.trainer = trainer
    cut: Any = lambda batch: batch  # noqa: E731
    without_transfer_hook(task)
    strategy.connect(task)
    if isinstance(strategy, ParallelStrategy) and strategy.cluster_environment is not None:
        strategy.cluster_environment.set_global_rank(rank)
        strategy.cluster_environment.set_world_size(dist.get_world_size() if dist.is_initialized() else 1)
    if isinstance(strategy, MeshStrategy):
        strategy.make_mesh()
        strategy.parallelize(task)
        cut = strategy.context.cut if strategy.context is not None else cut
    else:
        task.model = strategy.precision_plugin.convert_module(task.model)
    strategy.batch_to_device = cut  # without Lightning's transfer to the device, which needs an attached data module
    return task


def allocate(task: Any, config: Config) -> Any:
    """Gives the parameters (fake) memory and makes the optimizer."""
    trainer, strategy = task.trainer, task.trainer.strategy
    if isinstance(strategy, MeshStrategy):
        strategy.allocate(task.model)
        strategy.weigh_shards(task)
        strategy.open_loss_parallel()
        if strategy.pipeline is not None:
            strategy.pipeline.shapes = partial(shapes, strategy, config)
    else:
        tied = ties(task.model)
        task.model.to_empty(device="cpu")
        retie(task.model, tied)
        strategy.model = Replica(task) if config["strategy"]["name"] == "ddp" else task
    strategy.setup_optimizers(trainer)
    task.train()
    task.on_train_start()
    return strategy.optimizers[0]


class Replica(nn.Module):
    """Holds gradients as DDP with gradient_as_bucket_view does: a new gradient is copied into its place in a bucket, and the bucket lives on.

    DDP itself reads the memory of its tensors when it is made, and fake ones have none. One bucket here stands for all.
    """

    def __init__(self, task: nn.Module):
        super().__init__()
        self.task, self.no_sync = task, nullcontext
        trained = [p for p in task.parameters() if p.requires_grad]
        buckets = {
            dtype: torch.zeros(sum(p.numel() for p in trained if p.dtype == dtype), dtype=dtype) for dtype in {p.dtype for p in trained}
        }
        for dtype, bucket in buckets.items():
            own = [p for p in trained if p.dtype == dtype]
            for p, place in zip(own, bucket.split([p.numel() for p in own]), strict=True):
                p.register_post_accumulate_grad_hook(partial(self.move, place=place.view_as(p)))

    @staticmethod
    def move(p: Tensor, place: Tensor) -> None:
        if p.grad is not place:
            p.grad = place.copy_(p.grad) if p.grad is not None else None

    def forward(self, *arguments: Any) -> Any:
        return self.task(*arguments)


def local_batch(config: Config) -> int:
    """Samples of one micro-batch on one data rank (before a pipeline cuts it once more)."""
    slices = config["trainer"]["accumulate_grad_batches"] * Degrees.from_config(config["strategy"]).data
    return max(1, config["data"]["batch_size"] // slices)


def batch(config: Config) -> dict[str, Tensor]:
    """One micro-batch, as large as the data module would make it at most; the values do not matter."""
    data, model, B, T = config["data"], config["model"], local_batch(config), config["data"]["context_length"]
    if data["kind"] == "images":
        size, colours = model["image_size"], model.get("colours") or 1
        pixels = (B, size, size) if colours == 1 else (B, size, size, colours)
        return {"images": torch.empty(pixels), "labels": torch.zeros(B, dtype=torch.long)}

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long)

    if data["kind"] == "speech":
        features = torch.empty(B, T * model["subsampling"], model["mels"])
        return {"features": features, "documents": numbers(B, T), "targets": numbers(B, max(T // 4, 1))}
    if data["kind"] == "corpus":
        return {"tokens": numbers(B, T), "targets": numbers(B, T)}
    objective = task_class(config).objective
    B = 2 * B if objective == "pairs" else B
    found = {"tokens": numbers(B, T), "documents": numbers(B, T)}
    if data["packing"]:
        found["positions"] = numbers(B, T)
    return found | ({"labels": numbers(B)} if objective == "label" else {} if objective == "pairs" else {"targets": numbers(B, T)})


def shapes(strategy: Any, config: Config, number: int) -> dict[str, Any]:
    """What stage `number` of a pipeline receives and returns for one micro-batch; in a run, the ranks tell each other."""
    pipeline, settings, degrees = strategy.pipeline, config["strategy"], strategy.degrees
    B, T = local_batch(config) // settings["microbatches"], config["data"]["context_length"] // degrees.context
    between = T // degrees.tensor if settings["sequence_parallel"] else T
    precision = config["trainer"]["precision"]
    short = precision == "bf16-true" or (settings["param_dtype"] == "bfloat16" and not precision.endswith("mixed"))
    hidden = torch.empty(B, between, config["model"]["d_model"], dtype=torch.bfloat16 if short else torch.float32, requires_grad=True)
    stage = pipeline.stages[pipeline.numbers.index(number)]
    received = torch.zeros(B, T, dtype=torch.long) if number == 0 else hidden
    if number + 1 < pipeline.n_stages:
        return {"input_args": received, "output_args": hidden}
    with torch.no_grad():
        output = stage(received, torch.zeros((), dtype=torch.long))
    reshard(stage)
    return {"input_args": received, "output_args": output.detach().requires_grad_()}
