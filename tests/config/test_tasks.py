"""Tasks that cannot learn from the data, with the model, or in the layout: refused before anything starts."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest
import yaml

from meshformer import tasks
from meshformer.command.compose import compose
from meshformer.config import ConfigError
from meshformer.config.paths import conf_dir
from meshformer.config.signature import attribute
from meshformer.tasks.check import HOME, _option, has_own_head, writes_text

CSV = ["data=csv", "data.file={file}", "data.label_column=mood"]


@pytest.mark.parametrize(
    ("overrides", "key", "told"),
    [
        (
            ["task=sequence_classification"],
            "task",
            "learns from single texts, and the data (Shakespeare) is running text. Use data=sentiment",
        ),
        (["task=image_classification", "model=vit_tiny", "data=sentiment", "model.image_size=8"], "task", "learns from images"),
        (["data=digits"], "task", "learns from running text or single texts, and the data (Digits) is images"),
        (["task=image_classification", "data=digits"], "model._target_", "Use model=vit_tiny"),
        (["task=image_classification", "data=digits", "model=vit_tiny", "model.image_size=28"], "model.image_size", "8 × 8 pixels"),
        (["task=sequence_classification", *CSV[:2]], "data.label_column", "say which column holds them"),
        (["task=sentence_embedding", *CSV], "data.pair_column", "learns from pairs"),
        (["task=sentence_embedding", "data=sentiment"], "task", "this data has none"),
        (["task=sentence_embedding", *CSV, "data.pair_column=other", "data.batch_size=24"], "task.group", "Use data.batch_size=32"),
        (["task=sequence_classification", "data=csv", "data.file=nowhere.csv", "data.label_column=a"], "data.file", "no such file"),
        (["task=sequence_classification", "data=sentiment", "strategy=context"], "strategy.context", "takes the mean over all of it"),
        (
            ["task=sequence_classification", "data=sentiment", "strategy=tensor", "strategy.loss_parallel=true"],
            "strategy.loss_parallel",
            "unsharded outputs",
        ),
        (["task=sequence_classification", "data=sentiment", "model.tie_embeddings=true"], "model.tie_embeddings", "head of their own"),
        (["task=sequence_classification", "data=sentiment", "data.packing=true"], "data.packing", "a result for each text"),
        ([*CSV[:2], "data.label_column=moood"], "data.label_column", "a.csv has no such column. Use one of its columns: text, mood, other"),
        (["data.packing=true"], "data.packing", "running text has no gaps"),
        (["task=masked_language_modelling", "model.causal=true"], "model.causal", "from both sides"),
        (["task=sentence_embedding", *CSV, "data.pair_column=other", "strategy=tensor"], "strategy.sequence_parallel", "cut along time"),
        (["model.outputs=3"], "model.tie_embeddings", "model.outputs"),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides, key, told, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,mood,other\nhi,good,ho\n")
    with pytest.raises(ConfigError) as caught:
        compose([override.format(file=file) for override in overrides])
    assert caught.value.key == key and told in str(caught.value), str(caught.value)


def test_every_task_that_is_judged_has_a_file_of_its_own():
    nodes = {file.stem: yaml.safe_load(file.read_text()) for file in (conf_dir() / "task").glob("*.yaml")}
    named = {node.get("task", node)["_target_"]: name for name, node in nodes.items()}
    judged = [f"{HOME}{name}" for name in dir(tasks) if attribute(f"{HOME}{name}", "learns_from")]
    assert named == {target: _option({"task": {"_target_": target}}) for target in judged}


def test_a_task_brings_the_model_that_suits_it_and_an_override_still_wins():
    model = compose(["task=sequence_classification", "data=sentiment"])["model"]
    assert (model["causal"], model["tie_embeddings"]) == (False, False)
    assert compose(["task=sequence_classification", "data=sentiment", "model.causal=true"])["model"]["causal"] is True


TASKS = """
from meshformer.tasks import LanguageModelling, SequenceClassification, Task

class Mine(SequenceClassification):
    pass

class Both(SequenceClassification):
    learns_from = ("texts", "images")

class Free(Task):
    def inputs(self, batch):
        return {"anything": batch["tokens"]}

class Otherwise(LanguageModelling):
    def inputs(self, batch):
        return {"extra": batch["tokens"]}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The overrides that choose a task of the user's."""
    (tmp_path / "own_task_for_test.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: [f"task._target_=own_task_for_test.{name}", "allow=[own_task_for_test]"]


def test_a_task_of_the_users_inherits_what_ours_says_of_itself_and_may_say_otherwise(own):
    refused = "task=own_task_for_test.Mine: learns from single texts, and the data (Shakespeare) is running text"
    with pytest.raises(ConfigError, match=re.escape(refused)):
        compose(own("Mine"))
    with pytest.raises(ConfigError, match=re.escape("task=own_task_for_test.Both takes the mean over all of it")):
        compose(["task=sequence_classification", *own("Both"), "data=sentiment", "strategy=context"])
    with pytest.raises(ConfigError, match="learns from single texts or images"):
        compose(own("Both"))
    assert has_own_head(compose(["task=sequence_classification", *own("Mine"), "data=sentiment"]))


def test_a_task_that_says_nothing_is_not_judged(own):
    free = compose(own("Free"))
    assert writes_text(free) and not has_own_head(free)
    assert compose([*own("Free"), "data=digits", "model=vit_tiny"])


def test_a_task_that_calls_the_model_in_its_own_way_is_not_held_to_ours(own):
    file = pathlib.Path(sys.path[0]) / "own_net_for_test.py"
    file.write_text("from torch import nn\n\nclass Net(nn.Module):\n    def forward(self, extra, more):\n        return extra\n")
    net = ["~model", "+model={_target_: own_net_for_test.Net}", "allow=[own_task_for_test,own_net_for_test]"]
    with pytest.raises(ConfigError, match="its forward takes extra, more"):
        compose(net)
    assert compose([*own("Otherwise")[:1], *net])
