"""Parameter groups chosen by name: what is decayed, and what Muon may treat as a matrix."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch.nn import Parameter

from meshformer.config.errors import ConfigError

NamedParameters = Iterable[tuple[str, Parameter]]

# Gains, biases and tables of positions have no scale that decay could usefully shrink (Loshchilov & Hutter 2019 decay weights).
NO_DECAY = ("bias", "norm", "position")


def decay_groups(
    named_parameters: NamedParameters, weight_decay: float, no_decay: Sequence[str] = NO_DECAY, all_names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Two groups, decayed first, in every layout: either may be empty. Each holds `params` as (name, parameter) pairs.

    Torch turns the pairs into `params` and `param_names`, which checkpoints key on. A parameter belongs to the
    second group, with `weight_decay=0`, when any of `no_decay` occurs in its name; one tied under two names counts once,
    by its first name; a frozen one (`requires_grad=False`) is in no group. `all_names` are those of the whole model, where
    the given parameters are only a pipeline rank's part of it. Raises ConfigError for a pattern of the user's
    that fits no parameter, and when nothing is left to train (which a part alone cannot tell).
    """
    named = trainable(named_parameters, all_names)
    _check_patterns([name for name, _ in named] if all_names is None else all_names, no_decay)
    decayed = [(name, parameter) for name, parameter in named if not _matches(name, no_decay)]
    others = [(name, parameter) for name, parameter in named if _matches(name, no_decay)]
    # Torch sets `param_names` from the pairs, if there are any; groups without the key are refused beside groups with it.
    return [
        {"params": decayed, "param_names": [], "weight_decay": weight_decay},
        {"params": others, "param_names": [], "weight_decay": 0.0},
    ]


def split_matrices(
    named_parameters: NamedParameters, exclude: Sequence[str] = NO_DECAY, all_names: Sequence[str] | None = None
) -> tuple[list, list]:
    """(matrices for Muon, everything else), each a list of (name, parameter); `all_names` as for `decay_groups`.

    Muon's steepest descent under the spectral norm is for hidden layers alone: 2-D weights below `blocks`. Embeddings and
    the head map to or from one-hot vectors, and position tables are not maps at all, so they stay with AdamW.
    Raises ConfigError where the whole model has no such matrix.
    """
    matrices, others = [], []
    for name, parameter in trainable(named_parameters, all_names):
        (matrices if parameter.ndim == 2 and _is_hidden(name, exclude) else others).append((name, parameter))
    if not matrices and not any(_is_hidden(name, exclude) for name in all_names or ()):
        raise ConfigError("Muon found no 2-D weight below `blocks` to train", fix="Use optimizer=adamw for this model.")
    return matrices, others


def trainable(named_parameters: NamedParameters, all_names: Sequence[str] | None = None) -> list[tuple[str, Parameter]]:
    """Parameters that receive gradients, each once. Raises ConfigError when a whole model (no `all_names`) has none."""
    seen: set[int] = set()
    named = []
    for name, parameter in named_parameters:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            named.append((name, parameter))
    if not named and not all_names:
        raise ConfigError("The model has no parameter to train: all are frozen", fix="Unfreeze at least one layer.")
    return named


def _is_hidden(name: str, exclude: Sequence[str]) -> bool:
    return "blocks" in name.split(".") and not _matches(name, exclude)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(pattern in name for pattern in patterns)


def _check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        # The defaults are for every model; one without biases is no mistake.
        if pattern in NO_DECAY or any(pattern in name for name in names):
            continue
        parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        close = difflib.get_close_matches(pattern, parts, n=1)
        fix = f"Did you mean {close[0]}?" if close else f"Names are made of {', '.join(parts)}."
        raise ConfigError("no parameter has this in its name", key="optimizer.no_decay", value=pattern, fix=fix)
