"""Claims about TextData, alone and inside a Lightning Trainer."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from meshformer.config.errors import ConfigError
from meshformer.data import CharTokenizer, TextData, TextFiles

BATCH, CONTEXT = 6, 16


@pytest.fixture
def build(text_file, tmp_path):
    def build(**changes) -> TextData:
        settings = {"batch_size": BATCH, "context_length": CONTEXT, "tokenizer": "char", "vocab_size": 0, "seed": 1}
        return TextData(TextFiles([str(text_file)]), cache=tmp_path / "cache", **(settings | changes))

    return build


class Recorder(LightningModule):
    """Keeps the batches it is given, and the position as the trainer side does; saves a checkpoint at a step if told so."""

    def __init__(self, data: TextData, save_at: int | None, path: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.data, self.seen, self.validated = data, [], 0
        self.save_at, self.path = save_at, path

    def training_step(self, batch, batch_idx):
        self.seen.extend(micro["tokens"] for micro in batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += int((batch["targets"] >= 0).sum())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.data.samples = self.trainer.global_step * self.data.batch_size
        if self.trainer.global_step == self.save_at and len(self.seen) == self.save_at * self.data.accumulation:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def fit(tmp_path):
    def fit(data, max_steps, save_at=None, resume=False):
        module = Recorder(data, save_at, tmp_path / "at.ckpt")
        trainer = Trainer(
            max_steps=max_steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "at.ckpt" if resume else None)
        if save_at is None:
            trainer.save_checkpoint(tmp_path / "at.ckpt")
        return module

    return fit


def test_vocabulary_and_steps_are_known_before_a_model(build, text_file):
    data = build()
    data.prepare_data()
    text = text_file.read_text()
    assert data.vocab_size == len(set(text)) and data.tokenizer.decode(data.tokenizer.encode("lazy fox")) == "lazy fox"
    assert data.steps_per_epoch == (len(text) * 90 // 100 // CONTEXT - 1) // BATCH
    assert data.bytes_per_token("val") == 1.0


def test_batches_are_text(build, text_file):
    data = build()
    batch = next(iter(data.train_dataloader()))[0]
    text = text_file.read_text()
    assert batch["tokens"].shape == batch["targets"].shape == (BATCH, CONTEXT)
    assert all(data.tokenizer.decode(row) in text for row in batch["tokens"])
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.parametrize("eval_batch_size, accumulation", [(None, 1), (None, 3), (1, 1), (50, 1)])
def test_validation_and_test_see_their_whole_split(build, text_file, eval_batch_size, accumulation):
    data = build(eval_batch_size=eval_batch_size, accumulation=accumulation)
    text = text_file.read_text()
    for loader, part in [
        (data.val_dataloader(), text[len(text) * 90 // 100 : len(text) * 95 // 100]),
        (data.test_dataloader(), text[len(text) * 95 // 100 :]),
    ]:
        batches = list(loader)
        assert len(batches[0]["tokens"]) == (eval_batch_size or BATCH // accumulation)
        targets = torch.cat([batch["targets"].flatten() for batch in batches])
        assert data.tokenizer.decode(targets[targets >= 0]) == part[1:]


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_leave_the_global_generator_alone(build, workers):
    data = build(workers=workers)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("saved", ["while training", "after training"])
@pytest.mark.parametrize("step", ["middle", "last of an epoch", "first of an epoch"])
def test_a_resumed_trainer_sees_the_batches_of_one_never_stopped(build, fit, step, saved, accumulation):
    """A checkpoint saved after training is the hard case: Lightning has by then counted the unfinished epoch as finished."""
    data = build(accumulation=accumulation, batch_size=60)
    epoch, per_step = data.steps_per_epoch, accumulation
    at = {"middle": epoch + 3, "last of an epoch": epoch, "first of an epoch": epoch + 1}[step]
    whole = fit(data, 3 * epoch + 4, save_at=at)
    if saved == "after training":
        part = fit(build(accumulation=accumulation, batch_size=60), at)
        assert torch.equal(torch.stack(part.seen), torch.stack(whole.seen[: at * per_step]))
    data = build(accumulation=accumulation, batch_size=60)
    rest = fit(data, 3 * epoch + 4, resume=True, save_at=0)
    assert len(whole.seen) == (3 * epoch + 4) * per_step
    assert torch.equal(torch.stack(rest.seen), torch.stack(whole.seen[at * per_step :]))
    assert data.samples == (3 * epoch + 4) * data.batch_size
    assert whole.validated == 3 * (len(data.prepared.tokens("val")) - 1)


def test_workers_deliver_the_same_order(build):
    data, plain = build(workers=2), build()
    data.samples = plain.samples = 5 * BATCH
    for (ours,), (theirs,) in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(ours["tokens"], theirs["tokens"])


def test_the_data_axis_comes_from_the_strategy(build):
    class Axis:
        def __init__(self, rank):
            self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": 2}
            self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    whole = next(iter(build().train_dataloader()))[0]["tokens"]
    halves = []
    for rank in range(2):
        data = build()
        data.trainer = Axis(rank)
        halves.append(next(iter(data.train_dataloader()))[0]["tokens"])
        assert data.steps_per_epoch == build().steps_per_epoch
        assert len(next(iter(data.val_dataloader()))["tokens"]) == BATCH // 2
    assert torch.equal(torch.cat(halves), whole)


def test_a_position_of_other_data_is_refused(build, text_file):
    data = build()
    data.samples = 12
    state = data.state_dict()
    restored = build()
    restored.load_state_dict(state)
    assert restored.samples == 12
    with pytest.raises(ConfigError, match="seed=2"):
        build(seed=2).load_state_dict(state)
    with pytest.raises(ConfigError, match="other text"):
        build(fixed_tokenizer=CharTokenizer.train(text_file.read_text() + "ß")).load_state_dict(state)
    text_file.write_text("edited " + text_file.read_text())
    with pytest.raises(ConfigError, match="other text"):
        build().load_state_dict(state)


def test_too_long_a_context_is_refused_with_its_key(build):
    with pytest.raises(ConfigError, match=r"data\.context_length=100000"):
        build(context_length=100_000).train_dataloader()
