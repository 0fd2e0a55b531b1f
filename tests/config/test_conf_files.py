"""Every file under conf/ composes into a configuration that passes the schema and the checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from meshformer.command.compose import compose_config, make_hydra, plain, settle
from meshformer.config import Evaluate, Generate, validate
from meshformer.config.paths import conf_dir

CONF = conf_dir()
NEEDED = {
    **{f"model=llama3_{size}": ["model.n_layers=4", "model.d_model=512", "model.d_ff=64"] for size in ("8b", "70b", "405b")},
    "model=transformers": ["model.config={config}"],
    "data=text": ["data.files={text}"],
    "data=tfrecord": [f"data.files={Path(__file__).parents[1]}/data/tensorflow/plain.tfrecord", "data.text_feature=text"],
    "data=hub": ["data.source.path=somebody/texts"],
    "model=custom": ["model.n_layers=4", "model.n_heads=2", "model.d_model=8"],
    "stage=finetune": ["stage.init_from={run}"],
    "experiment=kjv_finetune": ["stage.init_from={run}"],
    "experiment=mlm_then_classify": ["stage.init_from={run}"],
    "experiment=mlm_pretrain_then_classify": ["stage.init_from={run}", "stage.pretrain=null"],
    "experiment=sentiment_minilm": ["stage.init_from={run}"],
    "logger=wandb": ["logger.wandb.offline=true"],
    "data=csv": ["data.file={text}"],
    "data=hub_texts": ["data.source.path=somebody/texts"],
    "data=audio_csv": ["data.file={text}"],
    "experiment=speech_from_whisper": ["stage.init_from={run}"],
    "task=token_classification": ["data.label_column=tags"],
    "task=sentence_embedding": ["data.pair_column=other"],
}


# A task learns from some data only, and images need a model of their own.
TASKS = [
    ["task=language_modelling", "data=shakespeare"],
    ["task=masked_language_modelling", "data=hub_texts"],
    ["task=sequence_classification", "data=sentiment"],
    ["task=token_classification", "data=csv"],
    ["task=sentence_embedding", "data=csv"],
    ["task=image_classification", "data=digits", "model=vit_tiny"],
    ["task=image_classification", "data=mnist_5k", "model=vit_tiny"],
    ["task=speech_recognition", "data=prompts", "model=speech_nano"],
    ["task=speech_recognition", "data=audio_csv", "model=speech_small"],
    ["model=transformers"],  # it has no attention or position of ours to choose
]


def options() -> dict[str, list[str]]:
    """group -> its options, by the files."""
    groups: dict[str, list[str]] = {}
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.parent.relative_to(CONF).as_posix()
        if group not in (".", "hydra", "sweep", "cluster"):  # clusters are of `meshformer plan`
            groups.setdefault(group, []).append(file.stem)
    return groups


def rounds() -> list[list[str]]:
    """Few compositions that choose every option once; experiments choose for themselves, so each is a round of its own."""
    groups = options()
    experiments = groups.pop("experiment")
    elsewhere = {choice for choices in TASKS for choice in choices}
    groups = {group: [name for name in names if f"{group}={name}" not in elsewhere] for group, names in groups.items() if group != "task"}
    longest = max(len(names) for names in groups.values())
    mixed = [[f"{group}={names[i % len(names)]}" for group, names in groups.items()] for i in range(longest)]
    return mixed + TASKS + [[f"experiment={name}"] for name in experiments]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough of a run folder to start finetuning from, for whatever model is chosen."""
    return tmp_path_factory.mktemp("run")


@pytest.mark.parametrize("choices", rounds(), ids=lambda choices: "+".join(c.partition("=")[2] for c in choices[-3:]))
def test_every_option_composes_and_passes_all_checks(choices: list[str], run: Path, tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("text,tags,other")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    extra = [item.format(text=text, run=run, config=tmp_path / "config.json") for choice in choices for item in NEEDED.get(choice, [])]
    config = plain(compose_config(make_hydra(), "train", [*choices, *extra]))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    settled = settle(config)
    assert isinstance(settled["trainer"]["devices"], int) and settled["trainer"]["precision"] != "auto"


def test_the_rounds_leave_no_file_out():
    chosen = {choice for choices in rounds() for choice in choices}
    assert chosen == {f"{group}={name}" for group, names in options().items() for name in names}
    assert len(chosen) > 35


@pytest.mark.parametrize("sweep", sorted(file.stem for file in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep_names_settings_that_exist(sweep: str):
    cfg = compose_config(make_hydra(), "train", [f"sweep={sweep}"], multirun=True)
    for key, values in cfg.hydra.sweeper.params.items():
        known = options().get(str(key))
        assert known is not None or OmegaConf.select(cfg, str(key)) is not None
        assert known is None or set(str(values).split(",")) <= set(known)


@pytest.mark.parametrize(("name", "schema"), [("evaluate", Evaluate), ("generate", Generate)])
def test_the_small_configurations_compose(name: str, schema: type):
    options = validate(plain(compose_config(make_hydra(), name, ["run=last"])), schema)
    assert options["run"] == "last"


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.relative_to(CONF).as_posix())
def test_every_file_says_on_top_when_to_pick_it(file: Path):
    first = next(line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package"))
    assert first.startswith("# ") and first.endswith(".")


def test_an_experiment_gives_way_to_a_model_on_the_command_line():
    config = plain(compose_config(make_hydra(), "train", ["experiment=shakespeare_bpe", "model=micro"]))
    assert (config["model"]["d_model"], config["data"]["tokenizer"]) == (384, "bpe")
    assert config["experiment"] == "shakespeare_bpe"


def test_a_users_folder_adds_options_and_comes_first(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [nano, _self_]\nd_model: 64\n")
    (tmp_path / "model" / "micro.yaml").write_text("defaults: [nano, _self_]\nd_model: 32\n")
    hydra = make_hydra(str(tmp_path))
    assert plain(compose_config(hydra, "train", ["model=mine"]))["model"]["d_model"] == 64
    assert plain(compose_config(hydra, "train", ["model=micro"]))["model"]["d_model"] == 32
