"""Low-rank adapters (LoRA, Hu et al. 2021): y = W x + (alpha/r) B A x, with W frozen and A and B trained.

LoraLinear is a subclass of nn.Linear with two more parameters, A (r, in) and B (out, r), so W keeps its name, initial value and place in
checkpoints. `peft` wraps the layer instead, which renames W to `q.base_layer.weight`, and its adapters are separate modules that our
tensor parallelism cannot shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import blocks_name

ADAPTERS = ("*.lora_A", "*.lora_B")  # patterns of parameter names


class LoraLinear(nn.Linear):
    """`linear` plus an adapter of rank `rank`; shares the layer's parameters. B starts at 0, so the output is unchanged at first.

    (…, in) → (…, out).
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_A), self.lora_B) * self.scale


# The class that gives an adapter to a layer of each kind. huggingface/conv1d.py adds GPT-2's linear layer, whose weight is (in, out).
ADAPTED: dict[type[nn.Module], Callable[[Any, int, float], nn.Module]] = {nn.Linear: LoraLinear}


def adaptable(model: nn.Module) -> list[str]:
    """The last names of the linear layers inside the blocks: q, k, v, o, up, down …"""
    inside = f"{blocks_name(model)}."
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _adapted(m) and name.startswith(inside)})


def _adapted(module: nn.Module) -> Callable[[Any, int, float], nn.Module] | None:
    return next((adapted for kind, adapted in ADAPTED.items() if isinstance(module, kind)), None)


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Adds an adapter, in place, to every linear layer in the blocks whose last name is in `targets`. `model.initial_value` initialises A unless
    the model is on the meta device. ValueError for a target that the blocks do not have."""
    unknown = [target for target in targets if target not in adaptable(model)]
    if unknown or not targets:
        known = adaptable(model)
        if not known:
            raise ValueError("the blocks have no linear layers (nn.Linear) to adapt")
        raise ValueError(f"no linear layer in the blocks is called {', '.join(unknown)}: they are {', '.join(known)}")
    inside = f"{blocks_name(model)}."
    for name, module in list(model.named_modules()):
        path, _, last = name.rpartition(".")
        kind = _adapted(module)
        if kind is None or not name.startswith(inside) or last not in targets:
            continue
        adapted: Any = kind(module, rank, alpha)
        setattr(model.get_submodule(path), last, adapted)
        if not adapted.lora_A.is_meta:
            with torch.no_grad():
                adapted.lora_A.copy_(model.initial_value(f"{name}.lora_A", adapted.lora_A.shape, seed))  # pyright: ignore[reportCallIssue]


def transposed(shapes: Mapping[str, torch.Size], rank: int) -> set[str]:
    """The layers whose weight is (in, out), and their adapters so too: A (in, r), B (r, out). `shapes`: name of a parameter -> its shape."""
    return {name.removesuffix(".lora_A") for name, shape in shapes.items() if name.endswith(".lora_A") and shape[0] != rank}


def merged(weights: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """Weights with the adapters merged in: W + (alpha/r) B A, or A B where those are transposed. `weights`: name -> full (unsharded) tensor, left
    unchanged."""
    found = {name: x for name, x in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    turned = transposed({name: x.shape for name, x in weights.items()}, rank)
    for name, a in weights.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            w, b = weights[f"{layer}.weight"], weights[f"{layer}.lora_B"]
            left, right = (a, b) if layer in turned else (b, a)
            found[f"{layer}.weight"] = (w.double() + (alpha / rank) * left.double() @ right.double()).to(w.dtype)
    return found
