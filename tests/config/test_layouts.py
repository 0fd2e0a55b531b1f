"""Parallel layouts in the configuration: degrees, what `auto` and -1 become, and which layouts cannot work."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest

from meshformer.command.check import resolve
from meshformer.command.compose import compose, compose_config, make_hydra, plain, settle
from meshformer.config import ConfigError, validate
from meshformer.config.degrees import AXES, Degrees, uses_fsdp
from meshformer.config.paths import conf_dir
from meshformer.config.resolve import cores, microbatch_counts
from meshformer.model.settings import feed_forward_width

RESOLVE = sys.modules["meshformer.config.resolve"]
FILES = {file.stem for file in (conf_dir() / "strategy").glob("*.yaml")}
# On a CPU with nothing said: 2 processes, or 4 where the file fixes another degree.
ON_CPU = {
    "single": {},
    "ddp": {"replicate": 2},
    "fsdp": {"shard": 2},
    "hsdp": {"replicate": 2, "shard": 2},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "fsdp_tensor": {"shard": 2, "tensor": 2},
    "fsdp_context": {"shard": 2, "context": 2},
    "tensor_pipeline": {"tensor": 2, "pipeline": 2},
    "fsdp_pipeline": {"shard": 2, "pipeline": 2},
    "mesh": {},
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def strategies() -> dict[str, dict[str, Any]]:
    return {name: plain(compose_config(make_hydra(), "train", [f"strategy={name}"]))["strategy"] for name in sorted(FILES)}


@pytest.fixture
def layout(change, strategies):
    """`layout("tensor", {"strategy.tensor": 4})`: a file under conf/strategy/ and changes, unresolved."""
    return lambda name, changes: change({"strategy": dict(strategies[name]), **changes})


# --- degrees


def test_degrees_come_from_a_strategy_node():
    degrees = Degrees.from_config({"name": "mesh", "replicate": 2, "shard": 3, "tensor": 5, "timeout": 60})
    assert degrees == Degrees(2, 3, 1, 5, 1)
    assert (degrees.processes, degrees.data, degrees.open_axis) == (30, 6, None)


@pytest.mark.parametrize("axis", AXES)
def test_one_degree_is_what_the_others_leave(axis):
    others = {"tensor": 2, "shard": 3} if axis not in ("tensor", "shard") else {"pipeline": 6}
    degrees = Degrees(**{**others, axis: -1})
    assert degrees.fixed == 6 and degrees.open_axis == axis
    assert degrees.resolved(24) == Degrees(**{**others, axis: 4})
    assert degrees.resolved(6) == Degrees(**others)


@pytest.mark.parametrize(
    ("degrees", "processes", "nodes", "key", "words"),
    [
        (
            Degrees(shard=2, tensor=2), 8, 1, "strategy.shard",
            [
                "replicate 1 × shard 2 × context 1 × tensor 2 × pipeline 1 = 4, but there are 8 processes (trainer.devices=8 × trainer.num_nodes=1)",
                "strategy.shard=4 or -1, or trainer.devices=4",
            ],
        ),
        (Degrees(shard=2, tensor=2), 8, 2, "strategy.shard", ["trainer.devices=4 × trainer.num_nodes=2", "or trainer.devices=2."]),
        (Degrees(tensor=2), 1, 1, "strategy.tensor", ["there is 1 process", "strategy.tensor=1 or -1, or trainer.devices=2."]),
        (Degrees(tensor=4, pipeline=3), 6, 1, "strategy.tensor", ["strategy.tensor=2 or -1, or trainer.devices=12."]),
        (Degrees(tensor=4, pipeline=3), 4, 1, "strategy.pipeline", ["strategy.pipeline=1 or -1, or trainer.devices=12."]),
        (Degrees(tensor=3, pipeline=3), 4, 1, "strategy.tensor", ["Use trainer.devices=9."]),
        (Degrees(tensor=3, pipeline=3), 4, 2, "strategy.tensor", ["Use trainer.num_nodes=1 trainer.devices=9."]),
        (Degrees(shard=-1, tensor=2), 3, 1, "strategy.tensor", ["shard -1", "a multiple of 2", "3 processes", "trainer.devices=2 or 4"]),
        (Degrees(shard=-1, tensor=4), 2, 1, "strategy.tensor", ["strategy.tensor=2, or trainer.devices=4."]),
        (Degrees(shard=-1, tensor=4), 6, 2, "strategy.tensor", ["strategy.tensor=2, or trainer.devices=2 or 4."]),
    ],
)  # fmt: skip
def test_a_product_that_is_not_the_number_of_processes_is_printed_whole(degrees, processes, nodes, key, words):
    with pytest.raises(ConfigError) as caught:
        degrees.resolved(processes, nodes)
    assert caught.value.key == key
    assert [word for word in words if word not in str(caught.value)] == []


def test_every_way_out_that_a_product_message_offers_is_one():
    """Over all small products: what the message says to write is accepted."""
    tried = 0
    for shard, tensor, pipeline, devices, nodes in itertools.product((-1, 1, 2, 3, 4), (1, 2, 3, 4), (1, 2), range(1, 7), (1, 2)):
        degrees = Degrees(shard=shard, tensor=tensor, pipeline=pipeline)
        try:
            degrees.resolved(devices * nodes, nodes)
        except ConfigError as error:
            for way in str(error.fix).removeprefix("Use ").removesuffix(".").split(", or "):
                for assignments in options(way):
                    changed = Degrees(**{**vars(degrees), **{k: v for k, v in assignments.items() if k in AXES}})
                    changed.resolved(assignments.get("devices", devices) * assignments.get("num_nodes", nodes))
                    tried += 1
    assert tried > 500


def options(way: str) -> list[dict[str, int]]:
    """`trainer.devices=2 or 4` -> [{"devices": 2}, {"devices": 4}]."""
    words = [word for word in way.split(" ") if word != "or"]
    made: list[dict[str, int]] = []
    for word in words:
        key, equals, value = word.rpartition("=")
        name = key.rpartition(".")[2] if equals else next(iter(made[-1]))
        if equals and made:
            made[-1][name] = int(value)
        else:
            made.append({name: int(value)})
    return made


def test_two_open_degrees_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"strategy\.shard and strategy\.tensor are -1\. Give it a number"):
        Degrees(shard=-1, tensor=-1).resolved(4)


# --- what auto and -1 become


def test_every_file_is_listed_here_and_is_named_like_its_file(strategies):
    assert set(ON_CPU) == FILES
    assert {name: node["name"] for name, node in strategies.items()} == {name: name for name in FILES}


@pytest.mark.parametrize("name", sorted(ON_CPU))
def test_every_layout_runs_as_it_is_on_a_cpu(layout, name):
    config = settle(layout(name, {}))
    degrees = Degrees.from_config(config["strategy"])
    assert degrees == Degrees(**ON_CPU[name])
    assert config["trainer"]["devices"] == degrees.processes
    assert config["trainer"]["threads"] == max(1, cores() // degrees.processes)
    unsettled = [key for key, value in config["strategy"].items() if value == "auto" or value == -1]
    assert unsettled == []


@pytest.mark.parametrize("name", sorted(FILES - {"single", "ddp", "mesh"}))
def test_the_mesh_layouts_differ_from_mesh_in_degrees_only(strategies, name):
    mesh, node = strategies["mesh"], strategies[name]
    assert list(mesh) == list(node)
    assert {key for key in node if node[key] != mesh[key]} - {"name", *AXES} == set()


def test_files_say_what_the_schema_would_fill_in(layout, strategies):
    """Otherwise a notebook that builds a strategy node by hand would run on other settings than the command."""
    for name, node in strategies.items():
        short = {key: node[key] for key in ("name", *AXES)}
        assert validate(layout(name, {}))["strategy"] == validate(layout(name, {"strategy": short}))["strategy"]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("fsdp", {}, {"devices": 8, "shard": 8}),
        ("hsdp", {}, {"devices": 8, "shard": 4}),
        ("fsdp_tensor", {"strategy.tensor": 4}, {"devices": 8, "shard": 2}),
        ("tensor_pipeline", {}, {"devices": 4}),
        ("mesh", {"strategy.shard": 2, "strategy.context": 3}, {"devices": 6}),
        ("fsdp", {"trainer.devices": 2, "trainer.num_nodes": 3}, {"shard": 6}),
        ("single", {}, {"devices": 1}),
    ],
)
def test_all_gpus_are_used_where_a_degree_is_open(layout, monkeypatch, name, changes, expected):
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: True)
    config = resolve(validate(layout(name, changes)), {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    found = {**config["strategy"], "devices": config["trainer"]["devices"]}
    assert {key: found[key] for key in expected} == expected


def test_a_fixed_product_is_shared_out_over_nodes(layout):
    changes = {"strategy.shard": 2, "strategy.tensor": 4, "trainer.num_nodes": 4}
    assert settle(layout("mesh", {**changes, "data.batch_size": 16}))["trainer"]["devices"] == 2


def test_the_processes_of_torchrun_fill_an_open_degree(layout):
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": ""}
    config = resolve(validate(layout("fsdp_tensor", {})), torchrun)
    assert (config["strategy"]["shard"], config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (4, 4, 2)


@pytest.mark.parametrize(
    ("changes", "microbatches"),
    [
        ({}, 8),
        ({"data.batch_size": 12}, 6),
        ({"data.batch_size": 10}, 5),
        ({"data.batch_size": 10, "trainer.accumulate_grad_batches": 5}, 2),
        ({"data.batch_size": 12, "strategy.shard": 2}, 6),
        ({"strategy.pipeline": 3, "data.batch_size": 36}, 12),
        ({"strategy.pipeline": 3, "data.batch_size": 8}, 8),
        ({"strategy.schedule": "gpipe", "data.batch_size": 1}, 1),
        ({"strategy.schedule": "interleaved_1f1b", "model.n_layers": 4, "data.batch_size": 10}, 2),
        ({"strategy.schedule": "interleaved_zero_bubble", "model.n_layers": 4}, 8),
        ({"strategy.microbatches": 16}, 16),
        ({"data.batch_size": 11, "strategy.microbatches": 11}, 11),
    ],
)
def test_microbatches_are_the_most_that_divide_the_batch_and_suit_the_schedule(layout, changes, microbatches):
    assert settle(layout("mesh", {"strategy.pipeline": 2, **changes}))["strategy"]["microbatches"] == microbatches


def test_counts_of_microbatches_by_schedule():
    assert microbatch_counts(12, 4, "gpipe") == [1, 2, 3, 4, 6, 12]
    assert microbatch_counts(12, 4, "1f1b") == [4, 6, 12]
    assert microbatch_counts(12, 4, "interleaved_1f1b") == [4, 12]


def test_the_other_autos_depend_on_the_pipeline(layout):
    def settled(name: str, changes: dict[str, Any]) -> tuple[int, bool]:
        strategy = settle(layout(name, {"model.n_layers": 6, **changes}))["strategy"]
        return strategy["stages_per_rank"], strategy["reshard_after_forward"]

    assert settled("fsdp", {}) == (1, True)
    assert settled("fsdp", {"strategy.reshard_after_forward": False}) == (1, False)
    assert settled("fsdp_pipeline", {}) == (1, False)
    assert settled("fsdp_pipeline", {"strategy.reshard_after_forward": True}) == (1, True)
    assert settled("pipeline", {"strategy.schedule": "interleaved_1f1b"}) == (2, False)
    assert settled("pipeline", {"strategy.schedule": "interleaved_1f1b", "strategy.stages_per_rank": 3}) == (3, False)


# --- what cannot work

INTERLEAVED = {"strategy.schedule": "interleaved_1f1b", "model.n_layers": 4}
ULYSSES = {"strategy.context_method": "ulysses"}
OTHER = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 4}
FOUR = {"strategy.shard": 2, "strategy.tensor": 2}


@pytest.mark.parametrize(
    ("name", "changes", "key", "words"),
    [
        ("mesh", {**FOUR, "trainer.devices": 8}, "strategy.shard", "tensor 2 × pipeline 1 = 4, but there are 8 processes"),
        ("fsdp_tensor", {"trainer.devices": 3}, "strategy.tensor", "trainer.devices=2 or 4"),
        ("mesh", {"strategy.shard": -1, "strategy.pipeline": -1}, "strategy.pipeline", "strategy.shard and strategy.pipeline"),
        ("mesh", {**FOUR, "trainer.num_nodes": 3}, "strategy.shard", "multiple of 3"),
        ("single", {"strategy.pipeline": 2}, "strategy.pipeline", "Use strategy=pipeline."),
        ("single", {"strategy.shard": -1}, "strategy.shard", "Use strategy=fsdp."),
        ("single", {"strategy.replicate": 2}, "strategy.replicate", "Use strategy=ddp."),
        ("ddp", {"strategy.pipeline": 2}, "strategy.pipeline", "wrong gradients. Use strategy=fsdp_pipeline, or strategy=mesh"),
        ("ddp", {"strategy.pipeline": 2, "trainer.devices": 3}, "strategy.pipeline", "strategy.replicate=-1 strategy.pipeline=2"),
        ("ddp", {"strategy.pipeline": -1}, "strategy.pipeline", "strategy.replicate=2 strategy.pipeline=-1"),
        ("ddp", {"strategy.shard": 2}, "strategy.shard", "whole copies"),
        ("ddp", {"strategy.tensor": 2}, "strategy.tensor", "strategy=fsdp_tensor"),
        ("ddp", {"strategy.cpu_offload": True}, "strategy.cpu_offload", "no such setting"),
        ("ddp", {"strategy.reshard_after_forward": False}, "strategy.reshard_after_forward", "no such setting"),
        ("single", {"strategy.sequence_parallel": False}, "strategy.sequence_parallel", "would be ignored"),
        ("fsdp", {"strategy.sequence_parallel": False}, "strategy.sequence_parallel", "would be ignored"),
        ("single", {"strategy.reduce_gradients": "every"}, "strategy.reduce_gradients", "would ignore it"),
        ("tensor", {"strategy.reduce_gradients": "every"}, "strategy.reduce_gradients", "nothing is reduced by FSDP"),
        ("pipeline", {"strategy.reduce_gradients": "every"}, "strategy.reduce_gradients", "at the end of each schedule"),
        ("tensor", {"strategy.reshard_after_forward": False}, "strategy.reshard_after_forward", "does not shard parameters"),
        (
            "pipeline",
            {"strategy.schedule": "interleaved_zero_bubble", "model.n_layers": 4, "strategy.activation_checkpointing": "selective"},
            "strategy.activation_checkpointing",
            "makes two",
        ),
        (
            "pipeline",
            {"strategy.schedule": "interleaved_zero_bubble", "model.n_layers": 4, "trainer.compile": True},
            "trainer.compile",
            "needs two",
        ),
        ("single", {"strategy.loss_parallel": True}, "strategy.loss_parallel", "strategy=tensor"),
        ("fsdp", {"strategy.loss_parallel": True}, "strategy.loss_parallel", "strategy.tensor is 1"),
        ("tensor", {"strategy.context_method": "ulysses"}, "strategy.context_method", "strategy=context"),
        ("fsdp", {"strategy.microbatches": 2}, "strategy.microbatches", "strategy=pipeline"),
        ("fsdp", {"strategy.blocks_per_stage": [3]}, "strategy.blocks_per_stage", "strategy.pipeline is 1"),
        ("fsdp", {"strategy.stages_per_rank": 2}, "strategy.stages_per_rank", "strategy.pipeline is 1"),
        ("fsdp", {"strategy.schedule": "gpipe"}, "strategy.schedule", "strategy.pipeline is 1"),
        ("hsdp", {"data.batch_size": 7}, "data.batch_size", "by 4 (strategy.replicate=2 × strategy.shard=2). The nearest sizes that do are 4 and 8"),
        ("fsdp", {"data.batch_size": 6, "trainer.accumulate_grad_batches": 2}, "data.batch_size", "4 and 8"),
        ("fsdp", {"trainer.precision": "16-mixed"}, "trainer.precision", "no gradient scaler"),
        ("fsdp", {"strategy.cpu_offload": True}, "strategy.cpu_offload", "nothing to offload"),
        ("tensor", {"model": OTHER}, "model._target_", "strategy.tensor=2 needs. See docs/make_it_yours/model.md, or use strategy=fsdp or ddp"),
        ("fsdp_context", {"model": OTHER}, "model._target_", "strategy.context=2"),
        ("pipeline", {"model": OTHER}, "model._target_", "strategy.pipeline=2"),
        ("tensor", {"strategy.tensor": 3}, "strategy.tensor", "model.n_heads=4 does not divide by it. Use strategy.tensor=1 or 2"),
        ("tensor", {"strategy.tensor": 4, "model.n_kv_heads": 2}, "strategy.tensor", "model.n_kv_heads=2"),
        ("tensor", {"model.d_ff": 33}, "strategy.tensor", "model.d_ff=33"),
        ("tensor", {"data.context_length": 63}, "data.context_length", "62 or 64, or strategy.sequence_parallel=false"),
        ("mesh", {"strategy.tensor": 2, "strategy.context": 2, "data.context_length": 66}, "data.context_length",
         "by 4 (strategy.tensor=2 × strategy.context=2)"),
        ("context", {"data.context_length": 63}, "data.context_length", "strategy.context=2. Use 62 or 64"),
        ("context", {**ULYSSES, "strategy.context": 8}, "strategy.context", "model.n_heads=4 does not"),
        ("context", {**ULYSSES, "model.n_kv_heads": 1}, "strategy.context", "model.n_kv_heads=1 does not"),
        ("mesh", {**ULYSSES, "strategy.context": 4, "strategy.tensor": 2}, "strategy.context", "4 / strategy.tensor=2 = 2"),
        ("pipeline", {"strategy.pipeline": 4}, "model.n_layers", "strategy.pipeline=4"),
        ("pipeline", {"strategy.schedule": "interleaved_1f1b"}, "model.n_layers", "strategy.stages_per_rank=2 = 4), each of which needs a block"),
        ("pipeline", {"strategy.blocks_per_stage": [1, 1, 1]}, "strategy.blocks_per_stage", "3 numbers for 2 stages"),
        ("pipeline", {"strategy.blocks_per_stage": []}, "strategy.blocks_per_stage", "0 numbers for 2 stages"),
        ("pipeline", {"strategy.blocks_per_stage": [1, 1]}, "strategy.blocks_per_stage", "the sum is 2"),
        ("pipeline", {"strategy.blocks_per_stage": [3, 0]}, "strategy.blocks_per_stage", "at least 1"),
        ("pipeline", {"strategy.stages_per_rank": 2, "model.n_layers": 8}, "strategy.stages_per_rank", "one stage a process"),
        ("pipeline", {"strategy.schedule": "interleaved_1f1b", "strategy.stages_per_rank": 1}, "strategy.stages_per_rank", "at least 2"),
        ("pipeline", {"strategy.schedule": "zbv"}, "strategy.schedule", "V-shaped schedules cannot evaluate in torch 2.13"),
        ("pipeline", {"strategy.schedule": "zbv_zero_bubble"}, "strategy.schedule", "V-shaped"),
        ("pipeline", {"strategy.schedule": "ZBVZeroBubble"}, "strategy.schedule", "V-shaped"),
        ("pipeline", {"strategy.schedule": "dualpipev"}, "strategy.schedule", "V-shaped"),
        ("pipeline", {"strategy.schedule": "ScheduleZBVZeroBubble"}, "strategy.schedule", "V-shaped"),
        ("pipeline", {"strategy.schedule": "ScheduleDualPipeV"}, "strategy.schedule", "V-shaped"),
        ("pipeline", {"strategy.schedule": "dual_pipe_v"}, "strategy.schedule", "V-shaped"),
        ("fsdp", {"strategy.async_tensor_parallel": True}, "strategy.async_tensor_parallel", "strategy.tensor is 1"),
        ("ddp", {"strategy.async_tensor_parallel": True}, "strategy.async_tensor_parallel", "would be ignored"),
        ("tensor", {"strategy.async_tensor_parallel": True}, "strategy.async_tensor_parallel", "on a CPU. Leave it out."),
        ("single", {"trainer.float8": True}, "trainer.float8", "only GPUs"),
        ("fsdp", {"trainer.float8": True, "trainer.compile": True}, "trainer.float8", "only GPUs"),
        ("pipeline", {"strategy.schedule": "1F1B"}, "strategy.schedule", "Did you mean 1f1b?"),
        ("pipeline", {"strategy.microbatches": 3}, "strategy.microbatches", "data.batch_size=16, do not divide by it. Use auto, or 2, 4, 8 or 16"),
        ("fsdp_pipeline", {"strategy.microbatches": 16}, "strategy.microbatches", "data.batch_size=16 / 2 = 8"),
        ("pipeline", {"strategy.microbatches": 1}, "strategy.microbatches", "1f1b needs at least strategy.pipeline=2"),
        ("pipeline", {"data.batch_size": 1}, "strategy.microbatches", "use data.batch_size=2"),
        ("pipeline", {"data.batch_size": 11}, "strategy.microbatches", "Use 11."),
        ("pipeline", {**INTERLEAVED, "data.batch_size": 9}, "strategy.microbatches", "data.batch_size=8 or 10"),
        ("pipeline", {**INTERLEAVED, "data.batch_size": 12, "strategy.microbatches": 3}, "strategy.microbatches",
         "a multiple of strategy.pipeline=2"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_work_is_refused(layout, name, changes, key, words):
    with pytest.raises(ConfigError) as caught:
        settle(layout(name, changes))
    assert caught.value.key == key
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["model.pooling=cls"], "model.pooling=cls: the number of an image's tokens, 17, does not divide by 2"),
        (["model.patch_size=8"], "model.patch_size=8: the number of an image's tokens, 1, does not divide by 2"),
        (["model.pooling=cls", "strategy.sequence_parallel=false"], ""),
        (["model.pooling=mean", "data.context_length=127"], ""),  # which images do not have
    ],
)
def test_sequence_parallel_divides_the_tokens_of_an_image(changed, words):
    given = ["experiment=vit_digits", "strategy=tensor", "trainer.devices=2", *changed]
    if not words:
        compose(given)
        return
    with pytest.raises(ConfigError) as caught:
        compose(given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fsdp", {"strategy.param_dtype": "bfloat16", "strategy.reduce_dtype": "float32", "strategy.reduce_gradients": "every"}),
        ("fsdp", {"trainer.precision": "bf16-mixed", "strategy.activation_checkpointing": "selective"}),
        ("ddp", {"strategy.activation_checkpointing": "full"}),
        ("fsdp", {"model": OTHER}),
        ("hsdp", {"model": OTHER}),
        ("tensor", {"strategy.sequence_parallel": False, "data.context_length": 63, "model.context_length": 63}),
        ("tensor", {"strategy.loss_parallel": True, "model.n_kv_heads": 2}),
        ("context", {**ULYSSES, "model.n_kv_heads": 2}),
        ("pipeline", {"strategy.blocks_per_stage": [2, 1], "trainer.compile": True}),
        ("pipeline", {"strategy.schedule": "gpipe", "strategy.microbatches": 1}),
        ("mesh", {**FOUR, "strategy.pipeline": 2}),
        ("tensor", {"trainer.devices": 1}),
    ],
)
def test_a_layout_that_can_work_passes(layout, name, changes):
    settle(layout(name, changes))


@pytest.mark.parametrize(
    ("name", "changes", "types"),
    [
        ("fsdp", {}, (None, None)),
        ("fsdp", {"trainer.precision": "bf16-mixed"}, ("bfloat16", "float32")),
        ("hsdp", {"trainer.precision": "bf16-mixed"}, ("bfloat16", "float32")),
        ("context", {"trainer.precision": "bf16-mixed"}, ("bfloat16", "float32")),
        ("fsdp_pipeline", {"trainer.precision": "bf16-mixed"}, ("bfloat16", "float32")),
        ("fsdp", {"trainer.precision": "bf16-mixed", "strategy.param_dtype": None}, (None, None)),
        ("fsdp", {"trainer.precision": "bf16-mixed", "strategy.reduce_dtype": "bfloat16"}, ("bfloat16", "bfloat16")),
        ("fsdp", {"strategy.param_dtype": "bfloat16", "strategy.reduce_dtype": None}, ("bfloat16", "float32")),
        ("fsdp", {"trainer.precision": "bf16-true"}, (None, "float32")),
        # `auto` makes no layout use FSDP.
        ("tensor", {"trainer.precision": "bf16-mixed"}, (None, None)),
        ("pipeline", {"trainer.precision": "bf16-mixed"}, (None, None)),
        ("mesh", {**FOUR, "strategy.shard": 1, "strategy.replicate": 2, "strategy.pipeline": 2, "trainer.precision": "bf16-mixed"}, (None, None)),
        ("ddp", {"trainer.precision": "bf16-mixed"}, (None, None)),
        ("single", {"trainer.precision": "bf16-mixed"}, (None, None)),
    ],
)  # fmt: skip
def test_types_of_parameters_and_sums_are_fsdps_own(layout, name, changes, types):
    strategy = settle(layout(name, changes))["strategy"]
    assert (strategy["param_dtype"], strategy["reduce_dtype"]) == types
    assert uses_fsdp(strategy) is uses_fsdp({**strategy, "param_dtype": None, "reduce_dtype": None})


def test_cpu_offload_is_for_gpus(layout, monkeypatch):
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert settle(layout("fsdp", {"strategy.cpu_offload": True}))["trainer"]["devices"] == 2
    with pytest.raises(ConfigError, match="only 2 GPUs"):
        settle(layout("tensor_pipeline", {}))


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
def test_the_width_that_is_checked_is_the_models(activation):
    from meshformer.model import Transformer

    for width in (8, 48, 100, 128, 384, 768):
        model = Transformer(3, 1, 2, width, 4, activation=activation)
        assert model.blocks[0].mlp.up.out_features == feed_forward_width(width, activation)
