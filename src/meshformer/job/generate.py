"""`meshformer generate`: samples text from a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meshformer.config.errors import ConfigError
from meshformer.job.evaluate import load_run
from meshformer.model import generate as draw
from meshformer.model import supports_kv_cache
from meshformer.printing import say


def generate(config: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Prints and returns `options["count"]` continuations of `options["prompt"]` by the model of the run folder `options["run"]`."""
    torch.set_num_threads(config["trainer"]["threads"])
    model, tokenizer = load_run(config, Path(options["run"]))
    if not supports_kv_cache(model):  # a user's model
        message = f"its model, {config['model']['_target_']}, cannot continue a text: its forward takes no `cache` of what it has read"
        raise ConfigError(message, "run", options["run"], fix="Load it in a notebook: meshformer.runs.load_model.")
    ids = list(map(int, tokenizer.encode(options["prompt"])))
    if not ids:
        raise ConfigError("the prompt is empty", key="prompt", fix="Give at least one character, for example prompt='The'.")
    prompt_BT = torch.tensor([ids]).expand(options["count"], -1)
    tokens_BT = draw(
        model,
        prompt_BT,
        options["max_tokens"],
        temperature=options["temperature"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        seed=options["seed"],
    )
    try:
        texts = [tokenizer.decode(row.tolist()) for row in tokens_BT]
    except IndexError:
        message = f"the run's tokenizer.json has {tokenizer.vocab_size} tokens, fewer than its model draws from"
        raise ConfigError(message, "run", options["run"], fix="Restore it from a copy.") from None
    say("\n\n---\n\n".join(texts))
    return texts
