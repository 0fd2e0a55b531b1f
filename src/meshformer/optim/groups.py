"""Parameter groups chosen by name: with or without weight decay, matrices for Muon, learning rates by layer."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from meshformer.config.errors import ConfigError

NamedParameters = Iterable[tuple[str, Parameter]]

# Biases, gains of norms and position tables are usually not decayed: shrinking them does not regularise the function.
NO_DECAY = ("bias", "norm", "position")


def decay_groups(
    named_parameters: NamedParameters, weight_decay: float, no_decay: Sequence[str] = NO_DECAY, all_names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Two parameter groups in every layout, the one with weight decay first; either may be empty. `params` holds (name, parameter) pairs.

    torch turns the pairs into `params` and `param_names`, the keys in checkpoints. A parameter is in the second group, with `weight_decay=0`,
    if its name contains any of `no_decay`. A tied parameter counts once, by its first name; a frozen one (`requires_grad=False`) is in no group.
    `all_names`: the parameter names of the whole model, given when `named_parameters` are those of a pipeline stage.
    Raises ConfigError for a pattern of the user's that matches no parameter, and for a whole model without trainable parameters.
    """
    named = trainable(named_parameters, all_names)
    _check_patterns([name for name, _ in named] if all_names is None else all_names, no_decay)
    decayed = [(name, parameter) for name, parameter in named if not _matches(name, no_decay)]
    others = [(name, parameter) for name, parameter in named if _matches(name, no_decay)]
    # torch sets `param_names` only for groups that are not empty, and raises when some groups have the key and others lack it.
    return [
        {"params": decayed, "param_names": [], "weight_decay": weight_decay},
        {"params": others, "param_names": [], "weight_decay": 0.0},
    ]


def split_matrices(
    named_parameters: NamedParameters,
    exclude: Sequence[str] = NO_DECAY,
    all_names: Sequence[str] | None = None,
    blocks: str | None = "blocks",
) -> tuple[list, list]:
    """(matrices for Muon, everything else), each a list of (name, parameter); `all_names` as for `decay_groups`.

    Muon is steepest descent under the spectral norm, which suits hidden layers: 2-D weights in the repeated blocks, a ModuleList whose dotted name
    is `blocks` (None: the model has none). Embeddings and head map from or to one-hot vectors, and position tables are not linear maps, so AdamW
    updates those.
    Raises ConfigError if the whole model has no such matrix.
    """
    matrices, others = [], []
    for name, parameter in trainable(named_parameters, all_names):
        (matrices if parameter.ndim == 2 and _is_hidden(name, blocks, exclude) else others).append((name, parameter))
    if not matrices and not any(_is_hidden(name, blocks, exclude) for name in all_names or ()):
        raise ConfigError("Muon found no 2-D weight below `blocks` to train", fix="Use optimizer=adamw for this model.")
    return matrices, others


@dataclass(frozen=True)
class LayerRates:
    """Layer-wise learning-rate decay (Clark et al. 2020, ELECTRA): the learning rate of a layer is the optimizer's times `decay`^depth.

    The depth counts from the output: 0 for the last norm and the head, 1 for the last of n blocks, n for the first, n + 1 for the embeddings. The
    head's learning rate is also multiplied by `head_scale`; `head` are patterns of its parameter names.
    `unfreeze_every`: layers of depth d have learning rate 0 for the first d·unfreeze_every steps (gradual unfreezing, Howard & Ruder 2018). They
    still get gradients, which count in the clipped norm and in the optimizer's averages.
    """

    decay: float = 1.0
    head_scale: float = 1.0
    unfreeze_every: int | None = None
    head: Sequence[str] = ("head.*",)

    def of(self, make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
        """Wraps the optimizer factory `make` so that each parameter group is split by layer; `make` itself when all settings are the defaults."""
        if self == LayerRates(head=self.head):
            return make
        takes = inspect.signature(make).parameters

        def make_split(named: NamedParameters, all_names: Sequence[str] | None = None, blocks: str | None = "blocks") -> Optimizer:
            named = list(named)
            names = all_names or [name for name, _ in named]
            whole = {"blocks": blocks} if all_names is None else {"blocks": blocks, "all_names": all_names}
            optimizer = make(named, **{name: value for name, value in whole.items() if name in takes})
            self._split(optimizer, names, blocks)
            return optimizer

        return make_split

    def _split(self, optimizer: Optimizer, names: Sequence[str], blocks: str | None) -> None:
        """Splits the groups in place. Every rank gets a group for each layer of the whole model, output layers first, even if it is empty."""
        numbers = [_block(name, blocks) for name in names]
        if not any(number is not None for number in numbers):
            fix = "Leave out stage.layer_decay, head_lr_scale and unfreeze_every."
            raise ConfigError("rates by layer are for models with `blocks`, and this one has none", fix=fix)
        has_head = any(self._is_head(name) for name in names)
        if self.head_scale != 1 and not has_head:
            message = "the model has no head of its own (a tied one is the embedding's matrix)"
            raise ConfigError(message, "stage.head_lr_scale", self.head_scale, fix="Leave it out.")
        top = 1 + max(number for number in numbers if number is not None)
        # Modules are assumed to be registered in the order of use: names before the first block are embeddings, names after the last the head.
        first = next(i for i, number in enumerate(numbers) if number is not None)
        depths = {
            name: top - number if number is not None else top + 1 if i < first else 0
            for i, (name, number) in enumerate(zip(names, numbers, strict=True))
        }
        groups = []
        for group in optimizer.param_groups:
            for depth, is_head in [(0, False), (0, True), *((depth, False) for depth in range(1, top + 2))]:
                pairs = zip(group["param_names"], group["params"], strict=True)
                own = [(name, p) for name, p in pairs if (depths[name], self._is_head(name)) == (depth, is_head)]
                rate = group["lr"] * self.decay**depth * (self.head_scale if is_head else 1.0)
                split = {"params": [p for _, p in own], "param_names": [name for name, _ in own], "lr": rate}
                groups.append({**group, **split, "first_step": depth * (self.unfreeze_every or 0)})
        optimizer.param_groups[:] = groups

    def _is_head(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.head)


def _block(name: str, blocks: str | None) -> int | None:
    """The number of the block that a parameter is in, or None. Accepts names with Lightning's prefix `model.`."""
    found = re.match(rf"(?:model\.)?{re.escape(blocks)}\.(\d+)\.", name) if blocks else None
    return int(found[1]) if found else None


def trainable(named_parameters: NamedParameters, all_names: Sequence[str] | None = None) -> list[tuple[str, Parameter]]:
    """The parameters with `requires_grad`, each once. Raises ConfigError if a whole model (no `all_names`) has none."""
    seen: set[int] = set()
    named = []
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            named.append((name, parameter))
    if not named and not all_names:
        raise ConfigError("The model has no parameter to train: all are frozen", fix="Unfreeze at least one layer.")
    return named


def _is_hidden(name: str, blocks: str | None, exclude: Sequence[str]) -> bool:
    return _block(name, blocks) is not None and not _matches(name, exclude)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(pattern in name for pattern in patterns)


def _check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        # A default pattern may match nothing, for example in a model without biases.
        if pattern in NO_DECAY or any(pattern in name for name in names):
            continue
        parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        close = difflib.get_close_matches(pattern, parts, n=1)
        fix = f"Did you mean {close[0]}?" if close else f"Names are made of {', '.join(parts)}."
        raise ConfigError("no parameter has this in its name", key="optimizer.no_decay", value=pattern, fix=fix)
