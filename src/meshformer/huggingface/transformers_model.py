"""The models of the transformers library under this package's tasks and layouts.

Their Plan is read in transformers_plan.py, so parallel/ treats them like any other model.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from meshformer.compat.transformers import as_stored, draw_parameters
from meshformer.config.errors import ConfigError
from meshformer.model.draw import normal
from meshformer.model.layout import blocks_name, retie, ties
from meshformer.model.meta_device import allocate, parameters_on_meta

from .check import KEEPS_ALL
from .conv1d import LoraConv1D
from .source import header, listed, model_files
from .transformers_config import AUTO
from .transformers_plan import NET, plan_for

transformers.logging.set_verbosity_error()
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "position_ids")  # buffers that older folders store
LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names in folders of the first versions


class TransformersModel(nn.Module):
    """A model of transformers, built from the contents of a config.json by an Auto class, with the arguments and outputs of our own models.

    Args:
        config: the settings in config.json. Code that a folder brings along is never run.
        auto_class: AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification or AutoModel;
            auto: the first.
        path: the folder of the weights. Only recorded here: the weights are loaded like those of `stage.init_from`.
        settings: replace settings of config.json, for example `num_hidden_layers`; command/compose.py has merged them into `config`.
        vocab_size, outputs: tokens and classes of the data; None: those of `config`.
        context_length: tokens that generation keeps in view.

    `model.plan` in the configuration replaces the plan that transformers declares; its names begin with `net.`.
    """

    plan: Any = None
    head_parameters: Sequence[str] = ()  # patterns of the parameters that a task with a head of its own draws anew

    def __init__(
        self,
        config: dict[str, Any] | str | None = None,
        auto_class: str = "auto",
        path: str | None = None,
        settings: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        outputs: int | None = None,
        context_length: int = 1024,
        seed: int = 0,
    ):
        super().__init__()
        if not isinstance(config, dict):
            raise ValueError("config must be the contents of a config.json")
        auto_class = AUTO["next"][0] if auto_class == "auto" else auto_class
        given = _settings(config, vocab_size, outputs)
        on_meta = torch.empty(0).is_meta
        with torch.device("cpu"), parameters_on_meta():
            self.net: Any = getattr(transformers, auto_class).from_config(given, dtype=torch.float32)
        if auto_class == AUTO["pairs"][0] and isinstance(getattr(self.net, "pooler", None), nn.Module):
            self.net.pooler = None  # its output is not used, and DDP waits for the gradient of every parameter
        text = given.get_text_config()
        self.context_length, self.vocab_size = context_length, text.vocab_size
        self.n_heads = getattr(text, "num_attention_heads", 1)
        self.n_kv_heads = getattr(text, "num_key_value_heads", None) or self.n_heads
        self.d_model = getattr(text, "hidden_size", 0)
        self._cache = "cache" if "cache" in inspect.signature(self.net.forward).parameters else "past_key_values"
        self._classifies = auto_class in (AUTO["label"][0], AUTO["tags"][0])
        prefix = self.net.base_model_prefix
        self._base = prefix if hasattr(self.net, prefix) else ""
        self._pools = auto_class == AUTO["label"][0] and isinstance(getattr(self.net, "score", None), nn.Linear)
        heads = [name for name, _ in self.net.named_children() if self._base and name != self._base]
        self.head_parameters = (*(f"{NET}{name}.*" for name in heads), f"{NET}{self._base}.pooler.*")
        self.plan = plan_for(self.net)
        self._draw = OwnRule(auto_class, given)
        if not on_meta:
            tied = ties(self)
            allocate(self, torch.device("cpu"))
            retie(self, tied)
            self.initialise(seed)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Logits (B, T, V) or (B, T, K); (B, K) of a model for sequence classification, (B, T, C) of one without a head.

        `documents_BT`: negative for padding. With `positions_BT`, the texts of a packed sample are kept apart by positions that start at 0 again.
        `cache`: see `make_cache`.
        """
        given: dict[str, Any] = {"input_ids": tokens_BT}
        if cache is not None:
            given |= {self._cache: cache, "use_cache": True}
        if positions_BT is not None:
            given["position_ids"] = positions_BT
        elif documents_BT is not None:
            given["attention_mask"] = (documents_BT >= 0).long()
        if not self._pools:
            output = self.net(**given)
            return output.logits if "logits" in output else output.last_hidden_state
        logits_BTK = self.net.score(getattr(self.net, self._base)(**given).last_hidden_state)
        if documents_BT is None:
            return logits_BTK[:, -1]
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        last_B = ((documents_BT >= 0) * places_T).argmax(-1)
        return logits_BTK[torch.arange(len(last_B), device=last_B.device), last_B]

    def make_cache(self) -> Any:
        """An empty cache of keys and values, as transformers keeps it, for `generate`."""
        return transformers.DynamicCache(config=self.net.config)

    def tie_weights(self) -> None:
        self.net.tie_weights()

    # --- initial weights

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draws every parameter in place."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_value(name, parameter.shape, seed))

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The initial value of the parameter `name`, by the model's own rule in transformers. It depends on (seed, name) only, so every layout starts
        from the same weights. Block by block, each process draws all of a block and keeps its share."""
        if name.endswith("lora_A"):
            turned = isinstance(self.get_submodule(name.rpartition(".")[0]), LoraConv1D)
            return normal(shape, 1 / math.sqrt(shape[0 if turned else 1]), f"{seed}/{name}")
        if name.endswith("lora_B"):
            return torch.zeros(shape)
        return self._draw.value(name.removeprefix(NET), seed)

    # --- weights of a folder

    def foreign_tensors(self, folder: Path) -> Mapping[str, Tensor]:
        """The tensors of a Hugging Face folder under the names of this model, as memory-mapped views.

        Heads of other tasks, poolers and stored buffers are left out. Other tensors that the model lacks are included under their own names, so
        that the caller refuses them.
        """
        own, found, extra = set(self.net.state_dict()), {}, {}
        for file in model_files(folder):
            opened = safe_open(file, framework="pt")
            for stored in header(file)[0]:
                name = next((name for name in self._candidates(stored) if name in own), None)
                if name is not None:
                    found[name] = opened.get_tensor(stored)
                elif not self.may_drop(stored):
                    extra[stored] = opened.get_tensor(stored)
        missing = [name for name, _ in self.net.named_parameters() if name not in found and not self._of_head(name)]
        if extra or missing:
            found, extra = self._converted(folder) or (found, extra)
        return {f"{NET}{name}": x for name, x in {**found, **extra}.items()}

    def _candidates(self, stored: str) -> tuple[str, ...]:
        """The names that a stored tensor may have in this model: folders of a model without a head lack the prefix, and the other way round."""
        for old, new in LEGACY.items():
            stored = stored.replace(old, new)
        prefix = self.net.base_model_prefix
        return stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")

    def may_drop(self, stored: str) -> bool:
        """Whether a tensor that this model lacks is a buffer, a pooler or the head of another task, of a folder or of a run."""
        stored = stored.removeprefix(NET)
        buffers = {name for name, _ in self.net.named_buffers()}
        if "pooler" in stored.split(".") or buffers & set(self._candidates(stored)) or stored.endswith(BUFFERS):
            return True
        body = getattr(self.net, self._base) if self._base else self.net
        return stored.partition(".")[0] not in {self.net.base_model_prefix, *(name for name, _ in body.named_children())}

    def _of_head(self, name: str) -> bool:
        """Whether a parameter belongs to a new head, which no folder needs to hold."""
        return self._classifies and any(fnmatchcase(f"{NET}{name}", pattern) for pattern in self.head_parameters)

    def _converted(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The weights as transformers converts them while loading, for folders that store them in another form (experts one by one, say). Each
        process then reads the whole model. None if that does not fill the model either."""
        net, report = type(self.net).from_pretrained(
            folder, config=self.net.config, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        if report["unexpected_keys"] or any(not self._of_head(name) for name in report["missing_keys"]):
            return None
        return {name: x for name, x in net.state_dict().items() if name not in report["missing_keys"]}, {}


def stored_form(model: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(contents of config.json, tensors to store) of the model node `model` of this class, as `from_pretrained` reads them. ConfigError names each
    weight that the class lacks, and each one that is missing."""
    with torch.device("meta"):
        built = TransformersModel(**{name: value for name, value in model.items() if not name.startswith("_") and name != "plan"})
    own, tied = dict(built.net.named_parameters(remove_duplicate=False)), ties(built.net)
    stored = {name.removeprefix(NET): x for name, x in weights.items()}
    if wrong := sorted((stored.keys() ^ own.keys()) - tied.keys()):
        raise ConfigError(f"the weights and {type(built.net).__name__} do not both have {listed(wrong)}", "format", "huggingface", fix=KEEPS_ALL)
    tensors = {name: x.contiguous() for name, x in as_stored(built.net, {n: x for n, x in stored.items() if n not in tied}).items()}
    config = {**built.net.config.to_dict(), "architectures": [type(built.net).__name__]}
    types = {str(x.dtype).removeprefix("torch.") for x in tensors.values()}
    return config | ({"dtype": types.pop()} if len(types) == 1 else {}), tensors


class OwnRule:
    """The initial values of a transformers model, by its own rule: those of a block, or of another module's own parameters, at a time."""

    def __init__(self, auto_class: str, settings: Any):
        with torch.device("cpu"), parameters_on_meta():
            self.net: Any = getattr(transformers, auto_class).from_config(settings, dtype=torch.float32)
        self.blocks = blocks_name(self.net)
        self.held: tuple[Any, dict[str, Tensor]] = (None, {})  # ((module, seed), its drawn parameters by name)

    def value(self, name: str, seed: int) -> Tensor:
        key = (self._unit(name), seed)
        if self.held[0] != key:
            self.held = (key, self._drawn(*key))
        return self.held[1][name]

    def _unit(self, name: str) -> str:
        return self._block(name) or name.rpartition(".")[0]

    def _block(self, name: str) -> str | None:
        inside = f"{self.blocks}."
        return inside + name.removeprefix(inside).partition(".")[0] if self.blocks and name.startswith(inside) else None

    def _drawn(self, unit: str, seed: int) -> dict[str, Tensor]:
        part = copy.deepcopy(self.net.get_submodule(unit))
        part.to_empty(device="cpu", recurse=self._block(unit) is not None)  # what stays on the meta device takes no memory and is not drawn
        digest = hashlib.sha256(f"{seed}/{unit}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            draw_parameters(self.net, part)
        prefix = f"{unit}." if unit else ""
        return {prefix + name: parameter.detach() for name, parameter in part.named_parameters() if not parameter.is_meta}


def _settings(config: Mapping[str, Any], vocab_size: int | None, outputs: int | None) -> Any:
    """transformers' configuration object. Token ids of a larger vocabulary (the end of a text, say) are dropped."""
    given = dict(config)
    if vocab_size is not None:
        given["vocab_size"] = vocab_size
        for key, value in config.items():
            if key.endswith("_token_id") and isinstance(value, int) and value >= vocab_size:
                given[key] = None
    kind = given.pop("model_type")
    try:
        made = transformers.AutoConfig.for_model(kind, **given)
    except Exception as error:  # its own checks raise classes of several libraries
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"transformers refuses these settings of {kind}: {told[-1].strip()}", "model.config") from error
    if outputs is not None:
        made.num_labels = outputs
    made.use_cache = False
    return made
