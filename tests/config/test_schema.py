"""The schema: keys and types of the fixed part, and of parts whose class says what it takes."""

from __future__ import annotations

import ast

import pytest

from meshformer.config import ConfigError, types, validate
from meshformer.config.signature import TargetNotFound, signature


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [1, -1], [1.5, True, "1", None]),
        ("float", [1, 0.5], [True, "x", None]),
        ("bool", [True], [1, "true"]),
        ("str", ["a"], [1, None]),
        ("PositiveInt | None", [1, None], [0, -1, 2.0, "auto"]),
        ("Literal['auto'] | PositiveInt", ["auto", 3], ["outo", 0, None]),
        ("Literal[-1] | PositiveInt", [-1, 2], [0, -2]),
        ("Literal[1, 'a']", [1, "a"], [True, "1"]),
        ("Optional[float]", [None, 0.1], ["x"]),
        ("typing.Union[int, str]", [1, "a"], [1.5]),
        ("'int | None'", [1, None], ["a"]),
        ("list[int]", [[], [1]], [["a"], 1, {}]),
        ("tuple[float, float]", [[0.9, 0.95]], [[0.9], [0.9, "x"], 0.9]),
        ("tuple[int, ...]", [[1, 2, 3]], [["x"]]),
        ("dict[str, int]", [{"a": 1}], [{"a": "b"}, []]),
        ("Path", ["a"], [1]),
        ("Share", [0.5, 1.0], [0, 1.1]),
        ("NamedParameters", [1, "anything", None], []),
    ],
)
def test_values_fit_their_annotation(annotation, good, bad):
    parsed = types.parse(annotation)
    assert [value for value in good if not types.fits(value, parsed)] == []
    assert [value for value in bad if types.fits(value, parsed)] == []


def test_types_are_described_in_words():
    assert types.describe(types.parse("PositiveInt | None")) == "a whole number of at least 1 or null"
    assert types.describe(types.parse("Literal['a', 'b']")) == "one of a, b"
    assert types.describe(types.parse("list[str]")) == "a list of text"


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"trainer.max_stepz": 5}, "trainer.max_stepz", "Did you mean max_steps?"),
        ({"optimiser": {}}, "optimiser", "Did you mean optimizer?"),
        ({"trainer.devices": 0}, "trainer.devices", "at least 1"),
        ({"trainer.progress": "yes"}, "trainer.progress", "true or false"),
        ({"data.tokenizer": "bpee"}, "data.tokenizer", "Did you mean bpe?"),
        ({"seed": None}, "seed", "null is not allowed"),
        ({"callbacks": "all"}, "callbacks", "named parts"),
        (
            {"callbacks.x": {"_target_": "torch.nn.Linear", "in_features": [{"_target_": "os.system"}]}},
            "callbacks.x.in_features",
            "a whole number",
        ),
        ({"callbacks.x": {"_target_": "torch.nn.Sequential", "args": [{"_target_": "os.system"}]}}, "callbacks.x.args", "no such argument"),
        ({"trainer": 3}, "trainer", "group of settings"),
        ({"model.n_layers": "six"}, "model.n_layers", "a whole number"),
        ({"model.n_layerz": 6}, "model.n_layerz", "Did you mean n_layers?"),
        ({"model.n_layers": "???"}, "model.n_layers", "needs a value"),
        ({"model.position.bass": 1.0}, "model.position.bass", "Rotary takes no such argument. Did you mean base?"),
        ({"model.position.base": "big"}, "model.position.base", "a number"),
        ({"optimizer.momentumm": 0.9}, "optimizer.momentumm", "muon takes no such argument. Did you mean momentum?"),
        ({"optimizer.scale": "originel"}, "optimizer.scale", "Did you mean original?"),
        ({"callbacks.checkpoint.every_n_stepz": 1}, "callbacks.checkpoint.every_n_stepz", "Did you mean every_n_steps?"),
        ({"callbacks.checkpoint": "often"}, "callbacks.checkpoint", "needs a _target_"),
        ({"data.source": {"_target_": "meshformer.data.Shakespeare"}}, "data.source.cache", "Shakespeare needs it"),
        ({"model._target_": "meshformer.model.Transfomer"}, "model._target_", "Did you mean Transformer?"),
        ({"model._target_": "meshformer.modell.Transformer"}, "model._target_", "not on the list"),
        ({"model._target_": "meshformer.model.modell.Transformer"}, "model._target_", "no module"),
    ],
)
def test_a_mistake_in_a_configuration_is_named(change, changes, key, words):
    with pytest.raises(ConfigError) as caught:
        validate(change(changes))
    assert caught.value.key == key
    assert words in str(caught.value)


def test_a_missing_key_is_named(change):
    config = change({})
    del config["data"]["batch_size"]
    with pytest.raises(ConfigError, match=r"data\.batch_size: is missing"):
        validate(config)


def test_targets_inside_lists_are_checked(change):
    node = {"_target_": "torch.nn.ModuleList", "modules": [{"_target_": "os.system"}]}
    with pytest.raises(ConfigError) as caught:
        validate(change({"callbacks.x": node}))
    assert caught.value.key == "callbacks.x.modules[0]._target_"


def test_good_configurations_pass_and_defaults_are_filled_in(change):
    assert validate(change({"callbacks.samples": None}))["stage"]["lr_scale"] == 1.0
    validate(change({"model.vocab_size": 84, "optimizer.dtype": "float32", "trainer.max_steps": None}))


def test_signatures_are_read_through_packages_bases_and_star_imports():
    assert {"d_model", "n_heads", "head_dim", "context_length"} == set(signature("meshformer.model.position.Alibi").parameters)
    assert signature("meshformer.data.Shakespeare").module == "meshformer.data.corpus"
    assert signature("torch.optim.AdamW").parameters["weight_decay"].required is False
    assert signature("torch.optim.Muon").module == "torch.optim._muon"
    assert {"in_features", "out_features"} <= set(signature("torch.nn.Linear").parameters)
    logger = signature("lightning.pytorch.loggers.TensorBoardLogger")
    assert logger.open_ended and logger.parameters["save_dir"].required
    with pytest.raises(TargetNotFound):
        signature("torch.optim.AdamWW")


def test_signatures_of_a_users_module(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(
        'raise RuntimeError("imported")\n_WHERE = {"Late": "parts"}\nfrom .parts import Early as Soon\n'
    )
    (tmp_path / "mine" / "parts.py").write_text(
        "import torch.nn as nn\nfrom dataclasses import dataclass\n"
        "class Early(nn.Linear):\n    pass\n"
        "@dataclass\nclass Late:\n    a: int\n    b: str = 'x'\n"
        "class Both(Late):\n    def __init__(self, c: float, **kwargs): ...\n"
        "def made(x, *, y: int = 1): ...\nOther = made\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "in_features" in signature("mine.Soon").parameters
    late = signature("mine.Late").parameters
    assert ast.unparse(late["a"].annotation) == "int" and late["a"].required and not late["b"].required
    both = signature("mine.parts.Both")
    assert set(both.parameters) == {"a", "b", "c"} and both.open_ended
    assert set(signature("mine.parts.Other").parameters) == {"x", "y"}
