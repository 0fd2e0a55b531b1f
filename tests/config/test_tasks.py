"""Tasks that cannot learn from the data, with the model, or in the layout: refused before anything starts."""

from __future__ import annotations

import pytest

from meshformer.compose import compose
from meshformer.config import ConfigError
from meshformer.config.paths import conf_dir
from meshformer.config.tasks import HOME, LEARNS_FROM, _option

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
            "whole",
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
    named = {file.stem: file.read_text() for file in (conf_dir() / "task").glob("*.yaml")}
    assert set(named) == {_option(task) for task in LEARNS_FROM}
    assert all(f"_target_: {HOME}{task}" in named[_option(task)] for task in LEARNS_FROM)


def test_a_task_brings_the_model_that_suits_it_and_an_override_still_wins():
    model = compose(["task=sequence_classification", "data=sentiment"])["model"]
    assert (model["causal"], model["tie_embeddings"]) == (False, False)
    assert compose(["task=sequence_classification", "data=sentiment", "model.causal=true"])["model"]["causal"] is True
