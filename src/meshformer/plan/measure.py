"""Measures the machine at hand for `cluster=this`: rates of matrix products, attention and memory, and of collectives between its processes.

`python -m meshformer.plan.measure` prints the cluster and its constants as JSON. On a CPU every core is a card: all measure at the same time with
one thread each, as the processes of a job would run. Of a GPU only the name is read, and its rates are those of its datasheet in conf/cluster/.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from meshformer.config.paths import conf_dir
from meshformer.config.resolve import cores, cpu_multiplies_bf16
from meshformer.model import Transformer
from meshformer.parallel.memory import machine_memory
from meshformer.plan.cluster import Cluster
from meshformer.plan.sizes import Sizes
from meshformer.plan.steptime import HOST_OPERATIONS, Constants, StepLayout, step_time

# (tokens, inputs, outputs) of the products that are timed; the smallest show what small dimensions cost.
PRODUCTS = ((512, 128, 128), (512, 128, 512), (1024, 256, 256), (1024, 256, 1024), (1024, 1024, 256), (2048, 512, 512), (1024, 1024, 1024))
LAYERS, HEADS, WIDTH = 2, 4, 256
SAMPLES, LENGTH, VOCABULARY = 8, 128, 100
BYTES = (2**16, 2**20, 2**23)  # of the collectives that are timed
BETWEEN = (1024, 256, 1024)  # the product before each of them
REPEATS = 3
ROUNDS = 3  # of all measurements, since a machine's speed changes within seconds
MOST = 8  # processes
# Words in the name that CUDA reports -> a file of conf/cluster/.
CARDS = {"B200": "b200x8", "H200": "h200x8", "H100": "h100x8", "A100 80GB": "a100x8", "A100 40GB": "a100_40gx8"}


def measure() -> dict[str, Any]:
    """{"cluster": settings of a cluster node, "constants": fitted constants, or null for a card with published ones} of this machine."""
    if torch.cuda.is_available():
        return {"cluster": of_gpu(torch.cuda.get_device_name(), torch.cuda.device_count()), "constants": None}
    processes = min(cores(), MOST)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (processes, folder), nprocs=processes)
        ranks = [json.loads(Path(folder, str(rank)).read_text(encoding="utf-8")) for rank in range(processes)]
        alone = _alone(folder, 1) / _alone(folder, cores())
    slowest = {key: max(rank[key] for rank in ranks) for key in ranks[0]}  # the maximum over ranks, since the others wait for the slowest
    cluster, constants = fitted(slowest, processes)
    return {"cluster": {**cluster, "alone": alone}, "constants": constants}


def of_gpu(name: str, count: int) -> dict[str, Any]:
    """The settings of the cluster in conf/cluster/ that has this card, with `count` cards a node. ValueError for a card without a file."""
    for words, file in CARDS.items():
        if all(word in name for word in words.split()):
            node = yaml.safe_load((conf_dir() / "cluster" / f"{file}.yaml").read_text(encoding="utf-8"))
            return {**node, "cards": count}
    raise ValueError(f"conf/cluster/ has no file for the card {name}: copy cluster/h100x8.yaml and give its numbers")


def _alone(folder: str, threads: int) -> float:
    """Seconds of a step of the small model in one process with that many threads."""
    torch.multiprocessing.spawn(_one, (folder, threads), nprocs=1)
    return float(Path(folder, "alone").read_text(encoding="utf-8"))


def _one(rank: int, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    store = dist.FileStore(f"{folder}/alone-{threads}", 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    step = _model_step(SAMPLES, LENGTH)
    Path(folder, "alone").write_text(str(statistics.median(_timed(step) for _ in range(ROUNDS))), encoding="utf-8")
    dist.destroy_process_group()


def _model_step(samples: int, length: int) -> Callable[[], None]:
    """One forward and backward pass of the small model."""
    model = Transformer(VOCABULARY, LAYERS, HEADS, WIDTH, LENGTH, qk_norm=False, zero_init=False)
    tokens = torch.randint(VOCABULARY, (samples, length))

    def step() -> None:
        logits: Tensor = model(tokens)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

    return step


def fitted(seconds: dict[str, float], processes: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The settings of a cluster node and the constants that explain the measured `seconds` of each part."""
    sums = [2.0 * M * N * K for M, K, N in PRODUCTS]
    times = [seconds[f"product {M} {K} {N}"] for M, K, N in PRODUCTS]
    # seconds / FLOPs = 1/rate + (rereads / rate) · (1/M + 1/N + 1/K): linear in the two unknowns. Relative errors count.
    small = [1 / M + 1 / N + 1 / K for M, K, N in PRODUCTS]
    per_flop = np.array(times) / np.array(sums)
    rows = np.stack([np.ones(len(small)), np.array(small)], axis=1) / per_flop[:, None]
    slope = np.linalg.lstsq(rows, np.ones(len(small)), rcond=None)[0]
    rate, again = 1 / float(slope[0]), max(0.0, float(slope[1] / slope[0]))
    sizes = Sizes(LAYERS, WIDTH, HEADS, 64, WIDTH, 4 * WIDTH, False, VOCABULARY, True, LENGTH)
    attention = 3.5 * 4 * sizes.query_width * sizes.keys_seen * SAMPLES * LENGTH / seconds["attention"] / rate
    gathered = [seconds[f"gather {size}"] for size in BYTES]
    share = (processes - 1) / processes
    beta, alpha = np.polyfit([size * share for size in BYTES], gathered, 1, w=1 / np.array(gathered)) if processes > 1 else (1e-12, 0.0)
    node = {
        "card": "this", "cards": processes, "nodes": 1, "memory": (machine_memory() or 2**33) / processes / 1e9,
        "peak": {"fp32": rate / 1e12}, "bandwidth": 10.0, "link": 1 / max(float(beta), 1e-12) / 1e9, "network": 1.0,
        "link_latency": max(0.0, float(alpha)) * 1e6 / max(1, processes - 1), "network_latency": 0.0, "power": 0.0,
        # With four tokens, launching operations takes nearly all of a step.
        "host": seconds["tiny model"] / (3 * HOST_OPERATIONS * LAYERS) * 1e6,
        "reduction": statistics.median(seconds[f"reduce {size}"] / seconds[f"gather {size}"] for size in BYTES),
        "sharded": seconds["sharded operation"] / seconds["operation"],
    }  # fmt: skip
    # What a step of a small model takes beside products and attention sets the rate of memory traffic.
    constants = {"products": 1.0, "attention": attention, "link": 1.0, "rereads": 0.0, "exposed": 1.0, "head": 0.0, "pressure": 0.0, "compiled": 0.6}
    rest = seconds["model"] - seconds["tiny model"] - _without_memory(sizes, node, constants, again, rate)
    traffic = _traffic(sizes, node, constants)
    node["bandwidth"] = traffic / max(rest, 0.05 * seconds["model"]) / 1e9
    constants["rereads"] = again * node["bandwidth"] * 1e9 / rate
    return node, constants


def _cluster(node: dict[str, Any]) -> Cluster:
    scaled = {key: node[key] * 1e9 for key in ("memory", "bandwidth", "link", "network")}
    return Cluster(**{**node, **scaled, "peak": {"fp32": node["peak"]["fp32"] * 1e12}, "link_latency": 0.0, "network_latency": 0.0, "host": 0.0})


def _step(sizes: Sizes, node: dict[str, Any], constants: dict[str, float]) -> Any:
    layout = StepLayout(samples=SAMPLES, precision="fp32", activation_bytes=4)
    return step_time(sizes, layout, _cluster(node), Constants(**constants))


def _without_memory(sizes: Sizes, node: dict[str, Any], constants: dict[str, float], again: float, rate: float) -> float:
    step = _step(sizes, node, {**constants, "rereads": again * node["bandwidth"] * 1e9 / rate})
    return step.products + step.attention


def _traffic(sizes: Sizes, node: dict[str, Any], constants: dict[str, float]) -> float:
    return _step(sizes, node, constants).memory * node["bandwidth"] * 1e9


def _rank(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", rank=rank, world_size=processes, store=store)
    torch.manual_seed(rank)
    rounds = [_round(processes) for _ in range(ROUNDS)]
    found = {key: statistics.median(seconds[key] for seconds in rounds) for key in rounds[0]}
    Path(folder, str(rank)).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _round(processes: int) -> dict[str, float]:
    """Seconds of everything that is timed, once."""
    found: dict[str, float] = {}
    for M, K, N in PRODUCTS:
        x, weight = torch.randn(M, K), torch.randn(N, K)
        found[f"product {M} {K} {N}"] = _timed(lambda x=x, weight=weight: F.linear(x, weight))
    q, k, v = (torch.randn(SAMPLES, HEADS, LENGTH, 64, requires_grad=True) for _ in range(3))
    found["attention"] = _timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())
    found["model"] = _timed(_model_step(SAMPLES, LENGTH))
    found["tiny model"] = _timed(_model_step(1, 4))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed both
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    M, K, N = BETWEEN
    x, weight = torch.randn(M, K), torch.randn(N, K)
    for size in BYTES:
        part, whole = torch.zeros(size // 4 // processes), torch.zeros(size // 4 // processes * processes)
        found[f"gather {size}"] = _timed(lambda part=part, whole=whole: gather(whole, part), lambda: F.linear(x, weight))
        found[f"reduce {size}"] = _timed(lambda part=part, whole=whole: reduce(part, whole), lambda: F.linear(x, weight))
    mesh = init_device_mesh("cpu", (processes,))
    x, weight = torch.randn(8, 8), torch.randn(8, 8)
    both = [distribute_tensor(value, mesh, [Replicate()]) for value in (x, weight)]
    found["operation"] = _timed(lambda: F.linear(x, weight))
    found["sharded operation"] = _timed(lambda: F.linear(*both))
    return found


def _timed(work: Callable[[], Any], before: Callable[[], Any] | None = None, least: float = 0.05) -> float:
    """Median seconds of one call, over repeats that take at least `least` seconds each; all ranks start a repeat together.

    `before` runs before each call and is not counted: a collective after computation also waits for the rank that computed longer.
    """
    work()
    start = time.perf_counter()
    work()
    count = torch.tensor(max(1, round(least / max(time.perf_counter() - start, 1e-6))))
    dist.broadcast(count, 0)
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        start, apart = time.perf_counter(), 0.0
        for _ in range(int(count)):
            if before is not None:
                begin = time.perf_counter()
                before()
                apart += time.perf_counter() - begin
            work()
        times.append((time.perf_counter() - start - apart) / int(count))
    return statistics.median(times)


if __name__ == "__main__":
    json.dump({**measure(), "bf16": cpu_multiplies_bf16()}, sys.stdout, indent=1)
