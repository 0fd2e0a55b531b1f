"""A gradient that is not finite changes nothing, in any layout; it is reported at the next row; nobody waits for the device in between."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness import run_ranks
from jobs import TINY, before_the_norm, run_tiny, text_file
from meshformer import cli
from meshformer.callbacks import NonFinite, Spike
from meshformer.callbacks.nonfinite import advice, describe_failure
from meshformer.callbacks.samples import whole_model
from meshformer.checkpoint.find import latest_checkpoint, step_of
from meshformer.config.errors import ConfigError
from meshformer.optim import adamw, muon, sgd
from meshformer.optim.shardwise import ShardwiseOptimizer, local_tensors
from meshformer.record.metrics_csv import read_metrics
from meshformer.tasks import LanguageModelling
from meshformer.training import step
from meshformer.training.guard import NonFiniteStep

BAD = 3  # the step at which it happens; rows are written at 2, 4 and 6
STEPS = ["trainer.max_steps=6", "trainer.log_every_n_steps=2", "model.zero_init=false", "trainer.gradient_clip_val=1"]
SKIP = "callbacks.nonfinite.action=skip"
NOT_SAVED = "~callbacks.checkpoint"
OPTIMIZERS = {
    "muon": ["optimizer=muon", "optimizer.weight_decay=0.1"],
    "adamw": ["optimizer=adamw"],
    "sgd": ["optimizer=sgd", "optimizer.momentum=0.9", "+optimizer.nesterov=true", "optimizer.weight_decay=0.1"],
    "adamw, not fused": ["optimizer=adamw", "optimizer.fused=false"],
    "another's": ["optimizer=adamw", "optimizer._target_=torch.optim.RAdam", "~optimizer.fused"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("nonfinite")
    text_file(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshformer.job.train.continuation", lambda *_, **__: "")  # half of the time of so short a run
        yield folder


@pytest.fixture(scope="module")
def reference(work: Path) -> Callable[[str], dict[str, Any]]:
    """By optimizer: what comes of training where the optimizer is not called at the bad step."""

    @cache
    def made(optimizer: str) -> dict[str, Any]:
        return run_ranks(1, train, work, f"{optimizer}-reference", [*OPTIMIZERS[optimizer], SKIP, NOT_SAVED], no_step_at_all)[0]

    return made


# --- what goes wrong, on one rank in one step. In forked ranks: nothing is put back.


def rank_of(task: Any) -> int:
    return task.trainer.global_rank


def poison(rank: int, parameter: str, value: float = float("nan")) -> None:
    """`parameter`'s gradient, on `rank`, when the backward pass is over (in DDP: after the sum, so that no other rank has it)."""
    def poisoned(task: Any) -> None:
        if task.trainer.global_step + 1 == BAD and rank_of(task) == rank:
            with torch.no_grad():
                local_tensors([task.model.get_parameter(parameter).grad])[0].view(-1)[1:2] = value

    before_the_norm(poisoned)


def poison_loss(rank: int, graph: bool) -> None:
    """The loss on `rank`; with `graph`, gradients too."""
    losses = LanguageModelling.losses

    def poisoned(self: Any, batch: Any, phase: str) -> Any:
        loss, count = losses(self, batch, phase)
        if phase == "train" and self.trainer.global_step + 1 == BAD and rank_of(self) == rank:
            loss = loss * float("nan") if graph else loss + float("inf")
        return loss, count

    LanguageModelling.losses = poisoned


def no_step_at_all() -> None:
    """The reference: at the bad step the optimizer is given nothing, and the host knows."""
    counts, update = iter(range(1, 100)), step.divide_or_skip

    def without(optimizer: Any, *arguments: Any) -> None:
        update(optimizer, *arguments)
        if next(counts) == BAD:
            optimizer.zero_grad()

    step.divide_or_skip = without


def record_changes(changed: dict[int, dict[str, bool]]) -> None:
    """Which parameters and optimizer states a step changes, by the last bit."""

    def contents(self: Any, optimizer: Any) -> dict[str, Tensor]:
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = local_tensors([p.detach()])[0].clone()
            for key, x in optimizer.state.get(p, {}).items():
                found[f"{name}.{key}"] = local_tensors([x])[0].clone()
        return found

    training_step = LanguageModelling.training_step

    def recorded(self: Any, batch: Any, index: int) -> Any:
        number, optimizer = self.trainer.global_step + 1, self.trainer.optimizers[0]
        with torch.no_grad():
            before = contents(self, optimizer)
        loss = training_step(self, batch, index)
        with torch.no_grad():
            after = {name: x for name, x in contents(self, optimizer).items() if x.numel()}
        changed[number] = {name: name not in before or not torch.equal(x, before[name]) for name, x in after.items()}
        return loss

    LanguageModelling.training_step = recorded


def train(folder: Path, name: str, overrides: list[str], *mistakes: Callable[[], None]) -> dict[str, Any]:
    """Trains with `mistakes`; everything a test may want to know, the whole weights included."""
    changed: dict[int, dict[str, bool]] = {}
    record_changes(changed)
    for mistake in mistakes:
        mistake()
    weights: dict[str, Tensor] = {}
    ended = LanguageModelling.on_train_end

    def on_train_end(self: Any) -> None:
        ended(self)
        model = whole_model(self)
        weights.update({n: p.detach().clone() for n, p in model.named_parameters()} if model is not None else {})

    LanguageModelling.on_train_end = on_train_end
    error, rows = None, []
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            rows = run_tiny(folder, name, *STEPS, *overrides)
        except ArithmeticError as stopped:
            error = f"{type(stopped).__name__}: {stopped}"
    return {"changed": changed, "rows": rows, "weights": weights, "stderr": err.getvalue(), "error": error}


class Poison:
    """A mistake that survives the way into a rank."""

    def __init__(self, function: Callable[..., None], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __call__(self) -> None:
        self.function(*self.arguments)


# --- it changes nothing


@pytest.mark.parametrize(
    ("optimizer", "value"),
    [*((name, float("nan")) for name in OPTIMIZERS), ("muon", float("-inf"))],
)
def test_a_bad_gradient_changes_nothing_and_training_goes_on_as_if_the_step_had_not_been(
    work: Path, reference: Any, optimizer: str, value: float
) -> None:
    settings = [*OPTIMIZERS[optimizer], SKIP, NOT_SAVED]
    bad = Poison(poison, 0, "blocks.1.mlp.up.weight", value)
    (ours,) = run_ranks(1, train, work, f"{optimizer}{value}", settings, bad)
    check_skipped(ours)
    assert "step 3: the gradient of blocks.1.mlp.up.weight is not finite (rank 0, learning rate 0." in ours["stderr"]
    expected = reference(optimizer)
    for name, x in expected["weights"].items():
        assert torch.equal(ours["weights"][name], x), name
    assert [r["train/lr"] for r in ours["rows"]] == [r["train/lr"] for r in expected["rows"]], "the schedule moves on"


def check_skipped(found: dict[str, Any]) -> None:
    assert not any(found["changed"][BAD].values()), [name for name, moved in found["changed"][BAD].items() if moved]
    assert all(moved for name, moved in found["changed"][BAD + 1].items() if "." in name), "the test can see changes"


@pytest.mark.parametrize(
    ("layout", "rank", "parameter", "optimizer"),
    [
        ("ddp", 1, "blocks.0.attention.q.weight", "muon"),
        ("fsdp", 0, "embedding.tokens.weight", "sgd"),
        ("context", 1, "blocks.1.mlp.down.weight", "adamw"),
        ("tensor", 0, "norm.weight", "muon"),  # each rank's part of a sum: after it, both are wrong
        ("pipeline", 1, "blocks.1.mlp.up.weight", "adamw"),
    ],
)
def test_what_one_rank_finds_all_skip(work: Path, reference: Any, layout: str, rank: int, parameter: str, optimizer: str) -> None:
    settings = [*OPTIMIZERS[optimizer], f"strategy={layout}", "trainer.devices=2", SKIP, NOT_SAVED]
    name = f"{layout}-{rank}-{optimizer}"
    ranks = run_ranks(2, train, work, name, settings, Poison(poison, rank, parameter))
    for found in ranks:
        check_skipped(found)
    holders = "ranks 0, 1" if parameter == "norm.weight" else f"rank {rank}"
    assert f"step 3: the gradient of {parameter} is not finite ({holders}, learning rate 0." in ranks[0]["stderr"]
    assert not ranks[1]["stderr"].count("not finite")
    rows: list[dict[str, Any]] = read_metrics(work / name / "metrics.csv")
    assert [(r["step"], r["train/skipped_steps"]) for r in rows] == [(2, 0), (4, 1), (6, 1)]
    assert all(r["train/loss"] > 0 and r["train/grad_norm"] > 0 for r in rows)
    expected = reference(optimizer)["rows"]
    tolerance = 5e-6 if optimizer != "muon" else 1e-3
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(rows, expected, strict=True)) < tolerance


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_bad_loss_of_one_rank_is_told_as_its_own(work: Path, layout: str) -> None:
    """Its gradient has spread over all ranks by then. In the row's mean, its loss is left out, and the other rank's is not."""
    name, settings = f"loss-{layout}", [*OPTIMIZERS["adamw"], f"strategy={layout}", "trainer.devices=2", SKIP, NOT_SAVED]
    ranks = run_ranks(2, train, work, name, settings, Poison(poison_loss, 1, True))
    for found in ranks:
        check_skipped(found)
    assert "(rank 1, where the loss is not finite either, learning rate 0." in ranks[0]["stderr"]
    assert "the gradient of norm.weight and of" in ranks[0]["stderr"], "the first that the backward pass reached"
    rows: list[dict[str, Any]] = read_metrics(work / name / "metrics.csv")
    assert [r["train/skipped_steps"] for r in rows] == [0, 1, 1]
    assert all(0 < r["train/loss"] < 5 for r in rows)


# --- what the host learns, and does


def test_stop_is_the_default_it_saves_and_the_command_fails(work: Path) -> None:
    folder = work / "stopped"
    paths = [f"data.files=[{work}/text.txt]", f"paths.data={work}/cache", f"paths.runs={work}/runs", f"hydra.run.dir={folder}"]
    ((code, err),) = run_ranks(1, command, ["train", *TINY, *STEPS, *OPTIMIZERS["adamw"], *paths], Poison(poison, 0, "norm.weight"))
    assert code == 1
    message = err.strip().splitlines()[-1]
    for part in ("step 3", "norm.weight", "rank 0", "learning rate", "optimizer.lr", "callbacks.nonfinite.action=skip"):
        assert part in message, message
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "failed" and "step 3: the gradient of norm.weight" in record["error"]["message"]
    assert [(r["step"], r["train/skipped_steps"]) for r in read_metrics(folder / "metrics.csv")] == [(2, 0), (4, 1)]
    assert step_of(latest_checkpoint(folder)) == 4, "what came before the bad step, and after it, is not lost"
    run_ranks(1, resumed, work, "stopped", [*STEPS, *OPTIMIZERS["adamw"]])
    assert [(r["step"], r["train/skipped_steps"]) for r in read_metrics(folder / "metrics.csv")] == [(2, 0), (4, 1), (6, 1)]


def command(arguments: list[str], mistake: Callable[[], None]) -> tuple[int, str]:
    mistake()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        return cli.main(arguments), err.getvalue()


def resumed(folder: Path, name: str, overrides: list[str], *mistakes: Callable[[], None]) -> list[dict[str, Any]]:
    for mistake in mistakes:
        mistake()
    return run_tiny(folder, name, *overrides, resume=True)


def test_all_ranks_stop(work: Path) -> None:
    settings = [*OPTIMIZERS["muon"], "strategy=fsdp_tensor", "trainer.devices=4", NOT_SAVED]
    ranks = run_ranks(4, train, work, "all-stop", settings, Poison(poison, 3, "blocks.0.mlp.up.weight"))
    assert len({found["error"] for found in ranks}) == 1
    assert ranks[0]["error"].startswith("NonFiniteError: step 3: the gradient of blocks.0.mlp.up.weight is not finite (rank 3, ")


def test_a_bad_loss_with_good_gradients_is_told_too(work: Path) -> None:
    mistake = Poison(poison_loss, 0, False)
    (found,) = run_ranks(1, train, work, "loss-stop", OPTIMIZERS["adamw"], mistake)
    assert found["error"].startswith("NonFiniteError: step 3: the loss is not finite (rank 0, learning rate 0.")
    assert not list((work / "loss-stop").glob("checkpoints/*")), "the weights may be at fault"
    (found,) = run_ranks(1, train, work, "loss-skip", [*OPTIMIZERS["adamw"], SKIP, NOT_SAVED], mistake)
    (usual,) = run_ranks(1, train, work, "loss-usual", ["trainer.log_every_n_steps=1", *OPTIMIZERS["adamw"], NOT_SAVED])
    losses = {r["step"]: r["train/loss"] for r in usual["rows"]}
    assert [r["train/loss"] for r in found["rows"]] == pytest.approx(
        [(losses[1] + losses[2]) / 2, losses[4], (losses[5] + losses[6]) / 2], abs=1e-12
    )
    assert [r["train/skipped_steps"] for r in found["rows"]] == [0, 0, 0], "the update was made"


def test_what_a_checkpoint_was_saved_over_is_still_told(work: Path) -> None:
    """Between the bad step, 3, and its row, 6, the run is killed and goes on."""
    settings = [*OPTIMIZERS["adamw"], "trainer.log_every_n_steps=6", "callbacks.checkpoint.every_n_steps=4", SKIP]
    (found,) = run_ranks(1, train, work, "killed", ["trainer.max_steps=4", *settings], Poison(poison, 0, "norm.weight"))
    assert found["stderr"].count("step 3: the gradient of norm.weight") == 1
    rows, err = run_ranks(1, resumed_and_told, work, "killed", [*STEPS, *settings])[0]
    assert err.count("step 3: the gradient of norm.weight is not finite (rank 0, learning rate 0.") == 1
    assert rows[-1]["step"] == 6 and rows[-1]["train/skipped_steps"] == 1


def resumed_and_told(*arguments: Any) -> tuple[Any, str]:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        return resumed(*arguments), err.getvalue()


def test_sentences() -> None:
    overflow = describe_failure(NonFiniteStep(5, 0.1, None, 0, [], [], True))
    assert overflow.startswith("step 5: the gradients' common norm overflows (learning rate 0.1).")
    many = describe_failure(NonFiniteStep(5, 0.1, "head.weight", 3, [0, 2], [], True))
    assert many.startswith("step 5: the gradient of head.weight and of 2 more is not finite (ranks 0, 2, learning rate 0.1).")
    with pytest.raises(ConfigError, match=r"callbacks\.nonfinite\.action=ignore"):
        NonFinite("ignore")  # pyright: ignore[reportArgumentType]


class Followed:
    """What of a trainer the advice looks at."""

    def __init__(self, clip: float | None, precision: str) -> None:
        self.lightning_module, self.precision = SimpleNamespace(gradient_clip_val=clip), precision


def test_advice_leaves_out_what_was_followed_already() -> None:
    clip, exact = "trainer.gradient_clip_val=1", "trainer.precision=32-true"
    cases = [(None, "bf16-mixed", [clip, exact]), (1.0, "bf16-mixed", [exact]), (None, "32-true", [clip]), (1.0, "32-true", [])]
    for given, precision, missing in cases:
        text = advice(Followed(given, precision))  # pyright: ignore[reportArgumentType]
        assert [word for word in (clip, exact) if word in text] == missing, text
        assert "a lower optimizer.lr" in text


# --- nobody waits for the device


class Waits(TorchDispatchMode):
    """Counts, by optimizer step, what takes a number from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.found = 0, defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "is_nonzero", "aten.equal", "nonzero", "masked_select", "_to_copy")):
            self.found[self.step].append(name)
        return func(*args, **(kwargs or {}))


def waits(folder: Path, name: str, overrides: list[str]) -> dict[int, list[str]]:
    counter = Waits()
    step = LanguageModelling.training_step

    def training_step(self: Any, *arguments: Any) -> Any:
        counter.step = self.trainer.global_step + 1
        with counter:
            return step(self, *arguments)

    LanguageModelling.training_step = training_step
    run_tiny(folder, name, *STEPS, *overrides, NOT_SAVED)
    return {number: [f for f in found if "_to_copy" not in f] for number, found in counter.found.items()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_no_step_waits_for_the_device(work: Path, optimizer: str) -> None:
    (found,) = run_ranks(
        1, waits, work, f"waits-{optimizer}", [*OPTIMIZERS[optimizer], "callbacks.spike.threshold=5", "callbacks.spike.window=2"]
    )
    assert not any(found.values()), found


def test_the_counter_sees_a_host_that_asks(work: Path) -> None:
    (found,) = run_ranks(1, waits, work, "waits-asked", OPTIMIZERS["adamw, not fused"])
    assert all(found[step] for step in range(1, 7))


# --- spikes


def test_a_spike_is_a_norm_above_so_many_medians() -> None:
    spike = Spike(threshold=3, window=4)
    task: Any = nn.Module()
    task.device = torch.device("cpu")
    spike.on_train_start(None, task)  # pyright: ignore[reportArgumentType]

    def judge(norm: float, step: int) -> bool:
        value = torch.tensor(norm)
        return bool(task.should_skip(value, ~value.isfinite(), step))

    assert not judge(1.0, 1) and not judge(50.0, 2), "one norm of four is no median"
    assert judge(151.0, 3), "three times the lower one of the middle: 1, 50, inf, inf"
    assert not judge(float("nan"), 4) and spike.state_dict()["norms"] == [float("inf"), 1.0, 50.0, 151.0], "not a spike, and not kept"
    again = Spike(threshold=3, window=4)
    again.load_state_dict(spike.state_dict())
    again.on_train_start(None, task)  # pyright: ignore[reportArgumentType]
    assert not judge(149.0, 5) and judge(448.0, 6) and not judge(449.0, 7), "a lasting rise is the new normal"
    with pytest.raises(ConfigError, match=r"callbacks\.spike\.threshold"):
        Spike(threshold=1.0)


def scale_gradient(step: int, factor: float) -> None:
    def scaled(task: Any) -> None:
        if task.trainer.global_step + 1 == step:
            torch._foreach_mul_(local_tensors([p.grad for p in task.model.parameters()]), factor)

    before_the_norm(scaled)


@pytest.mark.parametrize("layout", ["single", "fsdp"])
def test_a_spike_is_skipped_also_by_a_run_that_resumed_just_before(work: Path, layout: str) -> None:
    on = ["callbacks.spike.threshold=5", "callbacks.spike.window=4", "schedule=constant", *OPTIMIZERS["muon"]]
    ranks = 1 if layout == "single" else 2
    on += [f"strategy={layout}", f"trainer.devices={ranks}"]
    spike, name = Poison(scale_gradient, BAD, 1000.0), f"spike-{layout}"
    for found in run_ranks(ranks, train, work, f"{name}-whole", [*on, NOT_SAVED], spike):
        check_skipped(found)
        assert found["error"] is None
    whole = read_metrics(work / f"{name}-whole" / "metrics.csv")
    assert [r["train/skipped_steps"] for r in whole] == [0, 1, 1]
    run_ranks(ranks, train, work, name, [*on, "trainer.max_steps=2"])
    run_ranks(ranks, resumed, work, name, [*STEPS, *on], spike)
    columns = ("step", "train/loss", "train/grad_norm", "train/skipped_steps")
    ours = read_metrics(work / name / "metrics.csv")
    assert [[row[c] for c in columns] for row in ours] == [[row[c] for c in columns] for row in whole]


# --- what skipping is made of


@pytest.fixture
def transposed() -> Iterator[tuple[nn.Module, nn.Module]]:
    """Two equal models; the second's gradients are the first's, laid out in memory the other way round."""
    models = []
    for _ in range(2):
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(6, 4, bias=False)])
        model.head = nn.Linear(6, 3)
        for k, p in enumerate(model.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 + k))
        models.append(model)
    for p in models[1].parameters():
        p.grad = p.grad.mT.contiguous().mT if p.ndim == 2 else p.grad  # pyright: ignore[reportOptionalMemberAccess]
    yield models[0], models[1]


@pytest.mark.parametrize("make", [adamw, sgd, muon])
def test_the_layout_of_a_gradient_in_memory_changes_nothing(transposed: tuple[nn.Module, nn.Module], make: Any) -> None:
    for model in transposed:
        optimizer: ShardwiseOptimizer = make(model.named_parameters(), lr=0.1)
        optimizer.step()
    for p, q in zip(transposed[0].parameters(), transposed[1].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
