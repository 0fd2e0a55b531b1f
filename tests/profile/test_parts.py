"""The split of steps into parts, on traces made by hand whose answer is known exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from meshformer.profile.intervals import difference, intersection, length, union
from meshformer.profile.parts import (
    BACKWARD,
    BUBBLE,
    CHECKPOINT,
    DATA,
    EXPOSED,
    FORWARD,
    HIDDEN,
    IDLE,
    OPTIMIZER,
    SUM,
    WAITING,
    clock_offsets,
    matches,
    split,
)
from meshformer.profile.trace import Trace
from profile_traces import event, kernel, launch, mark, trace


def parts(traces: Sequence[Trace], rank: int = 0, step: int = 20) -> dict[str, float]:
    """The parts of a step that are not 0, in ms."""
    return {row.part: row.milliseconds for row in split(traces) if (row.rank, row.step) == (rank, step) and row.milliseconds > 1e-6}


def test_interval_arithmetic_agrees_with_counting_points():
    draw = random.Random(0)
    for _ in range(200):
        sets = [union((a, a + draw.randint(0, 9)) for a in draw.choices(range(50), k=6)) for _ in range(2)]
        points = [{x for a, b in one for x in range(int(a), int(b))} for one in sets]
        assert length(union([*sets[0], *sets[1]])) == len(points[0] | points[1])
        assert length(intersection(*sets)) == len(points[0] & points[1])
        assert length(difference(*sets)) == len(points[0] - points[1])


# --- a GPU


def nccl(name: str, start: float, end: float, number: int, ranks: str = "[0, 1]") -> dict[str, Any]:
    args = {"Process Group Name": "3", "Process Group Ranks": ranks}
    return kernel(f"ncclDevKernel_{name}_RING_LL(ncclDevKernelArgsStorage<4096ul>)", start, end, number, stream=13, **args)


def cuda_rank(rank: int, gather: float) -> Trace:
    """A step of 100 ms with streams 7 (compute), 13 (NCCL) and 20 (copies); the rank's all-gather starts at `gather` and ends at 40."""
    return trace(
        mark("step 20", 0, 100), mark("data", 0, 8), mark("forward", 10, 30), mark("backward", 30, 50), mark("optimizer", 50, 70),
        mark("checkpoint", 90, 98),
        # Launched in the data, forward and backward marks, but run later, as kernels do.
        launch(1, 11), kernel("gemm", 12, 30, 1),
        launch(2, 29), kernel("attention", 36, 44, 2),
        launch(3, 31), kernel("gemm_backward", 44, 60, 3),
        launch(4, 40), {**kernel("copy", 50, 62, 4, stream=20), "cat": "gpu_memcpy"},
        launch(5, 55), kernel("adam", 64, 70, 5),
        launch(6, 15), nccl("AllGather", gather, 40, 6),
        launch(7, 41), nccl("ReduceScatter", 56, 64, 7),
        rank=rank, device="cuda",
    )  # fmt: skip


def test_a_gpus_step_is_split_exactly():
    """All-gather 30–40 on rank 0, 34–40 on rank 1: until 34 rank 0 waits, 34–36 is exposed, 36–40 beneath `attention`. The reduce-scatter 56–64 is
    beneath backward until 62 (the copy) and exposed until 64."""
    traces = [cuda_rank(0, gather=30), cuda_rank(1, gather=34)]
    expected = {FORWARD: 18 + 8, BACKWARD: 16 + 2, OPTIMIZER: 6, EXPOSED: 2 + 2, WAITING: 4, HIDDEN: 4 + 6, DATA: 8, CHECKPOINT: 8}
    expected[IDLE] = 100 - sum(value for part, value in expected.items() if part != HIDDEN)
    assert parts(traces) == pytest.approx(expected)
    del expected[WAITING]
    expected[IDLE] += 4  # from 30 to 34 rank 1 has nothing to do: its host is late
    assert parts(traces, rank=1) == pytest.approx(expected)


def test_without_the_other_rank_waiting_counts_as_communication():
    assert parts([cuda_rank(0, gather=30)])[EXPOSED] == pytest.approx(8)


# --- a CPU


def cpu_rank(rank: int, late: float = 0.0, shift: float = 0.0, base: int = 0) -> Trace:
    """A step of 50 ms: 10 ms of forward, `late` more on this rank, then an all-reduce that ends at 40 on all ranks, 4 ms after the last came."""
    begins = 20 + late

    def at(*times: float) -> tuple[float, ...]:
        return tuple(time + shift for time in times)

    return trace(
        mark("group shard 0,1", *at(-2, -1)), event("gloo:all_reduce", *at(-1.9, -1), tid=5),
        mark("step 20", *at(0, 50)), mark("data", *at(0, 5)), mark("forward", *at(5, begins)), mark("backward", *at(begins, 42)),
        mark("optimizer", *at(42, 48)),
        event("aten::mm", *at(5, begins), "cpu_op"), event("c10d::allreduce_", *at(begins - 0.5, begins), "cpu_op"),
        event("gloo:all_reduce", *at(begins, 40), tid=5),
        event("aten::add", *at(42, 48), "cpu_op"),
        rank=rank, base=base,
    )  # fmt: skip


def test_a_cpus_step_is_split_exactly():
    traces = [cpu_rank(0), cpu_rank(1, late=16)]
    usual = {DATA: 5, BACKWARD: 2, OPTIMIZER: 6, IDLE: 2, EXPOSED: 4}
    assert parts(traces) == pytest.approx({**usual, FORWARD: 15, WAITING: 16})
    assert parts(traces, rank=1) == pytest.approx({**usual, FORWARD: 31})


@pytest.mark.parametrize("shift", [-3000.0, 0.0, 0.4, 25.0, 86_400_000.0])
def test_clocks_of_machines_that_differ_are_aligned(shift: float):
    traces = [cpu_rank(0), cpu_rank(1, late=16, shift=shift)]
    assert parts(traces)[WAITING] == pytest.approx(16 + (shift if shift == 0.4 else 0), abs=1e-3)
    assert clock_offsets(traces, matches(traces)) == pytest.approx([0, 0 if shift < 5 and shift >= 0 else -shift])


def test_the_base_of_a_traces_times_is_read():
    traces = [cpu_rank(0, base=1_790_857_026_000_000_000), cpu_rank(1, late=16, shift=7.0, base=1_790_857_025_993_000_000)]
    assert clock_offsets(traces, matches(traces)) == [0, 0]
    assert parts(traces)[WAITING] == pytest.approx(16, abs=1e-3)


def test_a_transfer_beneath_compute_is_hidden():
    """It ends while an operator runs, so nobody waited for it; another ends in a gap of 1 ms."""
    one = trace(
        mark("step 20", 0, 30), mark("backward", 0, 30), event("aten::mm", 0, 20, "cpu_op"), event("aten::mm", 25, 30, "cpu_op"),
        event("gloo:all_reduce", 2, 12, tid=5), event("gloo:all_reduce", 14, 21, tid=5),
    )  # fmt: skip
    assert parts([one]) == pytest.approx({BACKWARD: 29, EXPOSED: 1, HIDDEN: 16})


def test_operators_around_a_wait_are_no_compute():
    one = trace(
        mark("step 20", 0, 30), mark("backward", 0, 30), event("autograd::engine::evaluate_function: Hook", 0, 20, "cpu_op"),
        event("aten::mm", 1, 5, "cpu_op"), event("c10d::allreduce_", 5, 6, "cpu_op"), event("gloo:all_reduce", 6, 18, tid=5),
        event("aten::mm", 19, 30, "cpu_op"),
    )  # fmt: skip
    assert parts([one]) == pytest.approx({BACKWARD: 18, EXPOSED: 12})


def test_the_groups_of_a_mesh_are_matched_each_by_itself():
    """Four ranks, two axes: rank 0 waits for rank 1 in `tensor` and for rank 2 in `shard`."""

    def rank(number: int, tensor: float, shard: float) -> Trace:
        row, column = number // 2 * 2, number % 2
        return trace(
            mark(f"group tensor {row},{row + 1}", -9, -8), event("gloo:all_reduce", -8.9, -8, tid=5),
            mark(f"group shard {column},{column + 2}", -7, -6), event("gloo:all_reduce", -6.9, -6, tid=8),
            mark("step 20", 0, 60), mark("forward", 0, 60), event("aten::mm", 0, tensor, "cpu_op"), event("gloo:all_reduce", tensor, 20, tid=5),
            event("aten::mm", 20, shard, "cpu_op"), event("gloo:all_gather", shard, 50, tid=9), event("aten::mm", 50, 60, "cpu_op"), rank=number,
        )  # fmt: skip

    traces = [rank(0, 10, 30), rank(1, 15, 30), rank(2, 19, 38), rank(3, 19, 30)]
    assert parts(traces)[WAITING] == pytest.approx(5 + 8)
    assert parts(traces, 1).get(WAITING, 0) == 0
    assert parts(traces, 2).get(WAITING, 0) == 0


def test_waiting_for_another_stage_is_the_bubble():
    one = trace(
        mark("step 20", 0, 40), mark("stage 1 forward 0", 10, 16), mark("stage 1 backward 0", 16, 28), mark("optimizer", 30, 38),
        event("gloo:recv", 1, 10), event("aten::mm", 10, 16, "cpu_op"), event("aten::mm", 16, 28, "cpu_op"),
        event("gloo:send", 31, 34), event("aten::add", 34, 38, "cpu_op"),
    )  # fmt: skip
    assert parts([one]) == pytest.approx({BUBBLE: 9, FORWARD: 6, BACKWARD: 12, EXPOSED: 3, OPTIMIZER: 5, IDLE: 5})
    assert [(box.stage, box.kind, box.microbatch) for box in one.boxes] == [(1, "forward", 0), (1, "backward", 0)]


def test_the_parts_of_any_trace_add_up_to_its_steps():
    draw = random.Random(1)

    def anywhere(name: str, *options: Any) -> dict[str, Any]:
        start = draw.uniform(0, 100)
        return event(name, start, start + draw.uniform(0, 20), *options)

    for _ in range(50):
        some = [anywhere(f"meshformer:{name}") for name in ("data", "forward", "backward", "optimizer", "checkpoint", "validation") * 2]
        some += [anywhere("aten::mm", "cpu_op") for _ in range(20)] + [anywhere("gloo:all_reduce", "user_annotation", 5) for _ in range(6)]
        rows = split([trace(mark("step 1", 0, 60), mark("step 2", 60, 100), *some)])
        for step, lasts in ((1, 60), (2, 40)):
            assert sum(row.milliseconds for row in rows if row.step == step and row.part in SUM) == pytest.approx(lasts)
