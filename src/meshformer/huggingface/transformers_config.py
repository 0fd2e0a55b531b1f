"""model=transformers: the settings of the node and its checks, from config.json and from the source of transformers. Imports no torch.

`inline` puts the contents of config.json into the configuration of the run, so that evaluating or resuming it needs no other folder.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.schema import MISSING
from meshformer.config.signature import attribute
from meshformer.config.suggest import did_you_mean
from meshformer.model.settings import STYLES, SYNONYMS

from .source import CONFIG, is_folder

Config = dict[str, Any]
TARGET = "meshformer.huggingface.transformers_model.TransformersModel"
AUTO = {  # the `objective` of a task -> (Auto class, the table of model types in transformers' source)
    "next": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "mask": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "label": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "tags": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "pairs": ("AutoModel", "MODEL_MAPPING_NAMES"),
}
EXAMPLE = "model.path=FOLDER, or model.config=FOLDER/config.json"
MACHINE = ("torch_dtype", "dtype", "transformers_version", "architectures", "auto_map", "quantization_config")  # facts of the stored weights


def is_transformers(model: Config) -> bool:
    return model.get("_target_") == TARGET


def from_the_folder(config: Config) -> Config:
    """With `model.path`, stage=finetune starts from the weights of that folder unless `stage.init_from` names others."""
    model, stage = config.get("model"), config.get("stage")
    if isinstance(model, dict) and isinstance(stage, dict) and is_transformers(model) and model.get("path") and stage.get("init_from") == MISSING:
        return {**config, "stage": {**stage, "init_from": model["path"]}}
    return config


def inline(config: Config, objective: str) -> Config:
    """Reads the config.json that `model.path` or `model.config` names into the setting `model.config`, and chooses the Auto class by the task.

    With `model.path`, the run starts from the weights of that folder, like `stage.init_from`. ConfigError if there is no such file.
    """
    model, stage = dict(config["model"]), dict(config["stage"])
    if isinstance(model.get("config"), dict):
        model["auto_class"] = _auto_class(model, objective)
        return {**config, "model": model}
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("needs the package transformers", "model", "transformers", fix="Install it: pip install 'meshformer[transformers]'.")
    path, file = model.get("path"), model.get("config")
    if path is None and file is None and stage.get("init_from") is not None and is_folder(Path(stage["init_from"])):
        path = model["path"] = stage["init_from"]
    if path is None and file is None and stage.get("init_from") is not None:
        return config  # a run, whose model command/compose.py adopts
    if (path is None) == (file is None):
        raise ConfigError("needs one of path and config", "model", "transformers", fix=f"Add {EXAMPLE}.")
    key = "model.path" if path is not None else "model.config"
    place = Path(str(path if path is not None else file)).expanduser().absolute()
    found = read(place / CONFIG if path is not None or place.is_dir() else place, key, path if path is not None else file)
    settings = model.get("settings") or {}
    if "num_hidden_layers" in settings:  # a list with an entry for each layer, which transformers makes anew
        found.pop("layer_types", None)
    found |= settings
    if path is not None:
        if stage.get("init_from") not in (None, path):
            raise ConfigError("names other weights than model.path", "stage.init_from", stage["init_from"], fix="Leave one of them out.")
        model["path"] = stage["init_from"] = str(place)
        model["vocab_size"] = found.get("vocab_size") or model.get("vocab_size")
    model |= {"config": found, "settings": {}, "auto_class": _auto_class(model, objective)}
    return {**config, "model": model, "stage": stage}


def _auto_class(model: Config, objective: str) -> str:
    return AUTO[objective][0] if model.get("auto_class") in (None, "auto") else model["auto_class"]


def read(file: Path, key: str, value: Any) -> Config:
    """The settings in a config.json. What it says about stored weights is left out, and so is the code that it may name."""
    if not file.is_file():
        fix = "Name a folder on this machine: `hf download NAME --local-dir FOLDER` fetches a model of the hub."
        raise ConfigError(f"there is no file {file}", key, value, fix=fix)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error})", key, value) from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(kind, str):
        raise ConfigError(f"{file} names no model_type", key, value, fix="Name the config.json of a Hugging Face model.")
    if kind not in model_types():
        code = " (its folder brings code of its own, which is never run)" if found.get("auto_map") else ""
        fix = did_you_mean(kind, model_types())
        raise ConfigError(f"{file} is of model_type {kind!r}, which the installed transformers does not have{code}", key, value, fix=fix)
    if found.get("quantization_config"):
        raise ConfigError(f"{file} belongs to quantised weights, which are no plain numbers", key, value, fix="Use the model as it was before.")
    return {name: setting for name, setting in found.items() if name not in MACHINE and not name.startswith("_")}


def check(config: Config) -> None:
    """ConfigError for a task or an axis of the layout that this kind of model cannot have in transformers."""
    model, strategy = config["model"], config["strategy"]
    if not is_transformers(model):
        return
    if not isinstance(model.get("config"), dict):
        message = "the run to start from has a model of ours"
        raise ConfigError(message, "model", "transformers", fix="Leave it out, or export the run: format=huggingface.")
    settings, kind = model["config"], model["config"]["model_type"]
    if config["data"]["kind"] == "images":
        raise ConfigError("reads tokens, and the data is images", "model", "transformers", fix="Use model=vit_tiny.")
    auto = model["auto_class"]
    table = next((table for name, table in AUTO.values() if name == auto), None)
    if table is None:
        fix = did_you_mean(auto, [name for name, _ in AUTO.values()])
        raise ConfigError("is none of the classes that a task here can train", "model.auto_class", auto, fix=fix)
    if auto == AUTO["next"][0] and _is_encoder(kind) and settings.get("is_decoder") is not True:
        message = f"{kind} sees the next token, so predicting it is trivial"
        fix = "Use task=masked_language_modelling, or 'model.settings={is_decoder: true}'."
        raise ConfigError(message, "task", _task(config), fix=fix)
    if kind not in auto_types(table):
        message = f"transformers has no {auto} for {kind}, which the task needs"
        raise ConfigError(message, "task", _task(config), fix="Use another task or model.")
    length = settings.get("max_position_embeddings") or settings.get("n_positions")
    if isinstance(length, int) and config["data"]["context_length"] > length:
        message = f"the model has positions for {length} tokens (max_position_embeddings in its config.json)"
        raise ConfigError(message, "data.context_length", config["data"]["context_length"], fix=f"Use at most {length}.")
    if config["data"]["packing"] and (auto != AUTO["next"][0] or not _separates_texts(kind)):
        message = f"transformers' {kind} does not keep apart the texts that share a sample"
        raise ConfigError(message, "data.packing", "true", fix="Leave it out, or use a model of ours.")
    if strategy["context"] > 1:
        message = "cuts sequences over processes, and transformers' models attend within one process"
        raise ConfigError(message, "strategy.context", strategy["context"], fix="Use strategy=fsdp or tensor, or a model of ours (stage.init_from).")
    if model.get("plan") is None:
        _check_axes(kind, settings, strategy)


def _is_encoder(kind: str) -> bool:
    """Whether a model that can be asked for next tokens sees both sides unless `is_decoder` is set, as BERT does."""
    return kind in auto_types(AUTO["mask"][1]) and declared(kind, "is_decoder") is False


def _separates_texts(kind: str) -> bool:
    """Whether the model's causal mask is made from `position_ids` too, from which transformers finds where a packed text begins."""
    module = _module(kind)
    source = _source(f"transformers.models.{module}.modeling_{module}")
    made = r"mask_kwargs = \{[^}]*position_ids|(create_causal_mask|mask_function)\([^)]*position_ids"
    return source is not None and re.search(made, source) is not None


def _task(config: Config) -> str:
    return str(config["task"]["_target_"]).rpartition(".")[2]


def _check_axes(kind: str, settings: Config, strategy: Config) -> None:
    """Refuses the axes that transformers declares no plan for."""
    own = "Give one of your own (model.plan), or use strategy=fsdp or ddp."
    if strategy["tensor"] > 1:
        styles = declared(kind, "base_model_tp_plan")
        if not styles:
            raise ConfigError(f"transformers declares no tensor plan for {kind}", "strategy.tensor", strategy["tensor"], fix=own)
        if unknown := sorted(set(styles.values()) - STYLES.keys() - SYNONYMS.keys()):
            message = f"transformers' plan for {kind} needs {', '.join(unknown)}, which is not supported here"
            raise ConfigError(message, "strategy.tensor", strategy["tensor"], fix=own)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if isinstance(size := settings.get(name), int) and size % strategy["tensor"]:
                message = f"the model's {name}={size} does not divide by it"
                raise ConfigError(message, "strategy.tensor", strategy["tensor"], fix="Use another degree, or another model.")
    if strategy["pipeline"] > 1:
        if not declared(kind, "base_model_pp_plan"):
            raise ConfigError(f"transformers declares no pipeline plan for {kind}", "strategy.pipeline", strategy["pipeline"], fix=own)
        layers, stages = settings.get("num_hidden_layers"), strategy["pipeline"] * strategy["stages_per_rank"]
        if isinstance(layers, int) and layers < stages:
            message = f"the model has {layers} blocks, and each of {stages} stages needs one"
            raise ConfigError(message, "strategy.pipeline", strategy["pipeline"], fix="Use fewer stages, or a deeper model.")


# --- facts in the source of transformers


def model_types() -> dict[str, str]:
    """model_type -> the name of its configuration class."""
    return _tables("transformers.models.auto.auto_mappings").get("CONFIG_MAPPING_NAMES", {})


def auto_types(table: str) -> Sequence[str]:
    return list(_tables("transformers.models.auto.modeling_auto").get(table, {}))


def declared(kind: str, name: str) -> Any:
    """A class attribute of the configuration class of a model_type, such as `base_model_tp_plan`."""
    module = _module(kind)
    return attribute(f"transformers.models.{module}.configuration_{module}.{model_types()[kind]}", name)


def _module(kind: str) -> str:
    special = _tables("transformers.models.auto.auto_mappings").get("SPECIAL_MODEL_TYPE_TO_MODULE_NAME", {})
    return special.get(kind, kind.replace("-", "_"))


def _source(module: str) -> str | None:
    """The source of a module of transformers, without importing it."""
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(package.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
    return file.read_text(encoding="utf-8") if file.is_file() else None


@cache
def _tables(module: str) -> dict[str, dict[str, str]]:
    """The module-level `NAME = OrderedDict([(key, value), …])` tables of a module, from its source."""
    tables: dict[str, dict[str, str]] = {}
    for statement in ast.parse(_source(module) or "").body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target if isinstance(statement, ast.AnnAssign) else None
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Call) and value.args and isinstance(value.args[0], ast.List):
            pairs = [item for item in value.args[0].elts if isinstance(item, ast.Tuple) and len(item.elts) == 2]
            plain = [pair.elts for pair in pairs if all(isinstance(element, ast.Constant) for element in pair.elts)]
            tables[target.id] = {ast.literal_eval(key): ast.literal_eval(item) for key, item in plain}
    return tables
