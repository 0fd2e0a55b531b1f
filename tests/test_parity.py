"""Every layout trains to the same loss and the same global gradient norm as one process: clipped SGD, which hides no wrong scale.

The reference and every layout see the same batches, in which about half the targets are ignored, unevenly over ranks and micro-batches; the
vocabulary (13) and most of the cuts it is exposed to are uneven; the first weights must be equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs
from harness import run_ranks
from jobs import run_labelled, run_tiny, text_file, tiny_config
from layouts import layouts, params
from meshformer.callbacks.samples import whole_model
from meshformer.data.windows import Batches
from meshformer.model import draw, head
from meshformer.parallel import context, memory_options, pipeline, strategy, tensor
from meshformer.tasks import LanguageModelling, Task
from meshformer.training.protocol import StepStrategy

STEPS = 10
PARITY = [
    f"trainer.max_steps={STEPS}",
    "data.batch_size=16",
    "optimizer=sgd",
    "optimizer.lr=0.5",
    "schedule=constant",
    "model.n_kv_heads=2",
    "model.zero_init=false",  # every parameter has a gradient from the first step on
    "trainer.gradient_clip_val=0.5",
    "trainer.val_check_interval=5",
    "~callbacks.checkpoint",
]
TOLERANCE = 5e-6
Rows = list[dict[str, Any]]

# (name, processes, overrides): every file under conf/strategy, and products that have none.
LAYOUTS = [
    *((name, *layout) for name, layout in layouts(tensor_pipeline=["strategy.microbatches=4"]).items()),
    (
        "mesh: shard × tensor × pipeline",
        8,
        ["strategy=mesh", "strategy.shard=2", "strategy.tensor=2", "strategy.pipeline=2", "strategy.microbatches=4"],
    ),
]
# What else a layout may be asked for, on as few processes as show it.
VARIANTS = [
    ("one rank", 1, ["strategy=tensor"]),
    ("fsdp, three ranks", 3, ["strategy=fsdp", "data.batch_size=18"]),
    ("mesh: uneven shard 3 × tensor 2", 6, ["strategy=mesh", "strategy.shard=3", "strategy.tensor=2", "data.batch_size=18"]),
    ("no sequence parallel", 2, ["strategy=tensor", "strategy.sequence_parallel=false"]),
    ("loss parallel", 2, ["strategy=tensor", "strategy.loss_parallel=true"]),
    ("loss parallel, last step not validated", 2, ["strategy=tensor", "strategy.loss_parallel=true", "trainer.val_check_interval=4"]),
    ("ulysses", 2, ["strategy=context", "strategy.context_method=ulysses"]),
    (
        "ulysses × tensor",
        4,
        ["strategy=mesh", "strategy.context=2", "strategy.tensor=2", "strategy.context_method=ulysses", "model.n_kv_heads=4"],
    ),
    (
        "alibi, ulysses × tensor",
        4,
        [
            "strategy=mesh",
            "strategy.context=2",
            "strategy.tensor=2",
            "strategy.context_method=ulysses",
            "model.n_kv_heads=4",
            "model/position=alibi",
        ],
    ),
    (
        "frozen layers, fsdp",
        2,
        ["strategy=fsdp", "task._target_=jobs.Frozen", "allow=[jobs]", "trainer.gradient_clip_val=0.1", "optimizer.lr=2"],
    ),
    (
        "frozen layers, pipeline",
        2,
        ["strategy=pipeline", "task._target_=jobs.Frozen", "allow=[jobs]", "trainer.gradient_clip_val=0.1", "optimizer.lr=2"],
    ),
    ("gpipe", 2, ["strategy=pipeline", "strategy.schedule=gpipe"]),
    ("interleaved 1f1b", 2, ["strategy=pipeline", "strategy.schedule=interleaved_1f1b", "model.n_layers=5"]),
    ("zero bubble", 2, ["strategy=pipeline", "strategy.schedule=interleaved_zero_bubble", "model.n_layers=4"]),
    ("zero bubble × shard", 4, ["strategy=fsdp_pipeline", "strategy.schedule=interleaved_zero_bubble", "model.n_layers=4"]),
    ("cut by hand", 2, ["strategy=pipeline", "strategy.blocks_per_stage=[3,1]", "model.n_layers=4"]),
    ("pipeline × replicate", 4, ["strategy=mesh", "strategy.replicate=2", "strategy.pipeline=2"]),
    ("pipeline × context", 4, ["strategy=mesh", "strategy.context=2", "strategy.pipeline=2"]),
    ("reduce every micro-batch", 2, ["strategy=fsdp", "strategy.reduce_gradients=every", "trainer.accumulate_grad_batches=2"]),
    ("checkpointing, single", 1, ["strategy=single", "strategy.activation_checkpointing=full"]),
    ("checkpointing, fsdp", 2, ["strategy=fsdp", "strategy.activation_checkpointing=full"]),
    ("checkpointing, tensor", 2, ["strategy=tensor", "strategy.activation_checkpointing=selective"]),
    ("checkpointing, pipeline", 2, ["strategy=pipeline", "strategy.activation_checkpointing=full"]),
    ("compiled, fsdp", 2, ["strategy=fsdp", "trainer.compile=true", "strategy.activation_checkpointing=full"]),
    ("compiled, tensor", 2, ["strategy=tensor", "trainer.compile=true"]),
]
# Models whose parts meet the cuts in their own way.
MODELS = {
    "learned positions": ["model/position=learned"],
    "alibi": ["model/position=alibi"],
    "positional attention": ["model/position=positional_attention"],
    "sinusoidal, post-norm, layer norm, biases": [
        "model/position=sinusoidal", "model.norm_position=post", "model.norm=layer", "model.bias=true", "model.qk_norm=false",
    ],
    "swiglu, embedding norm, window": ["model.activation=swiglu", "model.embedding_norm=true", "model.window=5"],
    "the head of BERT": [
        "model.norm_position=post", "model.norm=layer", "model.norm_eps=1e-6", "model.bias=true", "model.qk_norm=false",
        "model.activation=gelu_tanh", "model.head_transform=true", "model.head_bias=true", "model.head_dim=6", "model.attention_bias=false",
    ],
}  # fmt: skip
# The block-mask kernel, against the masked one in one process.
FLEX = ["model/attention=flex", "model/position=alibi", "model.window=5"]
FLEX_LAYOUTS = {
    "single": (1, []),
    "tensor": (2, ["strategy=tensor"]),
    "context": (2, ["strategy=context"]),
    "ulysses": (2, ["strategy=context", "strategy.context_method=ulysses"]),
    "pipeline": (2, ["strategy=pipeline"]),
}
CUTS = {
    "tensor": (2, ["strategy=tensor"]),
    "context": (2, ["strategy=context"]),
    "ulysses": (2, ["strategy=context", "strategy.context_method=ulysses"]),
    "pipeline": (2, ["strategy=pipeline"]),
}


def rows(
    folder: Path, name: str, overrides: list[str], ignore: bool = True, break_it: Callable[[], None] | None = None, tiles: bool = False
) -> Rows:
    """Trains in folder/name; the rows, the first of which also holds the model's first weights. In a process of its own."""
    memory_options.BACKEND = "aot_eager"
    if tiles:  # first values of these small matrices are drawn in several, whose edges no cut meets
        draw.WHOLE, draw.TILE = 200, 7
    if ignore:
        batches = Batches.__iter__

        def some_ignored(self: Any) -> Any:
            for batch in batches(self):
                if "labels" in batch:
                    yield {**batch, "labels": batch["labels"].masked_fill(batch["tokens"][:, 0] % 3 == 0, -100)}
                    continue
                keep = (batch["tokens"] * 7 + batch["tokens"].cumsum(1)) % 11 < 2 + batch["tokens"][:, :1] % 9
                yield {**batch, "targets": batch["targets"].masked_fill(~keep, -100)}

        Batches.__iter__ = some_ignored
    weights: dict[str, torch.Tensor] = {}
    started = Task.on_train_start

    def on_train_start(self: Any) -> None:
        started(self)
        model = whole_model(self)
        weights.update({n: p.detach().clone() for n, p in model.named_parameters()} if model is not None else {})

    Task.on_train_start = on_train_start
    if break_it:
        break_it()
    run = run_labelled if any(override.startswith("task=") for override in overrides) else run_tiny
    found = run(folder, name, *PARITY, *overrides)
    confusion = folder / name / "confusion_matrix.csv"
    return [{**found[0], "weights": weights, "confusion": confusion.read_text() if confusion.exists() else None}, *found[1:]]


def differences(ours: Rows, reference: Rows) -> dict[str, float]:
    """Largest difference over the steps: absolute for losses, relative for the gradient norm."""
    assert [r["step"] for r in ours] == [r["step"] for r in reference] == list(range(1, STEPS + 1))
    loss = max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(ours, reference, strict=True))
    norm = max(abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) for a, b in zip(ours, reference, strict=True))
    judged = [name for name in ("val/loss", "val/accuracy", "val/f1") if name in reference[-1]]
    val = max(abs(a[key] - b[key]) for a, b in zip(ours, reference, strict=True) for key in judged if key in b)
    return {"loss": loss, "grad_norm": norm, "val": val}


class References:
    """One process's rows for a model, trained once."""

    def __init__(self, folder: Path):
        self.folder, self.known = folder, {}
        text_file(folder, letters="abcdefghijk")

    def __call__(self, overrides: list[str], ignore: bool = True, tiles: bool = False) -> Rows:
        own = [o for o in overrides if not o.startswith(("strategy", "trainer.accumulate", "trainer.compile", "model/attention"))]
        key = (*own, ignore, tiles)
        if key not in self.known:
            (self.known[key],) = run_ranks(1, rows, self.folder, f"one-{len(self.known)}", own, ignore, None, tiles)
        return self.known[key]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("parity"))


def check_equal(
    references: References,
    processes: int,
    overrides: list[str],
    ignore: bool = True,
    change: Callable[[], None] | None = None,
    tiles: bool = False,
) -> None:
    reference = references(overrides, ignore, tiles)
    name = f"{len(list(references.folder.iterdir()))}"
    overrides = [*overrides, f"trainer.devices={processes}"]
    if not any(override.startswith("task=") for override in overrides):
        tiny_config(references.folder, *PARITY, *overrides)  # once, for all ranks
    ours = run_ranks(processes, rows, references.folder, name, overrides, ignore, change, tiles, timeout=240)[0]
    found = differences(ours, reference)
    assert max(found.values()) < TOLERANCE, found
    assert ours[0]["confusion"] == reference[0]["confusion"]
    assert ours[0]["weights"].keys() == reference[0]["weights"].keys()
    for parameter, value in reference[0]["weights"].items():
        assert torch.equal(ours[0]["weights"][parameter], value), parameter
    assert reference[-1]["train/loss"] < reference[0]["train/loss"] - 0.05, "the comparison needs training that moves"
    clip = next(o for o in reversed([*PARITY, *overrides]) if o.startswith("trainer.gradient_clip_val="))
    assert max(r["train/grad_norm"] for r in reference) > float(clip.partition("=")[2]), "the comparison needs clipping that acts"


# Eight processes on two cores take half a minute: once is enough, with everything on.
CASES = [(*layout, *how) for layout in LAYOUTS for how in ((1, True), (2, False)) if layout[1] < 8 or how == (2, False)]


# Tied matrices meet each axis of these in a layout of its own.
TIED_ELSEWHERE = ("hsdp", "fsdp_tensor", "fsdp_context", "fsdp_pipeline", "tensor_pipeline")


@pytest.mark.parametrize(
    ("processes", "overrides", "accumulation", "tied"),
    [
        pytest.param(
            *case[1:],
            id=f"{case[0]}, {'tied' if case[4] else 'untied, accumulated'}",
            marks=[pytest.mark.slow] * (case[4] and case[0] in TIED_ELSEWHERE),
        )
        for case in CASES
    ],
)
def test_layout_equals_one_process(references: References, processes: int, overrides: list[str], accumulation: int, tied: bool) -> None:
    settings = [f"model.tie_embeddings={str(tied).lower()}", f"trainer.accumulate_grad_batches={accumulation}"]
    check_equal(references, processes, [*overrides, *settings], tiles=not tied)


@pytest.mark.parametrize("layout", params(["fsdp", "pipeline"], ["fsdp"]))
def test_accumulation_of_a_tied_model_and_a_whole_batch_of_an_untied_one(references: References, layout: str) -> None:
    check_equal(references, 2, [f"strategy={layout}", "trainer.accumulate_grad_batches=2"])
    check_equal(references, 2, [f"strategy={layout}", "model.tie_embeddings=false"], ignore=False)


SLOW = ("compiled, tensor", "ulysses × tensor", "loss parallel", "checkpointing, pipeline", "zero bubble")  # another says as much


@pytest.mark.parametrize(
    ("processes", "overrides"), [pytest.param(*case[1:], id=case[0], marks=[pytest.mark.slow] * (case[0] in SLOW)) for case in VARIANTS]
)
def test_variant_equals_one_process(references: References, processes: int, overrides: list[str]) -> None:
    check_equal(references, processes, overrides)


MET = [
    ("learned positions", "tensor"),
    ("learned positions", "context"),
    ("learned positions", "pipeline"),
    ("alibi", "tensor"),
    ("alibi", "context"),
    ("alibi", "ulysses"),
    ("positional attention", "tensor"),
    ("positional attention", "ulysses"),
    ("sinusoidal, post-norm, layer norm, biases", "tensor"),
    ("swiglu, embedding norm, window", "tensor"),
    ("swiglu, embedding norm, window", "ulysses"),
    ("the head of BERT", "tensor"),
    ("the head of BERT", "pipeline"),
]


@pytest.mark.parametrize(("model", "cut"), MET)
def test_every_part_of_the_model_survives_the_cuts(references: References, model: str, cut: str) -> None:
    processes, overrides = CUTS[cut]
    check_equal(references, processes, [*overrides, *MODELS[model]])


@pytest.mark.parametrize("layout", params(FLEX_LAYOUTS, ["pipeline", "context"]))
def test_the_block_mask_kernel_equals_the_masked_one_in_every_layout(references: References, layout: str) -> None:
    processes, overrides = FLEX_LAYOUTS[layout]
    check_equal(references, processes, [*FLEX, *overrides])


CLASSES = ["task=sequence_classification", "data.label_column=label", "data.context_length=32"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tensor", "pipeline"])
def test_classification_equals_one_process(references: References, layout: str) -> None:
    check_equal(references, 2, [f"strategy={layout}", *CLASSES])
    assert "val/f1" in references(CLASSES)[-1] and references(CLASSES)[0]["confusion"]


def test_the_block_mask_kernel_keeps_documents_apart_on_each_ranks_heads(references: References) -> None:
    check_equal(references, 2, ["model/attention=flex", "strategy=tensor", *CLASSES])  # padding is a document of its own


# Rounding to 8 bits is noise of 1e-3 in the gradient of a small batch, and steps of a high rate amplify it: a larger batch, a lower rate.
BF16 = ["trainer.precision=bf16-mixed", "optimizer.lr=0.02", "model.d_model=64", "data.context_length=32", "data.batch_size=32"]


AUTOCAST = {"loss": 1e-3, "grad_norm": 1e-3, "val": 1e-3}
# FSDP hands the embedding, gains and gradients over in bf16, which one process keeps in fp32. Both are as far from fp32 (8e-4 and 7e-4 of the
# gradient norm), by different rounding, so from each other up to the sum.
OWN = AUTOCAST | {"grad_norm": 2e-3}


@pytest.mark.parametrize(
    ("layout", "tolerance"),
    [("fsdp", OWN), ("context", OWN), ("fsdp strategy.param_dtype=null", AUTOCAST), ("tensor", AUTOCAST), ("pipeline", AUTOCAST)],
)
def test_bf16_layout_equals_one_bf16_process(references: References, layout: str, tolerance: dict[str, float]) -> None:
    ours = run_ranks(2, rows, references.folder, f"bf16-{layout}", [*f"strategy={layout}".split(), "trainer.devices=2", *BF16])[0]
    found = differences(ours, references(BF16))
    assert all(found[name] < most for name, most in tolerance.items()), found


def test_negative_control_in_bf16(references: References) -> None:
    overrides = ["strategy=fsdp", "trainer.devices=2", *BF16]
    ours = run_ranks(2, rows, references.folder, "bf16-wrong", overrides, True, scale_by_a_hundredth)[0]
    assert differences(ours, references(BF16))["grad_norm"] > 5e-3


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_model_of_the_users_trains_where_no_plan_is_needed(tmp_path: Path, layout: str) -> None:
    text_file(tmp_path)
    own = ["~model", "+model={_target_: jobs.OwnModel}", "allow=[jobs]", "optimizer=adamw", "trainer.max_steps=5", "schedule=constant"]
    tiny = [setting for setting in jobs.TINY if not setting.startswith("model")]
    (one,) = run_ranks(1, own_rows, tmp_path, "one", tiny, own)
    two, _ = run_ranks(2, own_rows, tmp_path, "two", tiny, [*own, f"strategy={layout}", "trainer.devices=2"])
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(one, two, strict=True)) < TOLERANCE
    assert one[-1]["train/loss"] < one[0]["train/loss"]


def own_rows(folder: Path, name: str, tiny: list[str], overrides: list[str]) -> Rows:
    jobs.TINY[:] = tiny
    return run_tiny(folder, name, *overrides)


def test_rows_of_several_steps_are_means_over_all_ranks(references: References) -> None:
    every = "trainer.log_every_n_steps=5"
    reference = references([every])
    for layout in ("ddp", "context", "pipeline"):
        ours = run_ranks(2, rows, references.folder, f"means-{layout}", [f"strategy={layout}", "trainer.devices=2", every])[0]
        assert [r["step"] for r in ours] == [r["step"] for r in reference] == [5, 10]
        assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(ours, reference, strict=True)) < TOLERANCE


def test_accumulation_on_one_process_changes_nothing(references: References) -> None:
    (ours,) = run_ranks(1, rows, references.folder, "four", ["trainer.accumulate_grad_batches=4"])
    found = differences(ours, references([]))
    assert max(found.values()) < TOLERANCE, found


def sum_the_loss_in_the_head() -> None:
    """As where there are many logits."""
    LanguageModelling.large, head.AT_ONCE = 0, 13 * 32  # stretches of 32 tokens


IN_HEAD = [
    ("single", 1, []),
    ("ddp", 2, ["strategy=ddp"]),
    ("fsdp", 2, ["strategy=fsdp"]),
    ("context", 2, ["strategy=context"]),
    ("pipeline", 2, ["strategy=pipeline"]),
    ("tensor", 2, ["strategy=tensor"]),
    ("tensor, the head of BERT", 2, ["strategy=tensor", *MODELS["the head of BERT"]]),
    ("tensor × pipeline, untied", 4, ["strategy=tensor_pipeline", "strategy.microbatches=4", "model.tie_embeddings=false"]),
    ("tensor, logits gathered", 2, ["strategy=tensor", "strategy.loss_parallel=false", "strategy.sequence_parallel=false"]),
]


@pytest.mark.parametrize(("processes", "overrides"), [case[1:] for case in IN_HEAD], ids=[case[0] for case in IN_HEAD])
def test_a_loss_summed_in_the_head_is_that_of_the_logits(references: References, processes: int, overrides: list[str]) -> None:
    check_equal(references, processes, overrides, change=sum_the_loss_in_the_head)


# --- the suite would notice


def scale_by_a_hundredth() -> None:
    for kind in (StepStrategy, strategy.MeshStrategy):
        kind.forward_backward = scaled(kind.forward_backward)


def scaled(forward_backward: Any) -> Any:
    return lambda self, batch, scale, last: forward_backward(self, batch, 1.01 * scale, last)


def mean_of_means() -> None:
    score = LanguageModelling.score

    def means(self: Any, output: Any, batch: dict[str, Any], phase: str) -> Any:
        loss_sum, count = score(self, output, batch, phase)
        return loss_sum / count * 64, count * 0 + 64

    LanguageModelling.score = means


def forget_that_fsdp_averages() -> None:
    strategy.MeshStrategy.averaged_over = 1  # pyright: ignore[reportAttributeAccessIssue]


def forget_the_tied_matrix() -> None:
    pipeline.Pipeline.add_tied = lambda self, tied: None


def clip_by_the_own_stage() -> None:
    strategy.dist = type(
        "dist", (), {"all_reduce": staticmethod(lambda *a, **k: None), "__getattr__": lambda s, n: getattr(torch.distributed, n)}
    )()


def start_every_stretch_at_zero() -> None:
    cut = context.ContextAxis.cut
    context.ContextAxis.cut = lambda self, batch: {**cut(self, batch), "positions": cut(self, batch)["positions"] * 0 + torch.arange(8)}


def keep_the_gains_of_heads_apart() -> None:
    tensor.SequenceParallel = lambda **options: tensor.Replicated()  # pyright: ignore[reportAttributeAccessIssue]


def forget_the_vocabulary_of_other_ranks() -> None:
    sum_the_loss_in_the_head()
    tensor.head_loss = lambda *arguments, **cut: head.head_loss(*arguments)


def reseed_by_rank() -> None:
    first = strategy.fill
    strategy.fill = lambda model, seed, aliases: first(model, seed + torch.distributed.get_rank(), aliases)


CONTROLS = [
    ("ddp", scale_by_a_hundredth),
    ("ddp", mean_of_means),
    ("fsdp", scale_by_a_hundredth),
    ("fsdp", forget_that_fsdp_averages),
    ("fsdp", reseed_by_rank),
    ("tensor", keep_the_gains_of_heads_apart),
    ("tensor", forget_the_vocabulary_of_other_ranks),
    ("context", start_every_stretch_at_zero),
    ("pipeline", scale_by_a_hundredth),
    ("pipeline", forget_the_tied_matrix),
    ("pipeline", clip_by_the_own_stage),
]


@pytest.mark.parametrize(("layout", "mistake"), CONTROLS, ids=[f"{layout}, {mistake.__name__}" for layout, mistake in CONTROLS])
def test_negative_control(references: References, layout: str, mistake: Callable[[], None]) -> None:
    overrides = [f"strategy={layout}", "trainer.devices=2"] + ["strategy.sequence_parallel=false"] * (
        mistake is keep_the_gains_of_heads_apart
    )
    ours = run_ranks(2, rows, references.folder, f"{layout}-{mistake.__name__}", overrides, True, mistake)[0]
    found = differences(ours, references([]))
    assert max(found.values()) > 100 * TOLERANCE, found
