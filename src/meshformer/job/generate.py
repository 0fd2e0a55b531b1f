"""`meshformer generate`: samples text from a run's model, or turns recordings into text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from meshformer.config.errors import ConfigError
from meshformer.data import Features
from meshformer.data.audio import BadClip, read_audio
from meshformer.data.speech import FRAMES_A_SECOND
from meshformer.job.build import build_task
from meshformer.job.evaluate import load_run
from meshformer.model import generate as draw
from meshformer.model import supports_kv_cache
from meshformer.printing import say
from meshformer.tasks import transcribe


def generate(config: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Prints and returns `options["count"]` continuations of `options["prompt"]` by the model of the run folder `options["run"]`."""
    torch.set_num_threads(config["trainer"]["threads"])
    model, tokenizer = load_run(config, Path(options["run"]))
    if config["data"]["kind"] == "speech":
        return _transcripts(config, options, model, tokenizer)
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


def _transcripts(config: dict[str, Any], options: dict[str, Any], model: Any, tokenizer: Any) -> list[str]:
    """Prints and returns the text of each recording of `options["audio"]`."""
    data = config["data"]
    task: Any = build_task(config, max_steps=1)
    given = options["audio"]
    files = [Path(os.path.expanduser(name)) for name in ([given] if isinstance(given, str) else given)]
    features = Features(data["sample_rate"], data["mels"], data["scaling"])
    longest = config["model"]["context_length"] * data["frames_per_token"] / FRAMES_A_SECOND
    if not hasattr(task, "text_of"):
        raise ConfigError("its task turns no sound into text", "run", options["run"], fix="Load it in a notebook: meshformer.runs.load_model.")
    sounds = []
    for file in files:  # all are read before the first is printed
        try:
            sounds.append(features.of(read_audio(file, data["sample_rate"], longest)))
        except BadClip as why:
            raise ConfigError(f"{file} {why}", "audio", fix="Cut it into pieces." if "lasts" in str(why) else None) from None
    texts = transcribe(task, model, tokenizer, sounds, data["frames_per_token"])
    for file, text in zip(files, texts, strict=True):
        say(text if len(files) == 1 else f"{file}\t{text}")
    return texts
