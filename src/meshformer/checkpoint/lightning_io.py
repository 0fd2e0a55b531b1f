"""Lightning's checkpoint dictionary to and from the checkpoint folder of folder.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from .folder import read_rest, read_tensors, write_folder


class FolderCheckpointIO(CheckpointIO):
    """Saves and loads what the Trainer's checkpoint connector hands over; optimizer state is keyed by parameter name on disk.

    The optimizer must have been made from named parameters: its state dict then lists `param_names` in each group.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        rest = dict(checkpoint)
        tensors = dict(rest.pop("state_dict"))
        for optimizer in rest.get("optimizer_states", []):
            tensors.update(_optimizer_tensors(optimizer))
        rest["optimizer_states"] = [{"param_groups": o["param_groups"]} for o in rest.get("optimizer_states", [])]
        write_folder(Path(path), tensors, rest)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint, tensors = read_rest(Path(path)), read_tensors(Path(path))
        checkpoint["state_dict"] = {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}
        for optimizer in checkpoint["optimizer_states"]:
            optimizer["state"] = _optimizer_state(optimizer["param_groups"], tensors)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def _names_by_index(param_groups: list[dict[str, Any]]) -> dict[int, str]:
    return {index: name for group in param_groups for index, name in zip(group["params"], group["param_names"], strict=True)}


def _optimizer_tensors(state_dict: dict[str, Any]) -> dict[str, torch.Tensor]:
    names = _names_by_index(state_dict["param_groups"])
    return {
        f"optimizer.{names[index]}.{key}": torch.as_tensor(value)
        for index, state in state_dict["state"].items()
        for key, value in state.items()
        if value is not None
    }


def _optimizer_state(param_groups: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    indices = {name: index for index, name in _names_by_index(param_groups).items()}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, _, entry = key.removeprefix("optimizer.").rpartition(".")
            state.setdefault(indices[name], {})[entry] = value
    return state
