"""A resumed run is the run that was never stopped: bit for bit, in the middle of an epoch too, with dropout on."""

from __future__ import annotations

import pytest

from jobs import run_tiny, text_file

FULL = ["schedule=constant", "model.dropout=0.1", "trainer.val_check_interval=4", "callbacks.checkpoint.every_n_steps=3"]
STEPS = 30


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("full")
    text_file(folder, words=400)  # 12 steps an epoch
    return folder, run_tiny(folder, "full", *FULL, f"trainer.max_steps={STEPS}")


@pytest.mark.parametrize("stop", [7, 8, 12, 26], ids=["mid-epoch", "after a validation", "epoch end", "third epoch"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(uninterrupted, stop: int) -> None:
    folder, expected = uninterrupted
    name = f"stopped-{stop}"
    run_tiny(folder, name, *FULL, f"trainer.max_steps={stop}")
    resumed = run_tiny(folder, name, *FULL, f"trainer.max_steps={STEPS}", resume=True)
    own_end = {"val/loss", "val/perplexity", "val/bits_per_byte"}  # a run also validates at its end
    for ours, theirs in zip(resumed, expected, strict=True):
        ignored = own_end if ours["step"] == stop and stop % 4 else set()
        assert {k: v for k, v in ours.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}
    assert expected[-1]["epoch"] == 2, "the test needs more than one epoch"


def test_a_row_of_several_steps_is_the_same_when_the_run_stopped_inside_it(uninterrupted) -> None:
    folder, _ = uninterrupted
    settings = [*FULL, "trainer.log_every_n_steps=5"]
    expected = run_tiny(folder, "rows", *settings, "trainer.max_steps=15")
    run_tiny(folder, "rows-stopped", *settings, "trainer.max_steps=8")
    resumed = run_tiny(folder, "rows-stopped", *settings, "trainer.max_steps=15", resume=True)
    losses = {r["step"]: r["train/loss"] for r in resumed if "train/loss" in r}
    assert {step: losses[step] for step in (5, 10, 15)} == {r["step"]: r["train/loss"] for r in expected if "train/loss" in r}


def test_rows_after_the_checkpoint_are_cut_and_written_again(uninterrupted) -> None:
    """A killed run has rows beyond its last checkpoint."""
    folder, expected = uninterrupted
    run_tiny(folder, "killed", *FULL, "trainer.max_steps=7")
    metrics = folder / "killed" / "metrics.csv"
    width = metrics.read_text().splitlines()[0].count(",")
    with open(metrics, "a") as file:
        for step in (8, 9):
            file.write(f"{step},0,{8 * step},9.9" + "," * (width - 3) + "\n")  # rows too many
        file.write("10,0,8")  # and a torn one
    resumed = run_tiny(folder, "killed", *FULL, "trainer.max_steps=10", resume=True)
    assert [r["step"] for r in resumed] == list(range(1, 11))
    assert [r["train/loss"] for r in resumed] == [r["train/loss"] for r in expected[:10]]
