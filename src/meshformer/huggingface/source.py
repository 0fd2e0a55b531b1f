"""What a path holds that weights can be loaded from, and the settings of its model. Reads config files and the headers of safetensors files,
never the weights, and imports no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError, safe_open

from meshformer.checkpoint.find import WEIGHTS
from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.config.suggest import did_you_mean

from . import bert, gpt2, llama, pinned, vit, whisper
from .parts import Model, Part, complete

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LAYOUTS: tuple[ModuleType, ...] = (gpt2, llama, bert, vit, whisper)
ADAPTER, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # in a folder that peft wrote
OF_THE_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
ONE_FILE, TOKENIZER = "model.safetensors", "tokenizer.json"
READ = "; ".join(f"{layout.NAME} ({', '.join(layout.TYPES)})" for layout in LAYOUTS)
SHOWN = 6  # tensors named in a message


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder, from its config.json and the headers of its files."""

    path: Path
    layout: ModuleType
    model: Model
    parts: dict[str, Part]  # for each of our parameters, the stored tensor that holds it
    files: dict[str, tuple[Path, str]]  # canonical name: (file, name in the file)
    copies: list[tuple[str, tuple[Path, str]]]  # (canonical name, a second tensor that must be equal to it, since only one is loaded)
    unknown: list[str]  # stored names that our model has no parameter for


def is_folder(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder, complete or not. A run folder is none: its configuration is config.yaml."""
    if not path.is_dir() or (path / "config.yaml").is_file():
        return False
    return (
        any((path / name).is_file() for name in (CONFIG, INDEX)) or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    )


def derive(path: str | Path, cache: Path | None = None) -> Model:
    """The settings of the model whose weights `path` holds, as a node of conf/model/: arguments of the class that `_target_` names.

    `path`: as for `load_pretrained`. ConfigError when it holds no model that can be read.
    """
    path = find(path, cache)
    if is_folder(path):
        return dict(read_folder(path).model)
    if path.suffix == WEIGHTS:
        return _of_export(path)
    file = run_of(path) / "config.yaml"
    if not file.is_file():
        fix = "Keep it in checkpoints/ of its run, or export it: meshformer export format=safetensors."
        raise ConfigError(f"{path} lies in no run, so the model it belongs to is not known", fix=fix)
    return read_config(file.parent)["model"]


def find(path: str | Path, cache: Path | None = None) -> Path:
    """The file or folder at `path`. Where there is none, the name of a pinned package means its folder in the cache."""
    place = Path(path).expanduser()
    if place.exists():
        return place.absolute()
    if str(path) in pinned.MODELS:
        return pinned.folder(str(path), cache)
    nearby = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    raise ConfigError(
        f"there is no file or folder {path}, and no such pretrained model", fix=did_you_mean(str(path), [*pinned.MODELS, *nearby])
    )


def tokenizer_of(path: Path) -> Path | None:
    """The tokenizer.json of the weights at `path`: in the run or folder, or beside the file. None where there is none."""
    path = Path(path)
    places = [run_of(path)] if path.suffix != WEIGHTS else [path.parent, path.parent.parent]  # RUN/exports/step-….safetensors
    return next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)


def read_folder(path: Path) -> Source:
    """What a Hugging Face folder holds. ConfigError with the first reason why it cannot be read."""
    if (path / ADAPTER_FILE).is_file() or ((path / ADAPTER).is_file() and not (path / CONFIG).is_file()):
        base = _json(path / ADAPTER, "").get("base_model_name_or_path") if (path / ADAPTER).is_file() else None
        fix = "Merge it first: with peft, model.merge_and_unload().save_pretrained(folder)."
        raise ConfigError(f"{path} holds an adapter, which changes another model's weights{f' ({base})' if base else ''}", fix=fix)
    config = _json(path / CONFIG, "a Hugging Face model folder has one beside its weights")
    kind = config.get("model_type")
    layout = next((layout for layout in LAYOUTS if kind in layout.TYPES), None)
    if layout is None:
        what = f"is of the architecture {kind!r}" if kind else "names no model_type in its config.json"
        raise ConfigError(f"{path} {what}", fix=f"These are read: {READ}. Of other architectures model=transformers may know more.")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method") if isinstance(config["quantization_config"], dict) else None
        fix = "Fetch the model as it was before, or write it anew with transformers: model.dequantize().save_pretrained(folder)."
        raise ConfigError(f"{path} holds quantised weights{f' ({method})' if method else ''}, which are no plain numbers", fix=fix)
    files, copies = _stored(path, layout)
    try:
        model = layout.settings(config, set(files))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", fix=error.fix) from None
    parts = layout.parts(complete(model))
    needed = {part.name for part in parts.values()}
    if missing := [name for name in dict.fromkeys(part.name for part in parts.values()) if name not in files]:
        raise ConfigError(f"{path} lacks {listed(missing)}, which a {layout.NAME} of its config.json has")
    _check_vocabulary(path, model, parts, files)
    spare = {name: place for name, place in files.items() if name not in needed and not layout.LEFT_OUT.fullmatch(name)}
    copies = [(name, place) for name, place in copies if name in needed or name in spare]
    copies += [(layout.TIED[name], place) for name, place in spare.items() if layout.TIED.get(name) in needed]
    unknown = sorted(stored for name, (_, stored) in spare.items() if layout.TIED.get(name) not in needed)
    return Source(path, layout, model, parts, files, copies, unknown)


def _check_vocabulary(path: Path, model: Model, parts: dict[str, Part], files: dict[str, tuple[Path, str]]) -> None:
    """ConfigError where the embedding has another number of rows than config.json says: tokens were added to it."""
    part = parts.get("embedding.tokens.weight")
    if part is None or model.get("vocab_size") is None:
        return
    file, stored = files[part.name]
    rows = header(file)[0][stored][0]
    if rows != model["vocab_size"]:
        message = f"the embedding in {path} has {rows} rows, and its config.json says vocab_size={model['vocab_size']}"
        raise ConfigError(message, fix=f"If tokens were added to it, write vocab_size={rows} into {path / CONFIG}.")


def _stored(path: Path, layout: ModuleType) -> tuple[dict[str, tuple[Path, str]], list[tuple[str, tuple[Path, str]]]]:
    """{canonical name: (file, stored name)}, and the tensors that have the same canonical name as an earlier one."""
    found: dict[str, tuple[Path, str]] = {}
    again: list[tuple[str, tuple[Path, str]]] = []
    for file in model_files(path):
        for stored in header(file)[0]:
            name = layout.canonical(stored)
            if name in found:
                again.append((name, (file, stored)))
            found.setdefault(name, (file, stored))
    return found, again


def model_files(path: Path) -> list[Path]:
    """The files that hold the model. ConfigError where the folder has further model files, since it is not clear which ones are meant."""
    files = _files_named(path)
    if others := sorted(p.name for p in path.glob("*.safetensors") if OF_THE_MODEL.fullmatch(p.name) and p not in files):
        why = f"which {INDEX} does not name" if (path / INDEX).is_file() else "and no index says that they belong together"
        message = f"{path} holds {listed(others)} beside {listed([file.name for file in files])}, {why}"
        raise ConfigError(message, fix="Remove what does not belong to the model.")
    return files


def _files_named(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        index = _json(path / INDEX, "").get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ConfigError(f"{path / INDEX} names no tensors: it is damaged")
        names = sorted(set(index.values()))
        if missing := [name for name in names if Path(name).name != name or not (path / name).is_file()]:
            raise ConfigError(
                f"{path} lacks {listed(missing)} of the {len(names)} files that its index names", fix="Fetch the whole folder."
            )
        return [path / name for name in names]
    if (path / ONE_FILE).is_file():
        return [path / ONE_FILE]
    if shards := sorted(path.glob("model-*-of-*.safetensors")):
        raise ConfigError(f"{path} lacks {INDEX}, which belongs to {shards[0].name}", fix="Fetch the whole folder.")
    if pickles := sorted(path.glob("pytorch_model*.bin")):
        fix = "Write it anew with transformers: model.save_pretrained(folder, safe_serialization=True)."
        raise ConfigError(f"{path} holds {pickles[0].name}, a pickle that could run anything, and no {ONE_FILE}", fix=fix)
    raise ConfigError(f"{path} holds no {ONE_FILE}")


def header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """({tensor: shape}, metadata) of a safetensors file. ConfigError when it is damaged or cut off."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error})", fix="Fetch it again.") from error


def _of_export(path: Path) -> Model:
    about = header(path)[1]
    if "model" not in about:
        fix = "Name the folder it lies in." if (path.parent / CONFIG).is_file() else "Name a file that `meshformer export` made."
        raise ConfigError(f"{path} does not say what model its weights belong to", fix=fix)
    try:
        model = json.loads(about["model"])
    except ValueError:
        model = None
    if not isinstance(model, dict):
        raise ConfigError(f"{path} is damaged: it does not say what model its weights belong to")
    return model


def _json(file: Path, wanted: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} holds no {file.name}", fix=wanted[:1].upper() + wanted[1:]) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is damaged: it holds no settings")
    return found


def listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
