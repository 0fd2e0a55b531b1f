"""Predicted step times: the published measurements, and what arithmetic alone says."""

import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from harness import run_ranks
from meshformer.bench.plan import (
    clusters,
    extrapolated,
    fit,
    fsdp_rows,
    held_out,
    ordered,
    product_rows,
    products_fitted,
    relative,
    to_store,
)
from meshformer.compat.torch_distributed import init_fake_process_group
from meshformer.config.paths import conf_dir
from meshformer.plan import steptime
from meshformer.plan.cluster import read_cluster
from meshformer.plan.measure import _timed, of_gpu
from meshformer.plan.sizes import Sizes
from meshformer.plan.steptime import Constants, StepLayout, bubbles, constants, stage_blocks, step_time

SIZES = Sizes(24, 2048, 16, 128, 2048, 8192, False, 50304, True, 2048)
CLUSTER = read_cluster({**yaml.safe_load((conf_dir() / "cluster" / "h100x8.yaml").read_text(encoding="utf-8")), "nodes": 4})
FITTED = constants("h100_80gb")


@pytest.fixture(scope="module")
def fitted():
    return fit(fsdp_rows(), clusters())


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_were_left_out(seed):
    errors = held_out(fsdp_rows(), clusters(), seed)
    assert errors.mean < 0.06
    assert errors.within_15 >= 0.9


def test_larger_models_more_cards_and_longer_texts_than_those_fitted():
    for name, errors in extrapolated(fsdp_rows(), clusters()).items():
        assert errors.mean < 0.1, name


def test_layouts_of_several_axes_that_fitted_nothing(fitted):
    of = clusters()
    both = {**fitted, "h100_96gb": products_fitted(fitted, of)}
    errors = relative(product_rows()[3:], both, of)
    assert statistics.mean(errors) < 0.1 and max(errors) < 0.2
    # Without the exchanges of tensor parallelism and the bubble, the same rows are far off: the test can fail.
    blind = [replace(row, layout=replace(row.layout, pipeline=1, microbatches=row.layout.microbatches)) for row in product_rows()[7:]]
    assert max(relative(blind, both, of)) > 0.2


def test_pairs_are_in_the_measured_order(fitted):
    right, pairs = ordered(fsdp_rows(), fitted, clusters())
    assert pairs > 200 and right / pairs >= 0.95


def test_the_stored_constants_are_those_of_the_fit(fitted):
    stored = json.loads((Path(steptime.__file__).parent / "constants.json").read_text(encoding="utf-8"))
    again = to_store({**fitted, "h100_96gb": products_fitted(fitted, clusters())})
    assert stored["common"] == pytest.approx(again["common"], rel=0.02)
    assert stored["cards"].keys() == again["cards"].keys()
    for card, values in again["cards"].items():
        assert stored["cards"][card] == pytest.approx(values, rel=0.02), card


def test_a_card_without_measurements_has_the_mean_of_the_others():
    cards = [constants(card) for card in ("a100_40gb", "a100_80gb", "h100_80gb", "h100_96gb")]
    assert constants("b200_180gb").products == pytest.approx(statistics.mean(c.products for c in cards))


def test_one_card_communicates_nothing():
    step = step_time(SIZES, StepLayout(samples=4), CLUSTER, FITTED)
    assert step.tensor == step.context == step.data == step.bubble == 0
    assert step.total == pytest.approx(sum(asdict(step).values()))


def test_an_ideal_card_takes_the_models_flops():
    ideal = replace(CLUSTER, bandwidth=1e30, link=1e30, network=1e30, link_latency=0.0, network_latency=0.0, host=0.0)
    perfect = Constants(products=1.0, attention=1.0, link=1.0, head=0.0)
    step = step_time(SIZES, StepLayout(samples=4, shard=32), ideal, perfect)
    # The attention's backward pass computes the scores again: 3.5 times the forward pass instead of 3.
    attention = 3 * 4 * SIZES.layers * SIZES.query_width * SIZES.keys_seen
    flops = 4 * SIZES.length * (SIZES.flops_per_token + attention * 0.5 / 3)
    assert step.total == pytest.approx(flops / ideal.peak["bf16"], rel=1e-6)


def test_parameters_are_those_of_the_model():
    import torch

    from meshformer.model import Transformer
    from meshformer.model.count import parameter_count

    sizes = Sizes(3, 256, 4, 64, 128, 704, True, 1000, False, 64)
    with torch.device("meta"):
        model = Transformer(1000, 3, 4, 256, 64, n_kv_heads=2, activation="swiglu", tie_embeddings=False)
    assert sizes.parameters == pytest.approx(parameter_count(model), rel=2e-3)


def test_the_bubble_of_equal_stages():
    layout = StepLayout(samples=1, pipeline=4, microbatches=12)
    step = step_time(replace(SIZES, layers=8, vocabulary=1), layout, CLUSTER, FITTED)
    work = step.products + step.attention + step.memory + step.host
    assert step.bubble / work == pytest.approx(3 / 12)  # (P − 1) / M of the work (Narayanan et al. 2021)
    assert bubbles(replace(layout, stages=2, schedule="interleaved_1f1b")) == pytest.approx(1.5)


def test_the_head_counts_as_blocks():
    assert stage_blocks(replace(SIZES, vocabulary=1), 4, 1) == (6, 6)
    most, last = stage_blocks(replace(SIZES, vocabulary=256_000), 4, 1)
    assert last < most and 3 * most + last >= SIZES.layers


def test_ddp_waits_for_a_bucket_and_hsdp_for_every_unit():
    slow = replace(CLUSTER, link=1e30, link_latency=1.0)
    here = Constants(products=1.0, attention=1.0, link=1.0, exposed=1.0)
    ddp, hsdp = (step_time(SIZES, StepLayout(samples=1, replicate=2, fsdp=fsdp), slow, here).data for fsdp in (False, True))
    buckets = 1 + SIZES.parameters * 4 // (25 * 2**20)
    assert ddp == pytest.approx(2 * buckets, rel=1e-6)  # an all-reduce is a reduction and a gather
    assert hsdp == pytest.approx(2 * (SIZES.layers + 1), rel=1e-6)


def test_cores_copy_what_they_exchange_along_the_tokens():
    cores = replace(CLUSTER, alone=2.0, link=1e30, link_latency=0.0)
    along, whole = (step_time(SIZES, StepLayout(samples=1, tensor=2, sequence_parallel=sp), cores, FITTED).tensor for sp in (True, False))
    assert along == pytest.approx(2 * 8 * SIZES.layers * SIZES.length * SIZES.width * 2 / cores.bandwidth, rel=1e-3) and whole < 1e-3 * along


def measured_after_a_pause() -> tuple[float, float]:
    """Seconds of 0.01 of sleep, by itself and after 0.04 more that are not counted."""
    init_fake_process_group(0, 1)
    alone = _timed(lambda: time.sleep(0.01), least=0.02)
    return alone, _timed(lambda: time.sleep(0.01), lambda: time.sleep(0.04), least=0.02)


def test_a_collective_is_timed_without_what_runs_before_it():
    alone, after = run_ranks(1, measured_after_a_pause)[0]
    assert alone >= 0.01 and 0.01 <= after < 0.04


def test_ulysses_sends_less_from_three_ranks_on():
    """Of each token a rank sends its own queries, keys, values and results once, and gathers every other rank's keys and values: equal at two."""
    fast = replace(CLUSTER, link_latency=0.0, cards=16)

    def seconds(context, ulysses, sizes=SIZES):
        return step_time(sizes, StepLayout(samples=1, context=context, ulysses=ulysses), fast, FITTED).context

    # Forward and backward, four exchanges of half of a rank's tokens, in bf16, of which half stay on the rank.
    assert seconds(2, True) == pytest.approx(2 * 4 * 2 * SIZES.layers * SIZES.length / 2 * SIZES.width / 2 / (fast.link * FITTED.link))
    assert seconds(2, True) == pytest.approx(seconds(2, False))
    assert seconds(8, True) == pytest.approx(seconds(8, False) / 4)
    few_keys = replace(SIZES, key_width=SIZES.key_width // 4)
    assert seconds(4, True, few_keys) > seconds(4, False, few_keys)


def test_float8_gains_more_from_wide_layers():
    def gain(width):
        sizes = replace(SIZES, width=width, feed_forward=4 * width, heads=width // 128, key_width=width)
        both = [step_time(sizes, StepLayout(samples=4, float8=float8), CLUSTER, FITTED).products for float8 in (False, True)]
        return both[0] / both[1]

    assert 1.0 < gain(1024) < gain(8192) < 2.0


def test_more_nodes_make_fsdps_gathers_dearer():
    few, many = (step_time(SIZES, StepLayout(samples=1, shard=shard), CLUSTER, FITTED).data for shard in (8, 256))
    assert many > few > 0


def test_a_gpu_has_the_numbers_of_its_datasheet():
    assert of_gpu("NVIDIA A100-SXM4-40GB", 4)["card"] == "a100_40gb" and of_gpu("NVIDIA A100-SXM4-80GB", 4)["card"] == "a100_80gb"
    assert of_gpu("NVIDIA H200", 1) | {"cards": 8} == yaml.safe_load((conf_dir() / "cluster" / "h200x8.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="no file for the card Radeon"):
        of_gpu("Radeon", 1)


@pytest.mark.parametrize("file", sorted((conf_dir() / "cluster").glob("*x8.yaml")), ids=lambda file: file.stem)
def test_every_cluster_can_be_read(file):
    cluster = read_cluster(yaml.safe_load(file.read_text(encoding="utf-8")))
    assert cluster.processes == 8 and 1e14 < cluster.peak["bf16"] < 1e16 and 3e10 < cluster.memory < 3e11
    assert cluster.bandwidth > cluster.link > cluster.network
