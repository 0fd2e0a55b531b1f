"""What the parts of recorded steps say is wrong, and which setting mends it, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .parts import BACKWARD, BUBBLE, CHECKPOINT, DATA, EXPOSED, FORWARD, HIDDEN, IDLE, OPTIMIZER, SUM, VALIDATION, WAITING, mean

Config = Mapping[str, Any]
Settings = dict[str, Any]  # dotted key -> value
# Shares of a step above which a part is said to be wrong. Compute is what a step is for; the others stand for what well-tuned runs reach.
SHARES = {DATA: 0.05, EXPOSED: 0.1, WAITING: 0.1, BUBBLE: 0.1, CHECKPOINT: 0.05, VALIDATION: 0.2, IDLE: 0.15}
UNEVEN = 1.2  # a pipeline rank's compute over that of the lightest, from which its stage is said to be heavier


class Advice(NamedTuple):
    """`settings` are changes to the run's configuration that `text` recommends, as alternatives; none where no setting helps."""

    part: str
    text: str
    settings: tuple[Settings, ...] = ()


def advise(of_rank: Mapping[int, Mapping[str, float]], config: Config, usable: Callable[[Settings], bool] = lambda settings: True) -> list[Advice]:
    """Advice for the parts above their share of a step, the largest first.

    `of_rank`: rank -> part -> mean milliseconds a step; `config`: the run's resolved configuration; `usable` tells whether the run could start
    with these settings changed. What it refuses is not recommended.
    """
    total = mean(of_rank, SUM)
    found: list[Advice] = []
    for part, rule in RULES.items():
        if total and mean(of_rank, [part]) > SHARES[part] * total:
            found.append(_checked(Advice(part, *rule(of_rank, config, usable)), usable))
    return sorted(found, key=lambda advice: -mean(of_rank, [advice.part]))


def _checked(advice: Advice, usable: Callable[[Settings], bool]) -> Advice:
    kept = tuple(settings for settings in advice.settings if usable(settings))
    return advice._replace(settings=kept)


def sentences(of_rank: Mapping[int, Mapping[str, float]], config: Config, advice: Sequence[Advice]) -> list[str]:
    """The advice as sentences, and what to know before reading the numbers."""
    total = mean(of_rank, SUM)
    told = []
    for one in advice:
        share = mean(of_rank, [one.part])
        tries = " or ".join(_typed(settings) for settings in one.settings)
        told.append(f"{_capital(one.part)}: {share:.1f} of {total:.1f} ms, {share / total:.0%}. {one.text}" + (f" Try {tries}." if tries else ""))
    if not told:
        computing = mean(of_rank, [FORWARD, BACKWARD, OPTIMIZER])
        told.append(f"Nothing stands out: {computing / total:.0%} of a step is forward, backward and optimizer.")
    if config["trainer"].get("accelerator") != "gpu" and mean(of_rank, [EXPOSED, WAITING, HIDDEN, BUBBLE]):
        told.append("On a CPU, transport takes the same cores as compute: hidden communication is not free here, and slows the compute above it.")
    return told


def _typed(settings: Settings) -> str:
    """As on the command line."""

    def text(value: Any) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")

    return " ".join(f"{key}={text(value)}" for key, value in settings.items())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- a rule for each part: its text and settings

Found = tuple[str, tuple[Settings, ...]]


def _data(of_rank: Any, config: Config, usable: Any) -> Found:
    workers = config["data"]["workers"]
    text = "The ranks wait for their batches: load them in more processes, beside the training."
    return text, ({"data.workers": 2 * workers or 2},)


def _exposed(of_rank: Any, config: Config, usable: Any) -> Found:
    strategy, sharded = config["strategy"], config["strategy"]["shard"]
    text = "Compute waits for collectives."
    tries: list[Settings] = []
    if sharded > 1 and strategy["reshard_after_forward"]:
        text += " FSDP gathers every parameter twice a step; kept after the forward pass, once, for more memory."
        tries.append({"strategy.reshard_after_forward": False})
    if sharded >= 4 and sharded % 2 == 0 and strategy["replicate"] == 1 and strategy["name"] == "fsdp":
        text += " hsdp gathers within half of the ranks alone."
        tries.append({"strategy": "hsdp"})
    if strategy["tensor"] > 1:
        tries.append({"strategy.async_tensor_parallel": True})
        text += " Tensor parallel ranks exchange activations in every layer: they belong inside one node, and their number should be small."
    if not tries or not any(map(usable, tries)):
        text += " A larger micro-batch computes more for the same transfers."
        tries.append({"data.batch_size": 2 * config["data"]["batch_size"]})
    return text, tuple(tries)


def _waiting(of_rank: Any, config: Config, usable: Any) -> Found:
    own = (DATA, FORWARD, BACKWARD, OPTIMIZER, CHECKPOINT, IDLE)
    slow = min(of_rank, key=lambda rank: of_rank[rank][WAITING] + of_rank[rank][BUBBLE])
    others = {rank: values for rank, values in of_rank.items() if rank != slow}
    longer = {part: of_rank[slow][part] - mean(others, [part]) for part in own}
    part = max(longer, key=lambda name: longer[name])
    if not others or longer[part] < 0.3 * mean(others, [WAITING]):
        text = "No one rank is the slow one: they take turns, as when processes share cores or samples differ in length."
        packs = config["data"]["kind"] == "texts" and not config["data"]["packing"]
        return text, ({"data.packing": True},) if packs else ()
    text = f"The others wait for rank {slow}: its {part} takes {of_rank[slow][part]:.1f} ms, theirs {mean(others, [part]):.1f}."
    if part == DATA:
        return f"{text} Its batches come late.", ({"data.workers": 2 * config["data"]["workers"] or 2},)
    if part in (FORWARD, BACKWARD) and config["strategy"]["pipeline"] > 1:
        return f"{text} Its stage is heavier: give it fewer blocks with strategy.blocks_per_stage.", _lighter(slow, of_rank, config)
    if part in (FORWARD, BACKWARD):
        return f"{text} Its samples are longer, or its device is slower or shared with other work.", ()
    return text, ({"callbacks.checkpoint.asynchronous": True},) if part == CHECKPOINT else ()


def _lighter(slow: int, of_rank: Any, config: Config) -> tuple[Settings, ...]:
    """One block moved from the slow rank's stage to the lightest one, where the present numbers are known."""
    blocks: list[int] = list(config["strategy"]["blocks_per_stage"] or ())
    ranks = len(of_rank)
    pipeline = config["strategy"]["pipeline"]
    if len(blocks) != pipeline or ranks % pipeline:
        return ()
    per_stage = ranks // pipeline  # the pipeline is the outermost axis
    compute = [
        mean({rank: of_rank[rank] for rank in range(stage * per_stage, (stage + 1) * per_stage)}, [FORWARD, BACKWARD]) for stage in range(pipeline)
    ]
    heavy, light = slow // per_stage, compute.index(min(compute))
    if heavy == light or blocks[heavy] < 2:
        return ()
    blocks[heavy], blocks[light] = blocks[heavy] - 1, blocks[light] + 1
    return ({"strategy.blocks_per_stage": blocks},)


def _bubble(of_rank: Any, config: Config, usable: Any) -> Found:
    strategy = config["strategy"]
    stages, count = strategy["pipeline"], strategy["microbatches"]
    rounds = count * strategy["stages_per_rank"]
    ideal = (stages - 1) / (rounds + stages - 1)
    text = f"With {count} micro-batches through {stages} ranks, {ideal:.0%} of the passes' time is idle even if all stages cost the same."
    more = next((n for n in range(2 * count, 8 * count + 1, stages) if usable({"strategy.microbatches": n})), None)
    tries: list[Settings] = [{"strategy.microbatches": more}] if more else []
    if not strategy["schedule"].startswith("interleaved"):
        blocks: Settings = {"strategy.blocks_per_stage": None} if strategy["blocks_per_stage"] else {}  # they are for another number of stages
        tries.append({"strategy.schedule": "interleaved_1f1b", "strategy.stages_per_rank": 2} | blocks)
    if not more:
        tries.append({"data.batch_size": 2 * config["data"]["batch_size"], "strategy.microbatches": 2 * count})
    compute = {rank: mean({rank: values}, [FORWARD, BACKWARD]) for rank, values in of_rank.items()}
    slow = max(compute, key=lambda rank: compute[rank])
    if compute[slow] > UNEVEN * min(compute.values()):
        text += f" Rank {slow} computes {compute[slow]:.1f} ms and the lightest {min(compute.values()):.1f}: see strategy.blocks_per_stage."
        tries += _lighter(slow, of_rank, config)
    return text, tuple(tries)


def _checkpoint(of_rank: Any, config: Config, usable: Any) -> Found:
    saving = (config.get("callbacks") or {}).get("checkpoint") or {}
    if saving.get("asynchronous"):
        return "Copying to the host's memory takes this long even in the background: save less often.", _rarer(saving)
    return "The ranks wait until a checkpoint is written.", ({"callbacks.checkpoint.asynchronous": True}, *_rarer(saving))


def _rarer(saving: Config) -> tuple[Settings, ...]:
    every = saving.get("every_n_steps")
    return ({"callbacks.checkpoint.every_n_steps": 10 * every},) if isinstance(every, int) else ()


def _validation(of_rank: Any, config: Config, usable: Any) -> Found:
    every = config["trainer"]["val_check_interval"]
    return "Recorded steps were validated: look whether that happens too often.", ({"trainer.val_check_interval": 5 * every},)


def _idle(of_rank: Any, config: Config, usable: Any) -> Found:
    larger: Settings = {"data.batch_size": 2 * config["data"]["batch_size"]}
    accumulate = config["trainer"]["accumulate_grad_batches"]
    if accumulate > 1 and accumulate % 2 == 0:
        larger = {"trainer.accumulate_grad_batches": accumulate // 2}
    if config["trainer"].get("accelerator") != "gpu":
        return "This is Python outside of forward, backward and optimizer; a larger micro-batch makes its share smaller.", (larger,)
    text = "The GPU waits while the host launches kernels that are too short (launch-bound): compile the blocks, or give each kernel more work."
    return text, (*([] if config["trainer"]["compile"] else [{"trainer.compile": True}]), larger)


RULES: dict[str, Callable[[Any, Config, Any], Found]] = {
    DATA: _data, EXPOSED: _exposed, WAITING: _waiting, BUBBLE: _bubble, CHECKPOINT: _checkpoint, VALIDATION: _validation, IDLE: _idle,
}  # fmt: skip


def compared(total: float, record: Mapping[str, Any]) -> Iterator[str]:
    """A sentence if `meshformer plan` predicted the step's time, which run.json then records; `total` in ms."""
    plan = record.get("plan")
    predicted = plan.get("predicted_step_seconds") if isinstance(plan, Mapping) else None
    if isinstance(predicted, int | float) and predicted > 0:
        yield f"plan predicted {1e3 * predicted:.1f} ms a step; recorded were {total:.1f} ms, {total / (1e3 * predicted) - 1:+.0%}."
