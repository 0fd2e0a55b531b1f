"""Every mistake at the command line: one sentence on stderr that names it and what to write, exit code 2, no trace, nothing made, no torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from meshformer.cli import main

SRC = Path(__file__).parents[1] / "src"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def launched(*arguments: object) -> None:
    raise AssertionError("a job was started")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tran", ["'tran'", "Did you mean train?"]),
        ("train model.n_layer=3", ["model.n_layer:", "Did you mean model.n_layers?"]),
        ("train optimzer.lr=3", ["optimzer.lr:", "Did you mean optimizer.lr?"]),
        ("train model=nanoo", ["model=nanoo", "Did you mean nano?"]),
        ("train model/positon=rotary", ["model/positon", "Did you mean model/position?"]),
        ("train model/position=rotery", ["model/position=rotery", "Did you mean rotary?"]),
        ("train ~callbacks.sample", ["callbacks.sample:", "Did you mean callbacks.samples?"]),
        ("train +optimizer.momentun=0.9", ["optimizer.momentun", "Did you mean momentum?"]),
        ("train trainer.max_steps=many", ["trainer.max_steps=many", "a whole number of at least 1"]),
        ("train strategy=single trainer.devices=2", ["trainer.devices=2", "strategy=ddp"]),
        ("train model=nano,micro", ["model=nano,micro", "Add -m"]),
        ("train sweep=seed", ["sweep=seed", "Add -m"]),
        ("train +experiment=shakespeare_char", ["+experiment", "Leave the + out"]),
        ("train lr=0.1", ["lr:", "Did you mean optimizer.lr?"]),
        ("train logger.wandb._target_=x.Y", ["logger.wandb._target_", "To add one, write +logger.wandb._target_="]),
        ("train callbacks.lrm._target_=x.Y", ["To add one, write +callbacks.lrm._target_="]),
        ("train -m hydra/sweeper=optuna seed=1,2", ["hydra/sweeper=optuna", "sweep=search"]),
        ("train -m hydra/launcher=joblib seed=1,2", ["hydra/launcher=joblib", "local"]),
        ("evaluate last", ["last", "Did you mean run=last?"]),
        ("export last format=onnx", ["last", "Did you mean run=last?"]),
        ("profile last", ["last", "Did you mean run=last?"]),
        ("train last", ["last", "Did you mean resume=last or fork=last?"]),
        ("train resume last", ["resume:", "Write resume=RUN, for example resume=last."]),
        ("train justaword", ["justaword", "Write key=value"]),
        ("train seed=[1", ["seed=[1", "Quote"]),
        ("train seed=${oc.env:NOT_SET_ANYWHERE}", ["seed:", "NOT_SET_ANYWHERE"]),
        ("train model.n_layers=${data.nope}", ["model.n_layers", "${data.nope}"]),
        ("train data.files=a.txt", ["data.files", "data=text"]),
        ("train data=text", ["data.files", "needs a value"]),
        ("train data=text data.files=absent.txt", ["data.files=", "no such file"]),
        ("train model._target_=os.system", ["model._target_=os.system", "not on the list"]),
        ("train trainer=5", ["trainer=5", "no such option", "default"]),
        ("train optimizer=true", ["optimizer=true", "no such option", "adamw, muon, sgd"]),
        ("train model.position=rotary", ["model.position=rotary", "a group of settings", "model/position=rotary"]),
        ("train model.attention=nope", ["model.attention=nope", "one of auto, flex, fused, reference"]),
        ("train seed=99999999999999999999999", ["seed=99999999999999999999999", "too large", "2^63"]),
        ("train model.init_std=-1", ["model.init_std=-1", "at least 0"]),
        ("train model.norm_eps=-1", ["model.norm_eps=-1", "at least 0 and below 1"]),
        ("train trainer.threads=100000", ["trainer.threads=100000", "cores", "auto"]),
        ("train optimizer=adamw optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "two numbers"]),
        ("train optimizer=adamw optimizer.betas=[0.9,1]", ["optimizer.betas=[0.9, 1]", "below 1"]),
        ("train data.tokenizer=bpe data.vocab_size=10", ["data.vocab_size=10", "at least 256"]),
        ("train model.d_model=100000000", ["model.d_model=100000000", "GiB", "this machine has"]),
        ("train model.n_layers=100000000", ["model.n_layers=100000000", "GiB"]),
        ("train data.tokenizer=bpe data.vocab_size=100000000", ["data.vocab_size=100000000", "GiB"]),
        ("train data.context_length=100000000", ["data.context_length=100000000", "GiB"]),
        ("train data.batch_size=1000000000", ["data.batch_size=1000000000", "GiB"]),
        ("train paths.data=/proc/x", ["paths.data=/proc/x", "cannot be written"]),
        ("train -m sweep=search optimizer.lr=tag(log,interval(0,1))", ["optimizer.lr=tag(log,interval(0,1))", "above 0"]),
        ("train -m sweep=search optimizer.lr=interval(1,0.5)", ["optimizer.lr=interval(1,0.5)", "empty"]),
        ("runs . --limit -3", ["--limit=-3", "at least 1"]),
        ("train model=null", ["a group cannot be null", "~model"]),
        ("train resume=last", ["resume=last", "holds no run yet"]),
        ("train resume=a fork=b", ["resume= and fork=", "Use one"]),
        ("train run=last", ["run=last", "resume="]),
        ("train --confg=x", ["--confg", "--help"]),
        ("train --config-dir absent", ["--config-dir=absent", "no such folder"]),
        ("train --config-name trian", ["--config-name=trian", "Did you mean train?"]),
        ("train --cfg job -m", ["exclude each other"]),
        ("train -m seed=1,2 model=nano,mikro", ["model=mikro", "Did you mean micro?"]),
        ("train -m sweep.fail_fast=true strategy=ddp trainer.num_nodes=1,2", ["trainer.num_nodes=2", "one by one"]),
        ("train -m sweep.fail_fast=true trainer.max_steps=5,0", ["trainer.max_steps=0"]),
        ("train strategy=fspd", ["strategy=fspd", "Did you mean fsdp?"]),
        (
            "train strategy=mesh strategy.shard=2 strategy.tensor=2 trainer.devices=8",
            ["strategy.shard=2", "× tensor 2 × pipeline 1 = 4, but there are 8 processes", "strategy.shard=4 or -1, or trainer.devices=4"],
        ),
        ("train strategy=tensor strategy.tensor=3", ["strategy.tensor=3", "model.n_heads=4", "Use strategy.tensor=1 or 2"]),
        ("train strategy=tensor model.n_kv_heads=1", ["strategy.tensor=2", "model.n_kv_heads=1"]),
        ("train strategy=tensor data.context_length=63", ["data.context_length=63", "strategy.tensor=2", "62 or 64"]),
        ("train strategy=pipeline trainer.devices=4", ["model.n_layers=3", "strategy.pipeline=4", "Use at least 4"]),
        (
            "train strategy=pipeline strategy.microbatches=3",
            ["strategy.microbatches=3", "data.batch_size=16", "Use auto, or 2, 4, 8 or 16"],
        ),
        ("train strategy=pipeline strategy.schedule=zbv", ["strategy.schedule=zbv", "V-shaped", "interleaved_zero_bubble"]),
        ("train strategy=ddp strategy.pipeline=2", ["strategy.pipeline=2", "silently gives wrong gradients", "strategy=fsdp_pipeline"]),
        ("train strategy=ddp strategy.microbatches=2", ["strategy.microbatches"]),
        ("train -m sweep.fail_fast=true strategy=single,ddp,tensor,pipeline,hsdp data.batch_size=6", ["data.batch_size=6", "4 and 8"]),
        ("train +model.n_heads=4", ["+model.n_heads", "Leave the + out"]),
        ("train ++model.foo=1", ["model.foo", "no such argument"]),
        ("train optimizer.lr=nan", ["optimizer.lr=nan", "not a finite number"]),
        ("train optimizer.weight_decay=-1", ["optimizer.weight_decay=-1", "negative"]),
        ("train model.d_model=-32", ["model.d_model=-32", "at least 1"]),
        ("train schedule.min_ratio=7", ["schedule.min_ratio=7", "0 to 1"]),
        ("train +stage.freeze=['blocs.*']", ["stage.freeze=blocs.*", "Names begin with embedding, position, blocks"]),
        ("train +stage.reinit=['blocks.[6-9].*']", ["stage.reinit=blocks.[6-9].*", "Use 0 to"]),
        ("train callbacks.spike.threshold=0.5", ["callbacks.spike.threshold=0.5", "5 is a cautious start"]),
        ("train callbacks.nonfinite.action=ignore", ["callbacks.nonfinite.action=ignore", "stop, skip"]),
        ("train callbacks.checkpoint.keep_last=0 callbacks.checkpoint.keep_best=2", ["callbacks.checkpoint.keep_best=2", "keep_last=0"]),
        ("train launch.requeue=maybe", ["launch.requeue=maybe", "true or false"]),
        ("train hydra.run.dir=/proc/no/where", ["hydra.run.dir=/proc/no/where", "cannot be made"]),
        ("train paths.runs=/proc/runs", ["paths.runs=/proc/runs", "no run folder can be made"]),
        ("evaluate", ["run:", "Add run="]),
        ("evaluate run=last split=train", ["split=train", "val, test"]),
        ("generate run=last tempreature=1", ["tempreature", "Did you mean temperature?"]),
        ("generate run=last top_p=1.5", ["top_p=1.5", "above 0 and at most 1"]),
    ],
)
def test_a_mistake_is_named_and_answered(line, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("meshformer.command.jobs._launch", launched)
    assert main(line.split(" ")) == 2
    printed = capsys.readouterr()
    (message,) = printed.err.strip().splitlines()
    assert message.startswith("error: ")
    assert [word for word in words if word not in message] == []
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == [], "something was written before the mistake was found"


def test_a_broken_yaml_file_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "broken.yaml").write_text("n_layers: 3\nn_heads: [1, 2\nd_model: 5\n")
    assert main(["train", "--config-dir", "mine", "model=broken"]) == 2
    message = capsys.readouterr().err
    assert "broken.yaml, line 3" in message and len(message.splitlines()) == 1


def test_a_misspelt_key_inside_a_yaml_file_is_refused(tmp_path, capsys):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "typo.yaml").write_text("defaults: [nano, _self_]\nn_layer: 3\n")
    (tmp_path / "mine" / "trainer").mkdir(parents=True)
    (tmp_path / "mine" / "trainer" / "typo.yaml").write_text("defaults: [default, _self_]\nmax_stepz: 3\n")
    assert main(["train", "--config-dir", "mine", "model=typo"]) == 2
    assert "model.n_layer: Transformer takes no such argument. Did you mean n_layers?" in capsys.readouterr().err
    assert main(["train", "--config-dir", "mine", "trainer=typo"]) == 2
    assert "trainer.max_stepz: there is no such setting. Did you mean max_steps?" in capsys.readouterr().err


def test_the_trace_is_shown_when_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(["train", "model=nanoo"]) == 2
    message = capsys.readouterr().err
    assert "Traceback" in message and "MissingConfigException" in message


def test_a_used_folder_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("meshformer.command.jobs._launch", launched)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert main(["train", "hydra.run.dir=used"]) == 2
    assert "already used" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["--help"], 0, "meshformer doctor"),
        (["train", "--help"], 0, "model/position"),
        (["train", "--cfg", "job"], 0, "n_layers: 3"),
        (["train", "strategy=tensor", "trainer.devices=2", "--dry-run"], 0, "tensor, 2 processes: tensor 2"),
        (["train", "trainer.max_stepz=3"], 2, "Did you mean trainer.max_steps?"),
        (["train", "model.n_heads=3"], 2, "does not divide"),
        (["train", "strategy=tensor", "strategy.tensor=3"], 2, "model.n_heads=4 does not divide by it"),
        (["train", "strategy=ddp", "strategy.pipeline=2"], 2, "strategy=fsdp_pipeline"),
    ],
)
def test_the_real_command_answers_without_torch(line, code, words, tmp_path):
    """A module path that refuses torch and lightning stands in for their absence: importing them would end in a trace and exit code 1."""
    (tmp_path / "refuse").mkdir()
    for name in ("torch", "lightning"):
        (tmp_path / "refuse" / f"{name}.py").write_text("raise RuntimeError('heavy import')")
    script = "import sys; from meshformer.cli import main; c = main(sys.argv[1:]); print('TORCH', 'torch' in sys.modules); sys.exit(c)"
    # Checks that come after the schema need the packages' sources: it reads signatures off them.
    first = [] if line[-1] in ("--dry-run", "model.n_heads=3", "strategy.tensor=3", "strategy.pipeline=2") else [str(tmp_path / "refuse")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*first, str(SRC)])}
    done = subprocess.run([sys.executable, "-c", script, *line], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    assert "TORCH False" in done.stdout and "Traceback" not in done.stderr


def test_the_module_can_be_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "meshformer.cli", "train", "model=nanoo"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert (done.returncode, done.stderr) == (2, "error: model=nanoo: there is no such option. Did you mean nano?\n")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "4", "RANK": "2"}, ["RANK and WORLD_SIZE", "4 processes", "unset RANK WORLD_SIZE"]),
        ({"WORLD_SIZE": "x", "RANK": "2"}, ["WORLD_SIZE=x", "unset WORLD_SIZE"]),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "many"}, ["SLURM_STEP_NUM_TASKS=many", "unset"]),
        ({"MESHFORMER_DATA": "/proc/x"}, ["paths.data=/proc/x", "MESHFORMER_DATA"]),
    ],
)
def test_what_stands_in_the_environment_is_named(environment, words, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in words), told


def test_a_number_from_the_environment_is_a_number(monkeypatch):
    monkeypatch.setenv("LR", "0.25")
    from meshformer.command.compose import compose

    config = compose(["optimizer.lr=${oc.env:LR}"])
    assert config["optimizer"]["lr"] == 0.25


def test_the_command_speaks_where_the_terminal_takes_ascii_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(SRC), "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for line in (["--help"], ["train", "--help"], ["train", "strategy=löss"], ["runs", "."]):
        command = [sys.executable, "-m", "meshformer.cli", *line]
        done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
        assert b"Traceback" not in done.stderr and b"UnicodeEncodeError" not in done.stderr, done.stderr
        assert done.returncode == (0 if "--help" in line else 2)


@pytest.mark.parametrize(("line", "words"), [
    ("train data.classes=[1,2]", ["data.classes=[1, 2]", """'data.classes=["1","2"]'"""]),
    ("train data=csv data.file=a.csv data.text_column=3", ["text_column=3: expected text", """text_column="3"'"""]),
])  # fmt: skip
def test_a_number_where_a_text_belongs_is_answered_by_how_to_write_it(line, words, capsys):
    assert main(line.split()) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told


def test_a_file_of_another_encoding_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "e.yaml").write_bytes(b"# @package _global_\nexperiment: caf\xe9\n")
    assert main(["train", "--config-dir", "mine", "experiment=e"]) == 2
    told = capsys.readouterr().err
    assert "e.yaml, line 2, is not UTF-8 (byte 0xe9)" in told and "iconv" in told and told.count("\n") == 1


def test_a_printed_command_runs_as_printed(tmp_path, capsys):
    (tmp_path / "a b,c").mkdir()
    (tmp_path / "a b,c" / "x").write_text("")
    assert main(["train", "hydra.run.dir='a b,c'"]) == 2
    typed = capsys.readouterr().err.partition("continue it with ")[2].strip().removesuffix(".")
    words = shlex.split(typed)
    assert len(words) == 1 and words[0].endswith("/a b,c"), typed
