"""`meshformer plan`: the candidates, the screen, the override to type, and requests that are impossible."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from meshformer.cli import main
from meshformer.command import plan as command
from meshformer.command.compose import compose
from meshformer.command.plan import choose, request_of
from meshformer.config import ConfigError
from meshformer.config.degrees import Degrees
from meshformer.config.paths import conf_dir
from meshformer.plan import candidates as candidates_module
from meshformer.plan import steptime
from meshformer.plan.answer import best_of_each, overrides, why
from meshformer.plan.candidates import SAME, candidates
from meshformer.plan.counted import LiveMemory
from meshformer.plan.sizes import read_sizes

LLAMA = ["model=llama3_8b", "data.context_length=8192", "data.batch_size=512", "cluster=h100x8", "cluster.nodes=8"]
SMALL = ["model=nano", "data.batch_size=16", "data.context_length=128", "trainer.precision=32-true", "cluster=h100x8", "cluster.cards=4"]


def planned(*settings):
    return candidates(request_of(list(settings)))


def test_candidates_use_every_card_and_keep_the_batch():
    for candidate in planned(*LLAMA):
        assert candidate.degrees.processes == 64
        assert candidate.layout.batch == 512


def test_one_card_is_one_process():
    found = planned("model=small", "data.batch_size=16", "cluster=h100x8", "cluster.cards=1")
    assert found and {candidate.degrees.processes for candidate in found} == {1}
    request = request_of(["model=small", "data.batch_size=16", "cluster=h100x8", "cluster.cards=1"])
    assert overrides(found[0], request)[0] == "strategy=single"


def test_the_order_is_by_time_in_steps_of_the_prediction_s_error():
    fitting = [candidate for candidate in planned(*LLAMA) if candidate.fits]
    best = min(candidate.step.total for candidate in fitting)
    assert fitting[0].step.total <= (1 + SAME) * best
    assert fitting[0].axes == min(c.axes for c in fitting if c.step.total <= (1 + SAME) * best)


MACHINE = """{"cluster": {"card": "this", "cards": 4, "nodes": 1, "memory": 8.0, "peak": {"fp32": 0.2}, "bandwidth": 5.0, "link": 1.0,
"network": 1.0, "link_latency": 300.0, "network_latency": 0.0, "power": 0.0, "host": 30.0, "reduction": 2.0, "sharded": 10.0, "alone": 3.0},
"constants": {"products": 1.0, "attention": 0.25, "link": 1.0, "exposed": 1.0}}"""


def test_this_machine_is_asked_with_the_runs_own_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MESHFORMER_DATA", str(tmp_path))
    (tmp_path / "cluster-this.json").write_text(MACHINE, encoding="utf-8")
    given = ["strategy=auto", "data.batch_size=16", "trainer.max_steps=7"]
    chosen, record = choose(given, None)
    assert "trainer.max_steps=7" in chosen and not any("precision" in o or "compile" in o or o == "strategy=auto" for o in chosen)
    assert record["cluster"] == "this" and record["predicted_step_seconds"] > 0 and len(record["why"]) == 5
    assert "strategy=auto: " in capsys.readouterr().err
    asked, _ = choose([*given, "trainer.devices=2"], None)
    assert "trainer.devices=2" in asked  # two processes were asked for, so one that uses all cores is no answer
    assert {candidate.degrees.processes for candidate in planned("data.batch_size=16")} == {1, 4}
    assert {candidate.degrees.processes for candidate in planned("data.batch_size=16", "cluster.cards=2")} == {2}
    (tmp_path / "cluster-this.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="is damaged"):
        choose(given, None)


def test_memory_is_counted_until_a_layout_fits(monkeypatch, capsys):
    """The first five are counted as too large, so the next five are."""
    peaks = iter([79e9] * 5 + [60e9] * 5)
    monkeypatch.setattr(
        command, "count_all", lambda configs, at_once: [LiveMemory(0, int(next(peaks)), "loss", {}, 0, 0, 0, 0.0) for _ in configs]
    )
    assert main(["plan", *LLAMA, "--top", "6"]) == 0
    said = capsys.readouterr().out
    sixth = best_of_each([candidate for candidate in planned(*LLAMA) if candidate.fits])[5]
    assert " ".join(overrides(sixth, request_of(LLAMA))) in said.partition("Type this")[2]


def test_a_count_that_fails_is_no_verdict_on_memory(monkeypatch, capsys):
    """The reason is printed once, no further layouts are tried, and the screen does not say that none fits."""
    asked = []
    monkeypatch.setattr(command, "count_all", lambda configs, at_once: asked.append(configs) or ["it could not be counted"] * len(configs))
    assert main(["plan", *LLAMA]) == 0
    said = capsys.readouterr().out
    assert len(asked) == 1 and said.count("it could not be counted") == 1
    assert "only estimated" in said and "None of them" not in said
    assert " ".join(overrides(planned(*LLAMA)[0], request_of(LLAMA))) in said


def test_a_batch_that_was_forgotten_is_noticed(capsys):
    assert main(["plan", "model=llama3_8b", "cluster=h100x8", "cluster.nodes=8", "--quick"]) == 0
    assert "Only 32 tokens a card and step" in capsys.readouterr().out
    assert main(["plan", *LLAMA, "--quick"]) == 0
    assert "Only" not in capsys.readouterr().out


def test_memory_decides_what_fits():
    found = planned(*LLAMA)
    assert {True, False} == {candidate.fits for candidate in found}
    assert all(candidate.fits == (candidate.memory.total <= 0.9 * 80e9) for candidate in found)


def test_every_override_to_type_passes_the_checks_of_training():
    request = request_of(SMALL)
    found = candidates(request)
    assert len(best_of_each(found)) >= 6
    for candidate in [*best_of_each(found), *found[::9]]:
        config = compose(["model=nano", "data.batch_size=16", "data.context_length=128", *overrides(candidate, request)])
        assert Degrees.from_config(config["strategy"]) == candidate.degrees, overrides(candidate, request)
        assert config["trainer"]["accumulate_grad_batches"] == candidate.layout.accumulation
        assert config["strategy"]["microbatches"] == candidate.layout.microbatches
        assert config["strategy"]["activation_checkpointing"] == candidate.checkpointing


@pytest.mark.parametrize(
    ("typed", "holds"),
    [
        ("strategy.tensor=4", lambda c: c.layout.tensor == 4),
        ("strategy=fsdp", lambda c: c.layout.shard == 64 and c.layout.tensor == 1),
        ("strategy.activation_checkpointing=full", lambda c: c.checkpointing == "full"),
        ("trainer.accumulate_grad_batches=2", lambda c: c.layout.accumulation == 2),
    ],
)
def test_what_is_typed_stays(typed, holds):
    found = planned(*LLAMA, typed)
    assert found and all(holds(candidate) for candidate in found)


def test_the_screen(capsys):
    assert main(["plan", *LLAMA, "--quick", "--why", "--tokens", "1e12"]) == 0
    said = capsys.readouterr().out
    assert "8.03 billion parameters" in said and "64 × h100_80gb (8 nodes of 8)" in said
    assert "meshformer train model=llama3_8b data.context_length=8192 data.batch_size=512 trainer.precision=bf16-mixed" in said
    assert "trainer.devices=8 trainer.num_nodes=8" in said
    reasons = said.partition("\nWhy\n")[2].strip().splitlines()
    assert len(reasons) == 5 and all(reason.strip().endswith(".") for reason in reasons)
    assert "1 trillion tokens" in said and "MWh" in said


def test_five_reasons_for_every_kind_of_layout():
    request = request_of(LLAMA)
    found = candidates(request)
    for candidate in best_of_each([c for c in found if c.fits])[:40]:
        assert len(why(candidate, found, request)) == 5


def test_within_two_seconds_and_without_torch():
    script = "import sys; from meshformer.cli import main; c = main(sys.argv[1:]); print('TORCH', 'torch' in sys.modules); sys.exit(c)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, "plan", *LLAMA, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0 and "TORCH False" in done.stdout
    assert time.perf_counter() - start < 20  # two seconds on a quiet machine; the bound catches an import of torch or a slow search


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["cluster=h100x9"], "cluster=h100x9: there is no such option. Did you mean h100x8?"),
        (["cluster=h100x8", "cluster.memory=null"], "cluster.memory: a cluster needs it"),
        (["cluster=h100x8", "cluster.memory=-1"], "cluster.memory=-1: must be above 0"),
        (["cluster=h100x8", "cluster.nodes=0"], "cluster.nodes=0: must be a whole number of at least 1"),
        (["cluster=h100x8", "cluster.peak.int4=3"], "cluster.peak.int4: "),
        (["cluster=h100x8", "cluster.memroy=3"], "cluster.memroy: "),
        (["cluster=h100x8", "trainer.devices=4"], "trainer.devices=4: comes from the cluster. Use cluster.cards=4."),
        (["cluster=h100x8", "trainer.precision=bf16-mixed", "~cluster.peak.bf16"], "the cluster has no rate for bf16. Give cluster.peak.bf16=…"),
        (["cluster=h100x8", "--csv", "/"], "--csv=/: exists already"),
        (["cluster=h100x8", "data.batch_size=12"], "no layout divides it over 8 cards"),
        (["cluster=h100x8", "data.batch_sise=12"], "data.batch_sise"),
        (["cluster=h100x8", "model.n_layers=x"], "model.n_layers=x"),
        (["cluster=h100x8", "--tokens", "-3"], "--tokens=-3.0: must be a number of tokens"),
        (["cluster=h100x8", "--scale", "8,12"], "--scale=8,12: a node has 8 cards, and 12 is no whole number of nodes"),
        (["cluster=h100x8", "--whi"], "--whi"),
        (["cluster=h100x8", "--figure", "a.txt"], "--figure=a.txt: must end in .png, .svg or .pdf"),
    ],
)
def test_bad_input_gets_one_sentence(settings, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Learned positions and 3 heads keep tensor and context parallelism away from a batch that does not divide.
    more = ["model.n_heads=3", "model.d_model=96", "model.n_layers=1"] if "data.batch_size=12" in settings else []
    assert main(["plan", "model=nano", "data.batch_size=16", "data.context_length=128", "--quick", *more, *settings]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_impossible_request_says_what_would_help(capsys):
    large = ["model=llama3_70b", "data.context_length=8192", "data.batch_size=512", "cluster=h100x8", "--quick"]
    assert main(["plan", *large]) == 2
    said = capsys.readouterr().err
    assert "no layout fits in 90 % of 80 GB" in said and "cluster.nodes=4" in said
    assert main(["plan", *large, "cluster.nodes=4"]) == 0


def test_remedies_predict_no_layout_that_cannot_fit(capsys, monkeypatch):
    """405 billion parameters on a node: the request's own candidates have a predicted time, and of larger clusters only the fitting ones."""
    calls = []
    monkeypatch.setattr(candidates_module, "step_time", lambda *given: calls.append(given) or steptime.step_time(*given))
    large = ["model=llama3_405b", "data.context_length=8192", "data.batch_size=512", "cluster=h100x8"]
    assert main(["plan", *large, "--quick"]) == 2
    assert "cluster.nodes=16" in capsys.readouterr().err
    assert len(calls) < len(planned(*large)) + 200


@pytest.mark.parametrize("more", [[], ["model.n_layers=80"]])
def test_the_fitting_candidates_are_the_same_when_only_they_are_asked_for(more):
    request = request_of([*LLAMA, *more])
    assert candidates(request, only_fitting=True) == [candidate for candidate in candidates(request) if candidate.fits]


def test_the_cheapest_remedy_comes_first(capsys):
    typed = ["strategy=fsdp", "strategy.activation_checkpointing=none", "trainer.accumulate_grad_batches=1"]
    assert main(["plan", *LLAMA, "--quick", *typed]) == 2
    ways = capsys.readouterr().err.partition("Cheapest first: ")[2].split("; ")
    assert ways[0].startswith("smaller micro-batches") and ways[1].startswith("strategy.activation_checkpointing=")


def test_apply_writes_an_experiment_that_trains(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["plan", *SMALL, "--quick", "--apply", "chosen"]
    assert main(given) == 0
    written = Path("conf/experiment/chosen.yaml")
    assert "--config-dir conf experiment=chosen" in capsys.readouterr().out
    config = compose(["experiment=chosen"], config_dir="conf")
    assert config["trainer"]["devices"] == 4 and config["data"]["batch_size"] == 16
    before = written.read_bytes()
    assert main(given) == 2 and written.read_bytes() == before
    assert "exists already" in capsys.readouterr().err
    assert main(["plan", *SMALL, "--quick", "--apply", "../elsewhere"]) == 2


def test_csv_lists_every_candidate(tmp_path, capsys):
    file = tmp_path / "all.csv"
    assert main(["plan", *SMALL, "--quick", "--csv", str(file)]) == 0
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(planned(*SMALL)) and lines[0].startswith("replicate,shard,")
    assert main(["plan", *SMALL, "--quick", "--csv", str(file)]) == 2


def test_scale_says_where_a_layout_stops_paying(capsys, tmp_path):
    picture = tmp_path / "scale.svg"
    assert main(["plan", *LLAMA[:4], "--scale", "8,64,512", "--figure", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "Weak scaling" in said and "Strong scaling" in said and "pays up to" in said
    assert picture.read_text(encoding="utf-8").count("</svg>") == 1


def test_a_model_without_the_usual_settings_is_refused():
    config = compose(["model=nano"])
    with pytest.raises(ConfigError, match="usual_settings"):
        read_sizes({**config, "model": {"_target_": "torch.nn.Linear"}})
    with pytest.raises(ConfigError, match=r"model\.d_model: needs a value"):
        read_sizes({**config, "model": {**config["model"], "d_model": None}})


def test_files_of_clusters_say_where_their_numbers_come_from():
    for file in (conf_dir() / "cluster").glob("*x8.yaml"):
        text = file.read_text(encoding="utf-8")
        assert "Source" in text.splitlines()[0], file
        assert set(yaml.safe_load(text)) >= {"memory", "peak", "bandwidth", "link", "network"}
