"""Runs in a notebook: frames, models, figures, the report, on real runs; pipelines and power laws against theory."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from meshformer.cli import main
from meshformer.record import RunNotFound
from meshformer.runs import attention_maps, compare, figures, load_metrics, load_model, load_runs, loss_by_position, training_flops
from meshformer.runs.fits import fit_power_law, lower_envelope
from meshformer.runs.frames import distinguishing_columns, labels, setting_columns
from meshformer.runs.panels import panels
from meshformer.runs.table import text_table
from meshformer.runs.timeline import idle_share, play
from run_folders import write_run


def test_frames_of_real_runs(real_runs):
    runs, metrics = load_runs(real_runs), load_metrics(real_runs)
    assert len(runs) == 4 and set(runs["state"]) == {"finished"}
    assert setting_columns(runs) == ["seed", "optimizer.lr"], "what the overrides changed, and nothing else"
    assert runs["step"].tolist() == [6] * 4 and (runs["tokens_per_second"] > 0).all() and (runs["training_s"] > 0).all()
    one = metrics[(metrics["run"] == "lr-0.1-seed-2") & (metrics["metric"] == "val/loss")]
    assert one["step"].tolist() == [3, 6] and one["tokens"].tolist() == [3 * 8 * 16, 6 * 8 * 16]
    assert one["optimizer.lr"].tolist() == [0.1, 0.1] and one["training_s"].is_monotonic_increasing
    assert one["value"].iloc[-1] == runs.set_index("run").loc["lr-0.1-seed-2", "val/loss"]
    assert set(labels(runs)) == {"lr 0.01", "lr 0.1"}


def test_compare_is_mean_and_deviation_over_seeds(tmp_path):
    for seed, (a, b) in enumerate([(2.0, 3.0), (2.2, 3.4)]):
        write_run(tmp_path / f"a{seed}", seed=seed, lr=0.1, rows=[f"1,2,10,3.0,{a}"])
        write_run(tmp_path / f"b{seed}", seed=seed, lr=0.2, rows=[f"1,2,10,3.0,{b}"])
    write_run(tmp_path / "c", lr=0.3, rows=["1,2,10,3.0,1.0"], state="failed")
    table = compare(tmp_path)
    assert table["optimizer.lr"].tolist() == [0.1, 0.2] and table["seeds"].tolist() == [2, 2]
    assert table["val/loss"].tolist() == pytest.approx([2.1, 3.2])
    assert table["val/loss ±"].tolist() == pytest.approx([0.2 / 2**0.5, 0.4 / 2**0.5])
    runs = load_runs(tmp_path)
    alone = compare(runs[runs["run"] == "a0"])
    assert len(alone) == 1 and alone["val/loss"].item() == 2.0
    with pytest.raises(KeyError, match="val/loss"):
        compare(runs, "val/accuracy")
    with pytest.raises(RunNotFound):
        load_runs(tmp_path / "a0" / "nothing")


def test_damage_is_a_warning(tmp_path):
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b") / "config.yaml").write_text("a: [")
    with pytest.warns(UserWarning, match=r"b/config\.yaml"):
        assert load_runs(tmp_path)["run"].tolist() == ["a"]


def test_load_model_gives_the_loss_that_training_saw(real_runs):
    task = load_model(real_runs / "lr-0.1-seed-1")
    assert not task.training and task.tokenizer.vocab_size == task.model.vocab_size
    losses = loss_by_position(real_runs / "lr-0.1-seed-1", 16, windows=40)
    runs = load_runs(real_runs).set_index("run")
    assert losses.shape == (16,) and abs(losses.mean().item() - runs.loc["lr-0.1-seed-1", "val/loss"]) < 0.1
    assert training_flops(real_runs / "lr-0.1-seed-1") > 6 * 2 * 12 * 32**2


def test_attention_maps_are_the_weights_the_model_uses(real_runs):
    model = load_model(real_runs / "lr-0.1-seed-1").model
    tokens_BT = torch.randint(model.vocab_size, (2, 9))
    before, kernels = model(tokens_BT), [block.attention.attend for block in model.blocks]
    maps_LBHTS = attention_maps(model, tokens_BT)
    assert maps_LBHTS.shape == (2, 2, 4, 9, 9)
    torch.testing.assert_close(maps_LBHTS.sum(-1), torch.ones(2, 2, 4, 9))
    assert maps_LBHTS.triu(1).abs().max() == 0
    assert [block.attention.attend for block in model.blocks] == kernels and torch.equal(model(tokens_BT), before)
    figures.attention(maps_LBHTS[:, 0], list("abcdefghi"))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("microbatches", [4, 8])
def test_pipelines_idle_as_theory_says(ranks, microbatches):
    P, M = ranks, microbatches
    assert idle_share(play("gpipe", P, M)) == pytest.approx((P - 1) / (M + P - 1))
    assert idle_share(play("1f1b", P, M)) == pytest.approx((P - 1) / (M + P - 1))
    assert idle_share(play("interleaved_1f1b", P, M)) == pytest.approx((P - 1) / (2 * M + P - 1))
    zero_bubble = play("interleaved_zero_bubble", P, M)
    assert idle_share(zero_bubble) < (P - 1) / (2 * M + P - 1)
    for spans in (play("1f1b", P, M), zero_bubble):
        assert len({(s.stage, s.kind, s.microbatch) for s in spans}) == len(spans)
        for rank in range(P):  # one thing at a time
            own = sorted((s.start, s.end) for s in spans if s.rank == rank)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(own))


def test_power_laws_are_found():
    x = np.geomspace(1e4, 1e7, 7)
    law = fit_power_law(list(x), list(1.7 + 30 * x**-0.4))
    assert (law.floor, law.exponent) == (pytest.approx(1.7, abs=0.02), pytest.approx(0.4, abs=0.02))
    law = fit_power_law(list(x[:3]), list(8 * x[:3] ** -0.07))
    assert (law.floor, law.exponent, law.scale) == (0, pytest.approx(0.07), pytest.approx(8))
    with pytest.raises(ValueError, match="two different x"):
        fit_power_law([1, 1], [2, 3])
    # (2, 2.1) and (3, 3.0) lie above the line from the first to (4, 1.0); at 16 the loss rises again.
    assert lower_envelope([1, 2, 4, 8, 3, 16], [4.0, 2.1, 1.0, 0.9, 3.0, 1.1]) == ([1, 4, 8], [4.0, 1.0, 0.9])


def test_every_figure_is_drawn(real_runs, tmp_path):
    runs, metrics = load_runs(real_runs), load_metrics(real_runs)
    drawn = [figures.curves(metrics), figures.against(runs, "optimizer.lr"), figures.one_run(metrics[metrics["run"] == runs["run"][0]])]
    runs["flops"], sized = 10, runs.assign(parameters=[100, 100, 1000, 1000])
    drawn += [figures.encodings(), figures.extrapolation({"rotary": np.ones(64), "learned": np.ones(16)}, 16), figures.pipelines(ranks=2)]
    drawn += [figures.scaling(sized.assign(flops=10), metrics), figures.speed_and_memory(runs)]
    (curve,) = drawn[1].axes
    assert curve.get_xscale() == "log" and len(curve.collections[0].get_offsets()) == 4
    assert all(axes.get_xlabel() or axes.get_title() for figure in drawn for axes in figure.axes[-1:])
    paths = figures.save(drawn[0], tmp_path / "a" / "curves")
    assert paths[0].read_bytes()[:4] == b"%PDF" and "<svg" in paths[1].read_text()


def test_bands_are_mean_and_deviation(real_runs):
    runs, metrics = load_runs(real_runs), load_metrics(real_runs)
    axes = figures.curves(metrics, x="step").axes[0]
    final = runs[runs["optimizer.lr"] == 0.01]["val/loss"]
    assert axes.lines[0].get_label() == "lr 0.01" and axes.lines[0].get_ydata()[-1] == pytest.approx(final.mean())
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band, final.mean() + final.std()).any()


def test_parity_draws_the_differences(tmp_path):
    for strategy, off in (("single", 0.0), ("ddp", 1e-6), ("fsdp", 0.0)):
        write_run(tmp_path / strategy, strategy=strategy, rows=[f"{step},{2 * step},10,{3 + off!r}," for step in (1, 2)])
    metrics = load_metrics(tmp_path)
    metrics = pd.concat([metrics, metrics.replace("train/loss", "train/grad_norm")])
    lines = {line.get_label(): line for line in figures.parity(metrics).axes[0].lines}
    assert lines["ddp"].get_ydata() == pytest.approx([1e-6, 1e-6], rel=1e-3) and len(lines["fsdp"].get_ydata()) == 0
    assert distinguishing_columns(load_runs(tmp_path)) == ["strategy"]


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href")]


@pytest.mark.parametrize("what", ["sweep", "run"])
def test_the_report_is_one_file_that_fetches_nothing(real_runs, tmp_path, capsys, what):
    page = tmp_path / "page.html"
    source = real_runs if what == "sweep" else real_runs / "lr-0.1-seed-1"
    assert main(["report", str(source), "--output", str(page)]) == 0, capsys.readouterr().err
    text = page.read_text()
    links = _Links()
    links.feed(text)
    assert links.tags.count("img") >= (6 if what == "sweep" else 3)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)  # the one that the page's policy names
    assert f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}" in text and "fetch" not in script
    plots = [json.loads(html.unescape(found)) for found in re.findall(r'data-plot="(.*?)"', text)]
    assert len(plots) >= 3 and any("loss" in plot["names"][1] and len(plot["lines"][0]["x"]) > 1 for plot in plots)
    for plot in plots:  # a point inside the ranges lies inside the frame, and the frame inside the image
        assert 0 < plot["box"][0] < plot["box"][2] <= 1 and 0 <= plot["box"][1] < plot["box"][3] < 1
    assert all(address.startswith("data:image/svg+xml;base64,") for address in links.addresses)
    assert "n_layers: 2" in text
    assert what == "run" or re.search(r"<td[^>]*>0\.1</td>", text), "the learning rate is a column"


def test_the_values_for_the_pointer_are_those_of_the_lines_at_their_place():
    frame = pd.DataFrame({"step": [1, 2, 3], "value": [3.0, 2.0, float("nan")], "metric": "train/loss"})
    loss, *_ = panels(figures.one_run(frame))
    plot = json.loads(loss["plot"])
    training = next(line for line in plot["lines"] if line["name"] == "training")
    assert (training["x"], training["y"], training["colour"]) == ([1, 2], [3, 2], figures.COLOURS[0].lower())
    assert plot["names"] == ["optimizer step", "loss (nats)"] and plot["log"] == [False, False]
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots()
        axes.plot([1, 10, 100], [1, 2, 3], label="$a$")
        axes.axhline(2)
        axes.set_xscale("log")
    (panel,) = panels(figure)
    plot = json.loads(panel["plot"])
    assert plot["log"] == [True, False] and [line["name"] for line in plot["lines"]] == ["$a$"]


def test_learning_rates_over_decades_stand_on_a_logarithmic_axis_without_colliding_labels():
    runs = pd.DataFrame({"optimizer.lr": [1e-4, 1e-3, 1e-2, 1.1e-2, 0.1], "val/loss": [3.0, 2.5, 2.2, 2.1, 2.6], "state": "finished"})
    axes = figures.against(runs, "optimizer.lr").axes[0]
    assert axes.get_xscale() == "log" and list(axes.get_xticks()) == [1e-4, 1e-3, 1e-2, 0.1]


def test_seconds_shown_as_a_time_have_a_heading_without_a_unit():
    assert text_table([{"run": "a", "duration_s": 7.0}], ["run", "duration_s"]).splitlines() == ["run  duration", "a     0:00:07"]


def test_the_report_shows_text_as_text(tmp_path):
    write_run(tmp_path / "a<b>", overrides="run.name=<script>alert(1)</script>\n")
    assert main(["report", str(tmp_path / "a<b>"), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and page.count("<script") == 1 and "&lt;script&gt;" in page
