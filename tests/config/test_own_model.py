"""A module of the user's: what of it is read before a folder is made, and what is refused then."""

import pytest

from meshformer.command.compose import compose
from meshformer.config.arguments import places
from meshformer.config.errors import ConfigError
from meshformer.config.signature import attribute, declares

SOURCE = """
from torch import nn
from meshformer.model import Plan, Transformer, VisionTransformer

class Fits(nn.Module):
    def __init__(self, vocab_size, n_heads=2, n_layers=3, width=16):
        super().__init__()
        self.table, self.out = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
    def forward(self, tokens_BT, positions_BT=None):
        return self.out(self.table(tokens_BT))

class Inherits(Fits):
    pass

class Ids(Fits):
    def forward(self, ids):
        return self.out(self.table(ids))

class Usual(Fits):
    def forward(self, input_ids, position_ids=None, documents=None):
        return self.out(self.table(input_ids))

class More(Fits):
    def forward(self, tokens_BT, positions_BT, extra):
        return self.out(self.table(tokens_BT))

class Nothing(Fits):
    def forward(self):
        return self.out.weight

class Any(Fits):
    def forward(self, *args, **kwargs):
        return self.out(self.table(kwargs["tokens_BT"]))

class Planned(Fits):
    plan = Plan()

class FromBase(Planned):
    pass

class Without(Planned):
    plan = None

class Made(Fits):
    @property
    def plan(self):
        return Plan()

class Set(Fits):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.plan = Plan()

class Annotated(Fits):
    plan: Plan

class Ours(Transformer):
    pass

class Pictures(VisionTransformer):
    pass

def make(vocab_size):
    return Planned(vocab_size)
"""
NAMES = (
    "Fits", "Inherits", "Ids", "Usual", "More", "Nothing", "Any", "Planned", "FromBase", "Without", "Made", "Set", "Annotated", "Ours", "Pictures",
    "make",
)  # fmt: skip
TWO = {"tensor": "strategy=tensor", "context": "strategy=context", "pipeline": "strategy=pipeline"}


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "own_model_for_test.py").write_text(SOURCE)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "mine" / "model" / f"{name}.yaml").write_text(f"_target_: own_model_for_test.{name}\nvocab_size: null\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(tmp_path)


def composed(name, *overrides):
    return compose([f"model={name}", "allow=[own_model_for_test]", "optimizer=adamw", *overrides], config_dir="mine")


def refused(name, *overrides):
    with pytest.raises(ConfigError) as caught:
        composed(name, *overrides)
    return str(caught.value)


# --- what its forward takes


@pytest.mark.parametrize("name", ["Fits", "Inherits", "Ids", "Usual", "Any"])
def test_a_forward_that_can_be_called_is_taken(name):
    assert composed(name)["model"]["_target_"].endswith(name)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("More", [], "its forward takes tokens_BT, positions_BT, extra, and nothing of a batch goes to extra"),
        ("Nothing", [], "takes nothing by name, and the batches hold tokens, which would go to its first parameter"),
        ("Ids", ["data=sentiment"], "takes ids, and the batches hold documents, which would go to documents_BT or documents or"),
        ("Planned", ["data=sentiment", "data.packing=true"], "the batches hold documents"),
    ],
)
def test_a_forward_that_cannot_be_called_is_refused(name, overrides, words):
    told = refused(name, *overrides)
    assert told.startswith(f"model._target_=own_model_for_test.{name}: its forward takes ") and words in told, told


def test_a_slice_of_a_sequence_needs_a_forward_that_takes_positions():
    layout = ["strategy=context", "+model.plan={attention: a}"]
    assert "hold positions, which would go to positions_BT or positions or position_ids" in refused("Ids", *layout)
    assert composed("Usual", *layout)


def test_an_own_name_goes_before_a_usual_one_and_the_input_to_the_first_parameter():
    optional = {"ids": True, "pos": False, "positions_BT": False}
    assert places(optional, False, ["tokens_BT", "positions_BT"]) == {"tokens_BT": "ids", "positions_BT": "positions_BT"}
    assert places({"ids": True, "pos": False}, False, ["tokens_BT", "positions_BT"]) == {"tokens_BT": "ids", "positions_BT": "pos"}
    assert places({"cache": False, "tokens_BT": True}, False, ["tokens_BT"]) == {"tokens_BT": "tokens_BT"}
    assert places({"ids": True}, False, ["tokens_BT"], ["positions_BT", "documents_BT"]) == {"tokens_BT": "ids"}
    assert places({}, True, ["tokens_BT", "documents_BT"]) == {"tokens_BT": "tokens_BT", "documents_BT": "documents_BT"}


# --- whether it says how it may be cut


@pytest.mark.parametrize("axis", TWO)
@pytest.mark.parametrize("name", ["Fits", "Without", "Annotated"])
def test_a_class_without_a_plan_is_refused_where_a_layout_needs_one(name, axis):
    told = refused(name, TWO[axis])
    assert f"own_model_for_test.{name}: declares no plan (meshformer.model.Plan), which strategy.{axis}=2 needs" in told
    assert "strategy=fsdp or ddp" in told and composed(name, "strategy=fsdp")


@pytest.mark.parametrize("name", ["Planned", "FromBase", "Made", "Set", "make"])
def test_a_class_with_a_plan_of_its_own_or_of_its_base_is_taken(name):
    assert composed(name, TWO["tensor"])["strategy"]["tensor"] == 2


def test_a_plan_in_the_configuration_does_for_a_class_without():
    assert composed("Fits", TWO["tensor"], "+model.plan={blocks: h}")["model"]["plan"] == {"blocks": "h"}
    assert composed("Fits", TWO["tensor"], "+model.plan=own_model_for_test.PLAN")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("{bloks: h}", "model.plan.bloks: a plan has no such setting. Did you mean blocks?"),
        ("{tensor: 3}", "model.plan.tensor=3: expected a group of settings"),
        ("{embed: tok}", "model.plan.embed=tok: expected a list of text"),
        ("3", "model.plan=3: must be the settings of a plan, or the dotted name of one"),
        ("os.system", "model.plan=os.system: is not on the list of what a configuration may build"),
    ],
)
def test_a_plan_in_the_configuration_is_checked(plan, words):
    assert words in refused("Fits", f"+model.plan={plan}")


def test_a_plan_is_no_setting_of_another_part():
    assert "optimizer.plan" in refused("Fits", "+optimizer.plan={blocks: h}")


def test_the_cut_of_any_model_with_such_settings_is_checked():
    assert "model.n_heads=3 does not divide" in refused("Planned", TWO["tensor"], "+model.n_heads=3")
    assert "fewer layers than pipeline stages" in refused("Planned", TWO["pipeline"], "+model.n_layers=1")
    assert composed("Planned", TWO["pipeline"]) and composed("Planned", TWO["tensor"])
    assert "the sum" not in str(composed("Planned", TWO["pipeline"], "strategy.blocks_per_stage=[1,4]"))


# --- whether it is one of ours


def test_what_a_class_inherits_is_found_through_modules():
    target = "own_model_for_test."
    for name, reads in {"Ours": "tokens", "Pictures": "images", "Fits": None, "make": None}.items():
        assert attribute(target + name, "reads") == reads, name
    assert attribute("meshformer.model.transformer.Transformer", "reads") == "tokens" and attribute("nowhere.Net", "reads") is None
    assert attribute(target + "Ours", "plan", "no plain value") == "no plain value"
    assert declares(target + "Ours", "forward") and not declares(target + "Planned", "plans")


def test_a_subclass_of_ours_gets_the_checks_of_ours():
    sizes = ["+model.n_layers=2", "+model.n_heads=3", "+model.d_model=16", "+model.context_length=128"]
    assert "does not divide by model.n_heads=3" in refused("Ours", *sizes)
    assert "the task is about images" in refused("Ours", *sizes[:1], "+model.n_heads=2", *sizes[2:], "task=image_classification", "data=digits")
    assert "reads images" in refused("vit_tiny", "model._target_=own_model_for_test.Pictures", "model.image_size=8")
    assert "the model's weights" in refused("Ours", "+model.n_layers=2", "+model.n_heads=2", "+model.d_model=20000000", sizes[3])


def test_a_class_of_the_users_is_not_compiled_by_itself(monkeypatch):
    """Its blocks may be no one graph, which would be an error in the run."""
    monkeypatch.setattr("meshformer.parallel.compilation.lacking", lambda accelerator: None)
    long = ["trainer.max_steps=1000000000", "trainer.compile=auto"]
    assert compose(long)["trainer"]["compile"] is True
    sizes = ["+model.n_layers=2", "+model.n_heads=2", "+model.d_model=16", "+model.context_length=128"]
    assert composed("Ours", *sizes, *long)["trainer"]["compile"] is False
    assert compose([*long, "model._target_=meshformer.model.transformer.Transformer"])["trainer"]["compile"] is True


def test_which_blocks_an_optimizer_is_given_is_no_setting():
    assert "optimizer.blocks: comes from the model" in refused("Fits", "optimizer=muon", "+optimizer.blocks=h")


# --- building it


def test_a_module_without_a_seed_is_built():
    from meshformer.job.build import build_model

    config = composed("Fits")
    config["model"]["vocab_size"] = 7
    assert build_model(config).out.out_features == 7
