"""A rank makes its part of the model in little more memory than the part has, though single parameters are larger than that."""

import pytest

from meshformer.bench.drawing import measure

WIDE = {
    "vocab_size": 131_072,
    "n_layers": 2,
    "n_heads": 8,
    "d_model": 1024,
    "zero_init": False,
}  # the embedding alone is 6.7 times a rank's part


@pytest.mark.parametrize("layout", ["fsdp", pytest.param("tensor", marks=pytest.mark.slow)])
def test_a_rank_draws_in_little_more_than_its_part(layout: str) -> None:
    found = measure(layout, WIDE)
    assert found["own"] == pytest.approx(4 * found["parameters"] / 8, rel=0.01)
    assert found["peak"] - found["before"] < 1.3 * found["own"]
