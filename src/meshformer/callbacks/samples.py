"""Writes sample texts of the model after validation: continuations of a prompt, or what the task shows of itself."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from meshformer.callbacks.media import log_text
from meshformer.config.errors import ConfigError
from meshformer.model import generate, supports_kv_cache


class Samples(Callback):
    """RUN/samples/step-….txt: a continuation of `prompt` after every `every_n_validations`th validation, also in the loggers. State: none."""

    def __init__(
        self, prompt: str = "\n", every_n_validations: int = 1, max_tokens: int = 200, temperature: float = 0.8, top_p: float = 0.95
    ):
        self.prompt, self.every_n_validations, self.max_tokens = prompt, every_n_validations, max_tokens
        self.temperature, self.top_p = temperature, top_p
        self.folder: Any = None  # set by job/build.py: RUN/samples
        self._validations = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        if pl_module.writes_text:
            text = continuation(
                pl_module, trainer.datamodule.tokenizer, self.prompt, self.max_tokens, temperature=self.temperature, top_p=self.top_p
            )
        else:
            text = pl_module.sample_text() if hasattr(pl_module, "sample_text") else None
        if text is not None and self.folder is not None and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"step-{trainer.global_step:08d}.txt").write_text(text, encoding="utf-8")
            log_text(trainer.loggers, "samples/continuation" if pl_module.writes_text else "samples/transcripts", text, trainer.global_step)


def continuation(task: Any, tokenizer: Any, prompt: str, max_tokens: int, **options: Any) -> str | None:
    """`prompt` and its continuation by the task's model; None for a model that cannot generate, and on every rank except 0.

    If the prompt is empty or unknown to the tokenizer, token 0 is used instead, since a sample must not end a run. A collective: if the model is
    sharded, rank 0 gathers it."""
    model = whole_model(task) if supports_kv_cache(task.model) else None
    if model is None or getattr(model, "head", True) is None:
        return None
    try:
        ids = tokenizer.encode(prompt) if prompt else [0]
    except ConfigError:
        ids = [0]
    prompt_BT = torch.as_tensor([list(map(int, ids)) or [0]], device=next(model.parameters()).device)
    # Generates under the precision of training (for example bf16 autocast), and in eager mode: a compiled block would recompile for each
    # length of the cache.
    with task.trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        out_BT = generate(model, prompt_BT, max_tokens, **options)
    return tokenizer.decode(out_BT[0].tolist())


def whole_model(task: Any) -> Any:
    """On rank 0 the task's model, or an unsharded copy on the CPU if it is sharded; None on the other ranks. A collective."""
    if task.trainer.strategy.holds_whole_model:
        return task.model if task.trainer.is_global_zero else None
    weights = task.trainer.strategy.whole_weights()
    if weights is None:
        return None
    with torch.device("meta"):
        model = task.make_model()
    model.load_state_dict(weights, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model
