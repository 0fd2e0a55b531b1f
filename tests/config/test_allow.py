"""What a configuration may build."""

from __future__ import annotations

import subprocess

import pytest

from meshformer.config import ConfigError, check_object, check_target, validate


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.AdamW", "torch.nn.GELU", "torch.optim.lr_scheduler.LambdaLR", "lightning.pytorch.loggers.CSVLogger", "torchmetrics.MeanMetric",
        "lightning.pytorch.callbacks.EarlyStopping", "meshformer.optim.adamw", "meshformer.model.attention.attend_auto", "meshformer.data.TextFiles",
    ],
)  # fmt: skip
def test_components_are_allowed(target):
    check_target(target)


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "builtins.eval", "torch.hub.load", "torch.hub._import_module", "torch.load", "torch.nn.modules.module._forward_unimplemented",
        "meshformer.record.run_folder.atomic_write_text", "meshformer.data.pinned_package.fetch", "lightning.pytorch.Trainer", "subprocess.Popen",
        "torch.optimx.AdamW", "torch.nn.functional.gelu", "not a name", "", None, "torch.optim.",
    ],
)  # fmt: skip
def test_anything_else_is_refused(target):
    with pytest.raises(ConfigError):
        check_target(target)


def test_names_the_user_added_are_allowed():
    check_target("my.module.Thing", allow=["my.module"])
    with pytest.raises(ConfigError, match=r"allow=\[my.modulex\]"):
        check_target("my.modulex.Thing", allow=["my.module"])


def test_an_object_that_only_passes_through_an_allowed_module_is_refused():
    import torch

    check_object(torch.optim.AdamW, "torch.optim.AdamW")
    with pytest.raises(ConfigError, match="subprocess"):
        check_object(subprocess.Popen, "torch.nn.modules.module.Popen")


def test_a_reexport_of_something_foreign_is_refused_before_import(change, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from subprocess import Popen\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "mine.Popen"}
    with pytest.raises(ConfigError, match="subprocess"):
        validate(change({"callbacks.x": node, "allow": ["mine"]}))


def test_a_nested_target_is_checked_too(change):
    with pytest.raises(ConfigError) as caught:
        validate(change({"model.attention._target_": "os.system"}))
    assert caught.value.key == "model.attention._target_"
