"""Optimizer state by parameter name: to tensors, and back into the optimizer of any other layout.

The optimizer must have been made from named parameters: its state dict then lists `param_names` in each group. The numbers that a state dict
gives to parameters ("params") depend on the layout, since a pipeline rank has only some of the parameters, so they are never compared between
two state dicts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshformer.config.errors import ConfigError

from .read import read_into, tensor_sizes

Groups = list[dict[str, Any]]  # `param_groups` of a state dict: settings, "params" (numbers) and "param_names"
PREFIX = "optimizer."


def optimizer_tensors(optimizer: Optimizer, skip: Collection[str] = ()) -> dict[str, Tensor]:
    """{"optimizer.<name>.<entry>": tensor} of the optimizer's whole state, without the parameters in `skip`."""
    return state_tensors(optimizer.state_dict(), skip)


def state_tensors(state_dict: dict[str, Any], skip: Collection[str] = ()) -> dict[str, Tensor]:
    """The same from an optimizer's state dict."""
    names = names_by_number(state_dict["param_groups"])
    return {
        f"{PREFIX}{names[number]}.{entry}": torch.as_tensor(value)
        for number, state in state_dict["state"].items()
        for entry, value in state.items()
        if value is not None and names[number] not in skip
    }


def read_optimizer(path: Path, optimizer: Optimizer, saved_groups: Groups, aliases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A state dict for `optimizer.load_state_dict`, from a checkpoint that any layout wrote. Processes do not communicate.

    State is found by parameter name; `aliases` is {own name: name in the checkpoint} where the two differ. A state tensor of the parameter's
    shape is sharded like the parameter; any other (`step`) is read whole. A parameter without saved state, which never had a gradient, gets
    none. Settings (learning rates, betas …) come from `saved_groups`, the `param_groups` in the checkpoint's rest: in every layout the
    optimizer has the same groups in the same order. ConfigError when the checkpoint's optimizer has another number of groups.
    """
    groups = optimizer.state_dict()["param_groups"]
    if len(groups) != len(saved_groups):
        raise ConfigError(
            f"the optimizer in {path} has {len(saved_groups)} parameter groups, this one {len(groups)}",
            "optimizer",
            fix="Use the run's optimizer.",
        )
    saved: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for key, size_and_type in tensor_sizes(path).items():
        if key.startswith(PREFIX):
            name, _, entry = key.removeprefix(PREFIX).rpartition(".")
            saved.setdefault(name, {})[entry] = size_and_type
    state: dict[int, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, own in names_by_number(groups).items():
        name = (aliases or {}).get(own, own)
        if name in saved:
            state[number] = {entry: _empty_state(parameters[number], *size) for entry, size in saved[name].items()}
            targets |= {f"{PREFIX}{name}.{entry}": x for entry, x in state[number].items()}
    read_into(path, targets)
    settings = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in saved_groups]
    own_names = [{"params": group["params"], "param_names": group["param_names"]} for group in groups]
    return {"state": state, "param_groups": [{**a, **b} for a, b in zip(settings, own_names, strict=True)]}


def _empty_state(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    if size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(size, dtype=dtype)


def complete_groups(groups_of_ranks: Sequence[Groups], model_order: Sequence[str]) -> Groups:
    """The `param_groups` of the whole model's optimizer, from those of ranks that each hold a part of the model (or all of it).

    Names are sorted as in `model_order`, the names of the whole model's parameters, and numbered across the groups, as in one process. Names
    that the whole model does not have (the head of a tied model) are left out. Settings are taken from the first rank.
    """
    place = {name: position for position, name in enumerate(model_order)}
    complete, count = [], 0
    for parts in zip(*groups_of_ranks, strict=True):
        names = sorted({name for part in parts for name in part["param_names"] if name in place}, key=place.__getitem__)
        complete.append({**parts[0], "params": list(range(count, count + len(names))), "param_names": names})
        count += len(names)
    return complete


def names_by_number(groups: Groups) -> dict[int, str]:
    return {number: name for group in groups for number, name in zip(group["params"], group["param_names"], strict=True)}
