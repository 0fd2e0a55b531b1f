"""What the data excludes is not proposed: cuts along time for images, recordings and pooled texts; compiled blocks where batches differ in length."""

from __future__ import annotations

import pytest

from meshformer.cli import main

POOLED = "experiment=mlm_pretrain task=sequence_classification data=sentiment"


@pytest.mark.parametrize("recipe", ["experiment=speech_prompts", "experiment=vit_digits", POOLED])
def test_no_layout_is_proposed_that_the_task_refuses(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *recipe.split(), "cluster=h100x8", "--quick"]) == 0
    told = capsys.readouterr().out
    assert "context" not in told and ("trainer.compile=true" in told) == ("vit" in recipe)


def test_running_text_is_still_cut_along_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "data.context_length=8192", "data.batch_size=2", "cluster=h100x8", "--quick"]) == 0
    assert "context" in capsys.readouterr().out
