"""Settings that are wrong together, and what `auto` stands for."""

from __future__ import annotations

import os
import sys

import pytest
import yaml

from meshformer.command.check import resolve
from meshformer.command.compose import settle
from meshformer.config import ConfigError, validate
from meshformer.config.resolve import ExternalLauncher, cores, external_launcher

RESOLVE = sys.modules["meshformer.config.resolve"]  # the package's name for it is the function
DDP = {"strategy": {"name": "ddp", "replicate": -1, "timeout": 60}}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"trainer.devices": 2}, "trainer.devices", "strategy=ddp"),
        ({"trainer.num_nodes": 2}, "trainer.num_nodes", "strategy=ddp"),
        ({"strategy.replicate": 2}, "strategy.replicate", "one copy"),
        ({"strategy": {"name": "ddp", "replicate": 3}, "trainer.devices": 2}, "strategy.replicate", "pipeline 1 = 3, but"),
        ({"strategy": {"name": "ddp", "replicate": 3}, "trainer.num_nodes": 2}, "strategy.replicate", "multiple of 2"),
        ({**DDP, "data.batch_size": 7}, "data.batch_size", "6 and 8"),
        ({**DDP, "data.batch_size": 1}, "data.batch_size", "does is 2"),
        ({"trainer.accumulate_grad_batches": 5}, "data.batch_size", "15 and 20"),
        ({"trainer.precision": "16-mixed"}, "trainer.precision", "bf16-mixed"),
        ({"trainer.accelerator": "gpu"}, "trainer.accelerator", "no NVIDIA GPU"),
        ({"trainer.max_steps": None}, None, "never end"),
        ({"schedule.warmup_steps": -1}, "schedule.warmup_steps", "negative"),
        ({"model.d_model": 130}, "model.d_model", "128 or 132"),
        ({"model.n_kv_heads": 3}, "model.n_kv_heads", "1, 2, 4"),
        ({"model.d_model": 12}, "model.n_heads", "even head size"),
        ({"model.n_heads": 0}, "model.n_heads", "at least 1"),
        ({"model.dropout": 1.0}, "model.dropout", "below 1"),
        ({"model.activation": "relu"}, "model.activation", "Did you mean relu2?"),
        ({"model.context_length": 64}, "model.context_length", "data.context_length=128"),
        ({"data.tokenizer": "bpe", "model.vocab_size": 100}, "model.vocab_size", "data.vocab_size=1024"),
        ({"optimizer.lr": 0.0}, "optimizer.lr", "above 0"),
        ({"stage.init_from": "last"}, "stage.init_from", "stage=finetune"),
        ({"stage": {"name": "finetune", "init_from": None}}, "stage.init_from", "RUN"),
        ({"stage": {"name": "finetune", "init_from": "nowhere"}}, "stage.init_from", "nowhere"),
        ({"run": "last"}, "run", "resume="),
        ({"model.causal": False}, "model.causal", "model.causal=true"),
    ],
)
def test_an_impossible_combination_is_refused(change, tmp_path, changes, key, words):
    with pytest.raises(ConfigError) as caught:
        settle(change({"paths.runs": str(tmp_path), **changes}))
    assert caught.value.key == key
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        DDP,
        {**DDP, "trainer.devices": 4},
        {"strategy": {"name": "ddp", "replicate": 4}, "trainer.num_nodes": 2},
        {"trainer.val_check_interval": 10**6},  # means: validate at the end only
        {"trainer.max_steps": None, "trainer.max_epochs": 1},
        {"model.context_length": 256},
        {"model.n_kv_heads": 2},
        {"data.vocab_size": 300},
        {"schedule.warmup_steps": 3000, "trainer.max_steps": 2},
    ],
)
def test_what_is_possible_passes(change, changes):
    settle(change(changes))


def test_more_devices_than_gpus_are_refused(change, monkeypatch):
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    settle(change({**DDP, "trainer.devices": 2}))
    with pytest.raises(ConfigError, match="at most 2"):
        settle(change({**DDP, "trainer.devices": 4}))


def test_a_torch_without_cuda_sees_no_gpu(change, monkeypatch):
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: False)
    assert resolved(change, {}, {"CUDA_VISIBLE_DEVICES": "0"})["trainer"]["accelerator"] == "cpu"


def test_another_model_class_keeps_its_own_rules(change):
    settle(change({"model": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 4}}))


def test_the_home_folder_is_written_out(change):
    config = settle(change({"paths.data": "~/a", "data.source.cache": "~/a"}))
    assert config["paths"]["data"] == config["data"]["source"]["cache"] == os.path.expanduser("~/a")


def test_an_empty_list_of_files_is_refused(change):
    with pytest.raises(ConfigError, match="names no file"):
        settle(change({"data.files": [], "data.source": {"_target_": "meshformer.data.TextFiles", "files": []}}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "absent.txt", "Did you mean b.txt?"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: folder / "empty.txt", "is empty"),
        (lambda folder: folder / "*.md", "no file has a name like that"),
    ],
)
def test_text_files_are_looked_at_before_training(change, tmp_path, make, words):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.txt").write_text("b")
    name = str(make(tmp_path)).replace("absent.txt", "bb.txt")
    with pytest.raises(ConfigError, match=r".*") as caught:
        settle(change({"data.files": name, "data.source": {"_target_": "meshformer.data.TextFiles", "files": name}}))
    assert caught.value.key == "data.files" and words in str(caught.value)


def test_file_patterns_and_relative_names_are_written_out(change, tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    data = settle(change({"data.files": "*.txt", "data.source": {"_target_": "meshformer.data.TextFiles", "files": "*.txt"}}))["data"]
    assert data["files"] == data["source"]["files"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def finetune_from(change, folder, recorded):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(change(recorded)))
    return change({"stage": {"name": "finetune", "init_from": str(folder), "lr_scale": 0.1}})


@pytest.mark.parametrize(
    ("recorded", "key"),
    [
        ({"model.d_model": 384}, "model.d_model"),
        ({"data.tokenizer": "bpe"}, "data.tokenizer"),
        ({"model.qk_norm": False}, "model.qk_norm"),
        ({"model.position._target_": "meshformer.model.position.Alibi"}, "model.position._target_"),
    ],
)
def test_finetuning_needs_the_model_and_tokenizer_it_starts_from(change, tmp_path, recorded, key):
    assert settle(finetune_from(change, tmp_path, {"model.dropout": 0.2, "model.vocab_size": 84}))["stage"]["init_from"] == str(tmp_path)
    with pytest.raises(ConfigError) as caught:
        settle(finetune_from(change, tmp_path, recorded), [f"{key}=typed"])
    assert caught.value.key == key


def test_finetuning_takes_what_the_command_does_not_name(change, tmp_path):
    recorded = {
        "model.d_model": 384,
        "data.tokenizer": "bpe",
        "model.position": {"_target_": "meshformer.model.position.Alibi", "_partial_": True},
    }
    config = settle(finetune_from(change, tmp_path, recorded), ["optimizer.lr=1e-3"])
    assert (config["model"]["d_model"], config["data"]["tokenizer"]) == (384, "bpe")
    assert config["model"]["position"]["_target_"].endswith("Alibi")


def test_only_a_run_can_be_finetuned(change, tmp_path):
    (tmp_path / "run.json").write_text("{}")  # found as a run, but without the configuration it ran on
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        settle(change({"stage": {"name": "finetune", "init_from": str(tmp_path)}}))


def test_a_resumed_run_does_not_need_what_it_was_finetuned_from(change):
    stage = {"name": "finetune", "init_from": "gone", "lr_scale": 0.1}
    assert settle(change({"stage": stage, "resume": "runs/x"}))["stage"]["init_from"] == "gone"


def resolved(change, changes, env=None):
    return resolve(validate(change(changes)), {"CUDA_VISIBLE_DEVICES": "", **(env or {})})


def test_auto_is_what_the_strategy_and_machine_ask_for(change):
    single, ddp = resolved(change, {}), resolved(change, DDP)
    assert (single["trainer"]["devices"], single["trainer"]["threads"]) == (1, cores())
    assert (ddp["trainer"]["devices"], ddp["strategy"]["replicate"], ddp["trainer"]["threads"]) == (2, 2, max(1, cores() // 2))
    assert resolved(change, {**DDP, "trainer.devices": 4})["strategy"]["replicate"] == 4
    assert resolved(change, {"strategy": {"name": "ddp", "replicate": 6}, "trainer.num_nodes": 2})["trainer"]["devices"] == 3
    assert single["trainer"]["accelerator"] == "cpu" and single["trainer"]["precision"] in ("32-true", "bf16-mixed")


def test_visible_gpus_are_used(change, monkeypatch):
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: True)
    config = resolved(change, {**DDP, "trainer.precision": "auto"}, {"CUDA_VISIBLE_DEVICES": "0,2,3"})
    assert (config["trainer"]["accelerator"], config["trainer"]["devices"], config["trainer"]["precision"]) == ("gpu", 3, "bf16-mixed")


def test_bfloat16_is_chosen_by_the_processor(change, monkeypatch):
    for able, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(RESOLVE, "cpu_multiplies_bf16", lambda able=able: able)
        assert resolved(change, {"trainer.precision": "auto"})["trainer"]["precision"] == expected


def test_processes_from_outside_are_counted(change):
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert external_launcher(torchrun) == ExternalLauncher(rank=3, world=4, local_world=2)
    assert external_launcher({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}) == ExternalLauncher(1, 8, 4)
    assert external_launcher({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None, "the shell of a batch script, before srun"
    trainer = resolved(change, DDP, torchrun)["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (2, 2)
    with pytest.raises(ConfigError, match="2 processes on this node"):
        resolved(change, {**DDP, "trainer.devices": 3}, torchrun)
