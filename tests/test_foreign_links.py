"""A link in a stranger's run folder leads nowhere: no file outside of the folder is read, shown or written through it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import TINY, text_file
from meshformer.cli import main
from meshformer.command.sweep.record import Point, SweepRecord
from meshformer.config import ConfigError
from meshformer.config.foreign import refuse_links
from meshformer.runs import load_model, load_runs
from planted import Plants, Watch

LINKS = ["config.yaml", "overrides.txt", "run.json", "metrics.csv", "tokenizer.json", "samples", "samples/step-9.txt", "checkpoints", "CHECKPOINT"]
COMMANDS = {
    "resume": ["train", "resume={}", "trainer.max_steps=9"],
    "fork": ["train", "fork={}", "trainer.max_steps=9"],
    "finetune": ["train", "stage=finetune", "stage.init_from={}"],
    "evaluate": ["evaluate", "run={}"],
    "generate": ["generate", "run={}"],
    "export": ["export", "run={}", "format=safetensors", "output=exported.safetensors"],
    "convert": ["convert", "run={}", "to=safetensors", "output=converted.safetensors"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("links")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHFORMER_DATA", str(folder / "cache"))
        settings = [*TINY, f"data.files=[{text_file(folder)}]", "model.n_layers=1", "trainer.max_steps=2"]
        assert main(["train", *settings, f"hydra.run.dir={folder}/run"]) == 0
        yield folder / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(run, tmp_path / "copied"))


def lead_out(copied: Path, plants: Plants, name: str) -> Path:
    """The thing called `name` becomes a link to a file or folder outside."""
    checkpoint = next((copied / "checkpoints").iterdir()).name
    place = copied / name.replace("CHECKPOINT", f"checkpoints/{checkpoint}")
    place.parent.mkdir(exist_ok=True)
    folder = place.is_dir() or name == "samples"
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(plants.outside if folder else plants.outside / "secret.txt")
    return place


@pytest.mark.parametrize(("name", "command"), [*((name, "resume") for name in LINKS), *(("CHECKPOINT", command) for command in COMMANDS)])
def test_no_command_follows_a_link_out_of_a_run(
    name: str, command: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plants = Plants(tmp_path)
    link = lead_out(copied, plants, name)
    with Watch(plants.outside) as opened:
        assert main([word.format(copied) for word in COMMANDS[command]]) == 2
    plants.check()
    told = capsys.readouterr().err
    assert f"{link} is a link to {plants.outside}" in told and len(told.strip().splitlines()) == 1, told
    assert not opened


@pytest.mark.parametrize("name", LINKS)
def test_what_is_shown_of_runs_follows_no_link_out_of_them(name: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plants = Plants(tmp_path)
    (copied / "samples").mkdir(exist_ok=True)
    lead_out(copied, plants, name)
    with Watch(plants.outside) as opened:
        main(["runs", str(copied)])
        main(["runs", "show", str(copied)])
        main(["report", str(copied), "--output", "page.html"])
    plants.check()
    assert not opened
    out, err = capsys.readouterr()
    page = Path("page.html").read_text() if Path("page.html").exists() else ""
    assert "a secret" not in out + err + page
    if name in ("config.yaml", "overrides.txt", "run.json", "metrics.csv"):
        assert f"{copied / name}: a link out of the run's folder; the run is left out" in err


def test_notebooks_follow_no_link_out_of_a_run(copied: Path, tmp_path: Path) -> None:
    lead_out(copied, Plants(tmp_path), "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is a link"):
        load_model(copied)
    assert len(load_runs(copied)) == 1  # what it reads of the run is no link


def test_a_sweep_is_not_resumed_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plants = tmp_path / "sweep", Plants(tmp_path)
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "checkpoints").symlink_to(plants.outside)
    SweepRecord(folder, ["seed=1,2"], {"config_dir": None, "config_name": None}, [Point(0, ["seed=1"], "interrupted", "0")]).write("interrupted")
    assert main(["train", "-m", f"sweep.resume={folder}"]) == 2
    assert "checkpoints is a link" in capsys.readouterr().err


def test_links_that_stay_inside_and_folders_reached_by_a_link_are_fine(copied: Path, tmp_path: Path) -> None:
    (copied / "newest").symlink_to(next((copied / "checkpoints").iterdir()))
    (tmp_path / "elsewhere").symlink_to(copied)
    refuse_links(tmp_path / "elsewhere", "resume", "elsewhere")
    assert main(["train", f"resume={tmp_path / 'elsewhere'}", "trainer.max_steps=3"]) == 0
