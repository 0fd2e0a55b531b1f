"""What `bench pipeline` compares a measured pipeline with: 1F1B's idle share, computed from the times of the stages."""

import pytest

from meshformer.bench.layouts import idle_share


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 8, 16])
def test_equal_stages_idle_as_the_paper_says(stages: int, microbatches: int):
    found = idle_share([1.0] * stages, [2.0] * stages, microbatches)
    assert found == pytest.approx((stages - 1) / (microbatches + stages - 1))


def test_the_slower_stage_keeps_the_other_waiting():
    # The second stage starts after 1, works 4 · (3 + 6), and the first ends with its last backward pass, of 2: 39 in all, of which both work 48.
    assert idle_share([1.0, 3.0], [2.0, 6.0], 4) == pytest.approx(1 - 48 / (2 * 39))
