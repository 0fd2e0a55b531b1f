"""Random valid configurations compose; random damage to one is one sentence and exit code 2, or does no harm, and never a stack trace.

`MESHFORMER_EXAMPLES=1000 pytest tests/config/test_properties.py` looks further than the suite has time for.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layouts import degrees
from meshformer.cli import main
from meshformer.command import jobs
from meshformer.command.compose import compose

EXAMPLES = int(os.environ.get("MESHFORMER_EXAMPLES", "15"))
CHOICES = {
    "model/attention": ["auto", "reference", "fused"],
    "optimizer": ["adamw", "sgd", "muon"],
    "schedule": ["cosine", "wsd", "linear", "constant"],
    "logger": ["csv", "tensorboard"],
    "model.norm": ["rms", "layer"],
    "model.activation": ["gelu", "relu2", "swiglu"],
    "model.bias": ["true", "false"],
    "model.tie_embeddings": ["true", "false"],
    "trainer.gradient_clip_val": ["null", "1", "0.5"],
    "trainer.max_steps": ["1", "100", "1_000"],
    "seed": ["0", "7"],
    "callbacks.checkpoint.keep_last": ["0", "1", "3"],
    "callbacks.nonfinite.action": ["stop", "skip"],
    "stage": ["pretrain"],
}
LAYOUTS = {name: cut for name, cut in degrees().items() if name != "mesh"}
ODD = [
    "many", "-1", "0", "1.5", "null", "[1", "{a:1}", "'", "${x}", "${seed", "", "true", "1e999", "nan", "../x", "a,b", "[]", "{}", "é", "\t", "=",
    "a=b", "9" * 30, "choice(1,2)", "range(3)", "~", "@x", "None",
]  # fmt: skip


@st.composite
def valid(draw: st.DrawFn) -> list[str]:
    """Overrides that belong together: heads that divide, a batch that divides, a layout's degrees."""
    kv_heads, queries, head_dim = draw(st.sampled_from([2, 4])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([8, 16]))
    heads = kv_heads * queries
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    chosen = {key: draw(st.sampled_from(options)) for key, options in CHOICES.items() if draw(st.booleans())}
    accumulation = draw(st.sampled_from([1, 2]))
    return [
        *(f"{key}={value}" for key, value in chosen.items()),
        f"model.n_heads={heads}", f"model.n_kv_heads={kv_heads}", f"model.d_model={heads * head_dim}", f"model.n_layers={draw(st.integers(2, 6))}",
        f"data.context_length={draw(st.sampled_from([16, 64, 256]))}", f"data.batch_size={8 * draw(st.integers(1, 4))}",
        f"trainer.accumulate_grad_batches={accumulation}", f"strategy={layout}", "trainer.precision=32-true",
    ]  # fmt: skip


def damaged(overrides: list[str], draw: random.Random) -> list[str]:
    """One thing about the command line is wrong, or at least odd."""
    overrides = list(overrides)
    at = draw.randrange(len(overrides))
    key, _, value = overrides[at].partition("=")
    place = draw.randrange(len(key))
    overrides[at] = draw.choice(
        [
            f"{key}={draw.choice(ODD)}",
            f"{key[:place]}{key[place + 1 :]}={value}",
            f"{key[:place]}{draw.choice('abz._/-@: ')}{key[place:]}={value}",
            f"{draw.choice(['+', '++', '~'])}{overrides[at]}",
            f"~{key}",
            key,
            f"{key}.more={value}",
            f"{value}={key}",
            f"{key}={value}{draw.choice('abz._/-@: ,[')}",
            f"{draw.choice(['trainer', 'strategy', 'data', 'callbacks', 'launch', 'paths', 'stage', 'hydra', 'model'])}={draw.choice(ODD)}",
        ]
    )
    return overrides


@pytest.fixture
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(jobs, "_launch", lambda *arguments, **options: {})
    return tmp_path


COMMON = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@COMMON
@given(overrides=valid())
def test_valid_settings_compose(nothing_starts: Path, overrides: list[str]) -> None:
    config = compose(overrides)
    assert config["trainer"]["devices"] == 2 ** sum(degree == 2 for degree in LAYOUTS[overrides[-2].partition("=")[2]].values())


@COMMON
@given(overrides=valid(), seed=st.integers(0, 2**32))
def test_damage_is_one_sentence(nothing_starts: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], seed: int) -> None:
    line = damaged(overrides, random.Random(seed))
    capsys.readouterr()
    code = main(["train", *line])
    out, err = capsys.readouterr()
    assert code in (0, 2), (line, err)
    assert "Traceback" not in err + out, (line, err)
    if code == 2:
        assert err.startswith("error: ") and len(err.strip().splitlines()) <= 4, (line, err)
