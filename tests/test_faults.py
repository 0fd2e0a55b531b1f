"""The short form of `make faults`: one fault of every kind, and a campaign that would notice if damaged checkpoints were loaded."""

from __future__ import annotations

import pytest

from meshformer.bench import faults
from meshformer.checkpoint import find

KINDS = list(faults.FAULTS)
# tests/test_launch.py, test_preemption.py, test_nonfinite.py and test_unfinished.py do the same; a full disk is one fault of two here.
ELSEWHERE = ("hang", "kill -9 of a rank", "SIGTERM", "nan", "stop with loaders", "full disk, go on")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> faults.Campaign:
    return faults.Campaign(tmp_path_factory.mktemp("faults"), seed=1)


@pytest.mark.parametrize("number", [pytest.param(n, id=k, marks=[pytest.mark.slow] * (k in ELSEWHERE)) for n, k in enumerate(KINDS)])
def test_nothing_is_lost(campaign: faults.Campaign, number: int) -> None:
    outcome = campaign.fault(number)
    expected = faults.OLDER if KINDS[number] in faults.DAMAGE else faults.EXACT
    assert outcome["outcome"] == expected, outcome


def test_a_damaged_checkpoint_that_is_not_noticed_would_show(campaign: faults.Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "_verify", lambda checkpoint: (None, True))
    assert campaign.fault(KINDS.index("truncated file"))["outcome"] == faults.LOST
