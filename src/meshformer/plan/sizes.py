"""The sizes of a model that its cost depends on, from its settings alone, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.signature import attribute
from meshformer.model.settings import feed_forward_width


@dataclass(frozen=True)
class Sizes:
    """A Transformer of equal blocks. `width` C, `heads`, `key_width` (of all key heads together), `feed_forward` F, `length` T."""

    layers: int
    width: int
    heads: int
    head_width: int
    key_width: int
    feed_forward: int
    gated: bool
    vocabulary: int
    tied: bool
    length: int
    causal: bool = True
    window: int | None = None
    position_table: int = 0  # parameters

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @cached_property
    def products(self) -> tuple[tuple[int, int, bool], ...]:
        """(outputs, inputs, cut by columns) of each matrix product of a block; tensor parallelism cuts the outputs, or else the inputs."""
        C, F = self.width, self.feed_forward
        up = ((2 if self.gated else 1) * F, C, True)
        return ((self.query_width + 2 * self.key_width, C, True), (C, self.query_width, False), up, (C, F, False))

    @cached_property
    def block_parameters(self) -> int:
        return sum(outputs * inputs for outputs, inputs, _ in self.products)

    @cached_property
    def parameters(self) -> int:
        """All but norms and biases, which are less than a thousandth."""
        return self.layers * self.block_parameters + (1 if self.tied else 2) * self.vocabulary * self.width + self.position_table

    @property
    def keys_seen(self) -> float:
        """Keys that a query attends to, on average."""
        seen = self.length / 2 if self.causal else float(self.length)
        return seen if self.window is None else min(seen, float(self.window))

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward, without recomputation; a causal mask halves the attention."""
        head = self.vocabulary * self.width
        return 3 * (2 * (self.layers * self.block_parameters + head) + 4 * self.layers * self.query_width * self.keys_seen)


def read_sizes(config: dict[str, Any]) -> Sizes:
    """The sizes of a composed configuration's model. Raises ConfigError if the model does not have the usual settings or lacks one."""
    model, data = config["model"], config["data"]
    if not attribute(model["_target_"], "usual_settings"):
        message = "`plan` predicts models with the settings of meshformer.model.Transformer, and this one does not declare them (usual_settings)"
        raise ConfigError(message, "model._target_", model["_target_"], fix="Plan for a Transformer of the same size.")
    for key in ("n_layers", "n_heads", "d_model"):
        if not isinstance(model.get(key), int):
            raise ConfigError("needs a value", f"model.{key}", fix=f"Add model.{key}=… to the command.")
    width, heads = model["d_model"], model["n_heads"]
    head_width = model.get("head_dim") or width // heads
    vocabulary = model.get("vocab_size") or (data["vocab_size"] if data["tokenizer"] == "bpe" else CHARACTERS)
    table = attribute(str(model.get("position", {}).get("_target_", "")), "has_table", False)
    length = data["context_length"]
    return Sizes(
        layers=model["n_layers"],
        width=width,
        heads=heads,
        head_width=head_width,
        key_width=(model.get("n_kv_heads") or heads) * head_width,
        feed_forward=model.get("d_ff") or feed_forward_width(width, model.get("activation", "")),
        gated=model.get("activation") == "swiglu",
        vocabulary=vocabulary,
        tied=bool(model.get("tie_embeddings", True)),
        length=length,
        causal=bool(model.get("causal", True)),
        window=model.get("window"),
        position_table=length * width if table else 0,
    )


CHARACTERS = 100  # about what an English text has; the tokenizer counts its own once the text is read
