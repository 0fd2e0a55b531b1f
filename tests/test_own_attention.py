"""A model of the user's whose attention has weights of its own: nothing of it is lost in an export, and it can be fine-tuned from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs import TINY, run_tiny
from meshformer.checkpoint.find import latest_checkpoint
from meshformer.checkpoint.read import read_tensors
from meshformer.checkpoint.weights import load_weights
from meshformer.checkpoint.write import write_folder
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config.errors import ConfigError
from meshformer.job.train import train

MODULE = "gated_model_for_test"
SOURCE = """
import torch
from torch import nn
from meshformer.model import Attention, Transformer, attend_reference

class GatedAttention(Attention):
    def __init__(self, d_model, *args, **options):
        super().__init__(d_model, *args, **options)
        self.gate = nn.Linear(d_model, self.o.in_features, bias=False)

    def forward(self, x_BTC, mask, position, tables, bias, cache=None):
        B, T, _ = x_BTC.shape
        q, k, v = (project(x_BTC).view(B, T, -1, self.head_dim).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = position.encode(q, k, v, tables)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        heads = self.attend(q, k, v, mask, bias, 0.0).transpose(1, 2).reshape(B, T, -1)
        return self.o(torch.sigmoid(self.gate(x_BTC)) * heads)

class Gated(Transformer):
    def __init__(self, vocab_size: int, n_layers: int, n_heads: int, d_model: int, context_length: int, seed: int = 0, **options):
        super().__init__(vocab_size, n_layers, n_heads, d_model, context_length, seed=seed, **options)
        for block in self.blocks:
            plain = block.attention
            block.attention = GatedAttention(d_model, n_heads, self.n_kv_heads, plain.layer, attend=plain.attend)
        if not self.embedding.tokens.weight.is_meta:
            self.initialise(seed)

class Sized(Gated):
    "With settings of its own, and without most of Transformer's."
    def __init__(self, vocab_size: int, width: int, depth: int, context_length: int = 16, seed: int = 0):
        super().__init__(vocab_size, depth, 2, width, context_length, seed=seed)

class Gain(nn.Module):
    "A kernel with a weight: one for all blocks."
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, q, k, v, mask, bias=None, dropout=0.0):
        return attend_reference(q, k, v, mask, bias, dropout) * self.gain
"""
ALLOW = f"allow=[{MODULE}]"
# Settings with which a plain model fits Llama's layout.
LLAMA = ["model.qk_norm=false", "model.activation=swiglu", "model.zero_init=false", "trainer.max_steps=2"]
GATES = [f"blocks.{i}.attention.gate.weight" for i in range(2)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside the checkout with the module, and runs of two steps: plain, gated, sized (settings of its own) and kernel."""
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{MODULE}.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    run_tiny(folder, "plain", *LLAMA)
    run_tiny(folder, "gated", *LLAMA, ALLOW, f"model._target_={MODULE}.Gated")
    run_tiny(folder, "kernel", *LLAMA, ALLOW, f"model.attention._target_={MODULE}.Gain", "model.attention._partial_=false")
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf/model/sized.yaml").write_text(f"_target_: {MODULE}.Sized\nvocab_size: null\nwidth: 24\ndepth: 2\n")
    own = [*(words for words in TINY if not words.startswith("model")), *files(folder), "model=sized", "optimizer=adamw", ALLOW]
    (folder / "sized").mkdir()
    train(compose([*own, "trainer.max_steps=2"], config_dir=str(folder / "conf")), folder / "sized")
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


def files(work: Path) -> list[str]:
    return [f"data.files=[{work}/text.txt]", f"paths.data={work}/cache", f"paths.runs={work}/runs"]


def finetune(work: Path, source: str, name: str, *overrides: str) -> dict[str, torch.Tensor]:
    """The weights after one step from those of the run `source`, at a learning rate of next to nothing."""
    settings = [words for words in TINY if not words.startswith("model")] + files(work)
    settings += ["stage=finetune", f"stage.init_from={work / source}", "optimizer=sgd", "optimizer.lr=1e-12", "schedule=constant"]
    (work / name).mkdir()
    train(compose([*settings, "trainer.max_steps=1", *overrides]), work / name)
    return weights(work / name)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): x for name, x in read_tensors(latest_checkpoint(run), "model.").items()}


@pytest.mark.parametrize(
    ("run", "lost"), [("gated", GATES), ("kernel", [f"blocks.{i}.attention.attend.gain" for i in range(2)]), ("sized", [])]
)
def test_hugging_face_export_refuses_what_it_would_lose_by_name(
    work: Path, run: str, lost: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"run={work / run}", "format=huggingface"]) == 2
    error = capsys.readouterr().err
    assert ", ".join(lost) in error and "format=safetensors, which keeps every tensor" in error and len(error.strip().splitlines()) == 1
    assert not (work / run / "exports").exists()


def test_the_export_that_the_message_names_keeps_every_tensor(work: Path) -> None:
    from safetensors.torch import load_file

    file = work / "gated.safetensors"
    assert main(["export", f"run={work / 'gated'}", "format=safetensors", f"output={file}"]) == 0
    saved = weights(work / "gated")
    assert set(GATES) <= load_file(file).keys() and all(torch.equal(x, saved[name]) for name, x in load_file(file).items())
    assert load_file(file).keys() == saved.keys() - {"head.weight"}  # tied


@pytest.mark.parametrize("run", ["gated", "sized", "kernel"])
def test_a_run_of_ones_own_parts_is_fine_tuned_from_without_naming_them_again(work: Path, run: str) -> None:
    before, after = weights(work / run), finetune(work, run, f"{run}-tuned", ALLOW)
    torch.testing.assert_close(after, before, atol=1e-7, rtol=0)


def test_ones_own_parts_are_used_only_where_the_command_allows_them(work: Path) -> None:
    for run, key in (("gated", "model._target_"), ("kernel", "model.attention._target_")):
        with pytest.raises(ConfigError, match=rf"{key}={MODULE}.*add allow=\[{MODULE}\]"):
            finetune(work, run, f"{run}-refused")


def test_from_a_plain_run_what_is_missing_is_named_with_how_to_draw_it_anew(work: Path) -> None:
    gated = [ALLOW, f"model._target_={MODULE}.Gated"]
    with pytest.raises(ConfigError) as caught:
        finetune(work, "plain", "plain-refused", *gated)
    message, hint = str(caught.value), 'stage.reinit=["blocks.*.attention.gate.weight"]'
    assert all(f"{name}: missing in the checkpoint" in message for name in GATES) and hint in message and "\n" not in message
    before, after = weights(work / "plain"), finetune(work, "plain", "plain-gated", *gated, hint)
    torch.testing.assert_close({name: after[name] for name in before}, before, atol=1e-7, rtol=0)
    assert after.keys() - before.keys() == set(GATES)


def test_from_ones_own_run_into_a_plain_model_what_has_no_place_is_named(work: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{GATES[0]}: unknown to the model; {GATES[1]}: unknown to the model"):
        finetune(work, "gated", "gated-refused-plain", "model._target_=meshformer.model.Transformer")


def test_a_part_of_a_model_refuses_what_the_whole_has_no_place_for(tmp_path: Path) -> None:
    tensors = {f"model.{name}": torch.ones(2, 2) for name in ("up.weight", "down.weight", "gate.weight")}
    write_folder(tmp_path / "saved", tensors, {})
    part = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2, bias=False)})
    with pytest.raises(ConfigError, match=r"gate\.weight: unknown to the model"):
        load_weights(part, tmp_path / "saved", partial=True, whole={"up.weight", "down.weight"})
    load_weights(part, tmp_path / "saved", partial=True, whole={"up.weight", "down.weight", "gate.weight"})
    assert torch.equal(part["up"].weight, torch.ones(2, 2))  # pyright: ignore[reportArgumentType]
