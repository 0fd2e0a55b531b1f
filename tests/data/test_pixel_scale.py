"""A run keeps the mean and the deviation of its training images, and whatever looks at images later uses them."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshformer.cli import main
from meshformer.config.paths import default_cache
from meshformer.data.images import Digits, ImageData, PixelScale
from meshformer.job.litert import _write_beside
from meshformer.model import VisionTransformer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixels") / "run"
    words = ["experiment=vit_digits", "trainer.max_steps=2", "model.n_layers=1", "trainer.limit_val_batches=2", "logger=csv"]
    words += ["trainer.progress=false", "trainer.threads=1"]
    assert main(["train", *words, f"hydra.run.dir={folder}"]) == 0
    return folder


def evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["evaluate", f"run={run}", f"paths.runs={run.parent}"]) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)


def test_other_images_are_normalised_as_those_of_the_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Digits(Path(default_cache()).expanduser())
    images, _, splits = whole.read()
    train = images[np.array(splits) == "train"]
    scale = PixelScale.read(run / "pixels.json")
    assert scale is not None and scale == pytest.approx((float(train.mean()), float(train.std())))

    given = evaluated(run, capsys)
    (run / "pixels.json").rename(run / "kept")
    own = evaluated(run, capsys)  # a run that is older than the file: its data tells
    assert given == own
    PixelScale(scale.mean + 2, scale.deviation).save(run / "pixels.json")
    assert evaluated(run, capsys) != given

    for damaged in ("{}", "[1, 2]", '{"mean": 0.3, "deviation": 0}', '{"mean": NaN, "deviation": 1}', '{"mean": "a", "deviation": 1}', "\x00"):
        (run / "pixels.json").write_text(damaged)
        assert main(["evaluate", f"run={run}", f"paths.runs={run.parent}"]) == 2
        assert "pixels.json does not hold the mean and the deviation of pixels" in capsys.readouterr().err, damaged
    (run / "kept").replace(run / "pixels.json")


def test_a_given_scale_is_kept() -> None:
    data = ImageData(Digits(Path(default_cache()).expanduser()), batch_size=4, seed=0)
    data.scale = PixelScale(0.0, 0.5)
    data.setup()
    images = next(iter(data.eval_batches("val", 4, 0, 1)))["images"]
    assert float(images.min()) == 0 and float(images.max()) == 2 and data.blank == 0


def test_the_exported_script_normalises(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With an interpreter that keeps what it is given."""
    _write_beside(VisionTransformer(8, 4, 1, 2, 16, classes=10), run, tmp_path, tokenizer=None)
    seen: list[Any] = []

    class Interpreter:
        def __init__(self, path: str) -> None: ...

        def get_input_details(self) -> list[dict[str, Any]]:
            return [{"shape": (1, 8, 8)}]

        def get_signature_runner(self, name: str) -> Any:
            return lambda images: {"logits": seen.append(images) or np.eye(10)[3:4]}

    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", types.SimpleNamespace(Interpreter=Interpreter))
    image = torch.rand(8, 8).numpy()
    np.save(tmp_path / "image.npy", image)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "image.npy")])
    runpy.run_path(str(tmp_path / "run.py"), run_name="__main__")
    scale = json.loads((run / "pixels.json").read_text())
    np.testing.assert_allclose(seen[0][0], (image - scale["mean"]) / scale["deviation"], rtol=1e-5)
    assert seen[0].dtype == np.float32 and capsys.readouterr().out == "3\n"
