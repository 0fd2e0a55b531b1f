"""LoRA adapters for the linear layer of GPT-2 in transformers, Conv1D, whose weight is (in, out): y = x W + (alpha/r) (x A) B.

A is (in, r) and B (r, out), transposed as the weight is; the folders of peft hold them as for any other layer (checkpoint/weights.py turns them).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meshformer.model.lora import ADAPTED


class LoraConv1D(Conv1D):
    """`layer` plus an adapter of rank `rank`; shares the layer's parameters. B starts at 0. (…, in) → (…, out).

    ValueError for a rank that is not less than the layer's inputs: such an adapter is larger than the weight.
    """

    def __init__(self, layer: Conv1D, rank: int, alpha: float):
        if rank >= layer.nx:
            raise ValueError(f"the rank {rank} is not less than the {layer.nx} inputs of a layer")
        with torch.device("meta"):
            super().__init__(layer.nf, layer.nx)
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(layer.nx, rank, **like))
        self.lora_B = nn.Parameter(torch.zeros(rank, layer.nf, **like))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A @ self.lora_B * self.scale


ADAPTED[Conv1D] = LoraConv1D
