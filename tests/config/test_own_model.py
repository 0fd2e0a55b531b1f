"""A module of the user's whose arguments do not fit is told before a folder is made."""

import pytest

from meshformer.compose import compose
from meshformer.config.errors import ConfigError

SOURCE = """
from torch import nn

class Fits(nn.Module):
    def __init__(self, vocab_size, width=16):
        super().__init__()
        self.table, self.out = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
    def forward(self, tokens_BT, positions_BT=None):
        return self.out(self.table(tokens_BT))

class Inherits(Fits):
    pass

class Ids(Fits):
    def forward(self, ids):
        return self.out(self.table(ids))

class More(Fits):
    def forward(self, tokens_BT, positions_BT, extra):
        return self.out(self.table(tokens_BT))

class Any(Fits):
    def forward(self, *args, **kwargs):
        return self.out(self.table(kwargs["tokens_BT"]))
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "own_model_for_test.py").write_text(SOURCE)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    for name in ("Fits", "Inherits", "Ids", "More", "Any"):
        (tmp_path / "mine" / "model" / f"{name}.yaml").write_text(f"_target_: own_model_for_test.{name}\nvocab_size: null\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def composed(name):
    return compose([f"model={name}", "allow=[own_model_for_test]", "optimizer=adamw"], config_dir="mine")


@pytest.mark.parametrize("name", ["Fits", "Inherits", "Any"])
def test_a_forward_that_can_be_called_is_taken(name):
    assert composed(name)["model"]["_target_"].endswith(name)


@pytest.mark.parametrize(("name", "has"), [("Ids", "ids"), ("More", "tokens_BT, positions_BT, extra")])
def test_a_forward_that_cannot_be_called_is_refused(name, has):
    with pytest.raises(ConfigError, match=rf"model\._target_=own_model_for_test\.{name}: its forward takes {has}, .*def forward\(self, tokens_BT"):
        composed(name)


def test_a_module_without_a_seed_is_built():
    from meshformer.build import build_model

    config = composed("Fits")
    config["model"]["vocab_size"] = 7
    assert build_model(config).out.out_features == 7
