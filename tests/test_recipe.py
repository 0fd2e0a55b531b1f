"""Two runs from one command: `stage.pretrain` trains the first, or finds it, and fine-tuning starts from its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from jobs import TINY, labelled_file
from meshformer.checkpoint.read import read_tensors
from meshformer.cli import main

SHORT = [o for o in TINY if not o.startswith("data")] + ["data.batch_size=8"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    data = ["data=csv", f"data.file={labelled_file(tmp_path)}", "data.context_length=16"]
    first = ["experiment=first", "task=masked_language_modelling", *data, "data.batch_size=8", "trainer.max_steps=2", "trainer.threads=1"]
    first += ["logger=csv", "trainer.log_every_n_steps=1", "trainer.precision=32-true"]
    conf = tmp_path / "conf" / "experiment"
    conf.mkdir(parents=True)
    second = ["task=sequence_classification", "stage=finetune", *data, "data.label_column=label", "trainer.max_steps=2", *SHORT]
    second = [o for o in second if not o.startswith("model")] + ["model=nano", "model.n_layers=2", "model.d_model=32"]
    first = [o for o in first if not o.startswith("experiment")]
    return ["train", *second, f"stage.pretrain={json.dumps(first)}", f"paths.data={tmp_path}/cache", f"paths.runs={tmp_path}/runs"]


def test_both_are_trained_and_the_first_only_once(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*command, "stage.lr_scale=1e-7"]
    assert main(command) == 0
    first, second = sorted(tmp_path.glob("runs/*/*/"), key=lambda run: run.stat().st_mtime)
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["stage"]["init_from"] == str(first) and config["model"]["n_layers"] == 2
    start = read_tensors(first / "checkpoints" / "step-00000002", "model.blocks.")
    end = read_tensors(second / "checkpoints" / "step-00000002", "model.blocks.")
    assert all((end[name] - x).abs().max() < 1e-6 for name, x in start.items())
    assert main([*command, "optimizer.lr=0.01"]) == 0
    assert f"pretrained already: {first}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("runs/*/*/"))) == 3


def test_a_first_run_that_was_stopped_goes_on(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    first, _ = sorted(tmp_path.glob("runs/*/*/"), key=lambda run: run.stat().st_mtime)
    record = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps({**record, "state": "preempted"}))
    continued = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshformer.command.jobs._train_from", lambda args, run_of, rest: continued.append(run_of) or 1)
        assert main(command) == 1  # the second is not started where the first fails
    assert continued == [{"resume": str(first)}] and len(list(tmp_path.glob("runs/*/*/run.json"))) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["stage.init_from=last"], "stage.pretrain=.* so does stage.init_from"),
        (["optimizer.lr=-1"], "optimizer.lr=-1"),  # the second run's mistake, before the first is trained
        (["model.n_heads=5"], "model.d_model=32"),
        (["-m", "seed=1,2", "stage.init_from=null"], "stage.pretrain=.* a sweep or a fork does not"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    code = main([*command, *extra])
    told = capsys.readouterr()
    assert code != 0 and re.search(message, told.err + told.out), told
    assert not list(tmp_path.glob("runs/**/checkpoints"))
