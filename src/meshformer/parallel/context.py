"""Context parallel: each rank holds a stretch of every sequence, and attention alone sees across the cuts.

`all_gather`: every rank gathers all keys and values and attends from its own queries: any number of heads, 2 tensors exchanged.
`ulysses` (Jacobs et al. 2023): an all-to-all turns "some tokens, all heads" into "all tokens, some heads" before attention and another
turns it back: from about four ranks on less is sent, and kernels keep their causal fast path, but heads must divide by the axis.

Shapes as in model/attention.py; t is one rank's share of T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshformer.compat.torch_distributed import all_gather, all_gather_autograd, all_to_all_autograd, wait_tensor
from meshformer.config.errors import ConfigError
from meshformer.model.attention import Mask
from meshformer.model.layout import plan_of


class ContextAxis:
    """Cuts batches along time and joins attention across the cuts. `mesh` is the one-dimensional context axis."""

    def __init__(self, mesh: DeviceMesh, method: str):
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.method = method
        self._natural = True

    def cut(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's stretch of every (B, T) tensor in the batch, and `positions` (1 or B, t) of what it holds."""
        first = next(iter(batch.values()))
        T = first.shape[1]
        self._natural = "positions" not in batch
        if self._natural:
            batch = {**batch, "positions": torch.arange(T, device=first.device)[None]}
        return {name: x.chunk(self.size, dim=1)[self.rank].contiguous() if x.ndim == 2 else x for name, x in batch.items()}

    def apply(self, model: Any) -> None:
        """Puts this axis around the attention of every block, and around the mask, in place, as the model's plan says."""
        plan = plan_of(model)
        assert plan is not None and plan.attention is not None, "parallel/check.py asks for both"
        if plan.mask is None and self.method != "ulysses":
            message = "hands attention keys of other processes, for which the model's Plan names no `mask`"
            raise ConfigError(message, "strategy.context_method", self.method, fix="Use strategy.context_method=ulysses.")
        path, _, core = plan.attention.rpartition(".")
        for name, module in model.named_modules():
            if fnmatchcase(name, path) and hasattr(module, core):
                self._put_around(module, core)
        if self.method == "ulysses":
            for name in plan.per_head:
                model.get_submodule(name).share_heads(self.rank, self.size)
        if plan.mask is None:
            return
        make_mask = getattr(model, plan.mask)

        def whole_mask(positions_BT: Tensor, documents_BT: Tensor | None, natural: bool, cache: Any) -> Mask:
            """The mask over all keys and, for Ulysses, all queries: made once a forward pass, for all layers."""
            keys_BS, documents_BS = self._gather(positions_BT), None if documents_BT is None else self._gather(documents_BT)
            if self.method == "ulysses":
                return make_mask(keys_BS, documents_BS, self._natural, cache)
            mask = make_mask(positions_BT, documents_BT, natural, cache)
            return replace(mask, natural=False, k_positions_BS=keys_BS, k_documents_BS=documents_BS)

        setattr(model, plan.mask, whole_mask)

    def _put_around(self, module: Any, core: str) -> None:
        attend = getattr(module, core)
        if isinstance(attend, nn.Module):
            attend.forward = self._across(attend.forward)
        else:
            setattr(module, core, self._across(attend))

    def _gather(self, x_Bt: Tensor) -> Tensor:
        return wait_tensor(all_gather(x_Bt.contiguous(), 1, self.group))

    def _across(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(attend)
        def gathered(q_BHtD: Tensor, k_BKtD: Tensor, v_BKtD: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Tensor:
            both_2BKTD = all_gather_autograd(torch.stack((k_BKtD, v_BKtD)), 3, self.group)
            return attend(q_BHtD, both_2BKTD[0], both_2BKTD[1], mask, bias, dropout)

        @wraps(attend)
        def ulysses(q_BHtD: Tensor, k_BKtD: Tensor, v_BKtD: Tensor, *more: Any, **named: Any) -> Tensor:
            q, k, v = (self._heads_for_time(x) for x in (q_BHtD, k_BKtD, v_BKtD))
            return self._time_for_heads(attend(q, k, v, *more, **named))

        return gathered if self.method == "all_gather" else ulysses

    def _heads_for_time(self, x_BHtD: Tensor) -> Tensor:
        """(B, H, t, D), all heads of some tokens → (B, H/n, T, D), some heads of all tokens."""
        B, H, t, D = x_BHtD.shape
        n = self.size
        to_rank = x_BHtD.reshape(B, n, H // n, t, D).transpose(0, 1).contiguous()
        from_rank = _all_to_all(to_rank, self.group).view(n, B, H // n, t, D)
        return from_rank.permute(1, 2, 0, 3, 4).reshape(B, H // n, n * t, D)

    def _time_for_heads(self, x_BhTD: Tensor) -> Tensor:
        """The way back: (B, H/n, T, D) → (B, H, t, D)."""
        B, h, T, D = x_BhTD.shape
        n = self.size
        to_rank = x_BhTD.reshape(B, h, n, T // n, D).permute(2, 0, 1, 3, 4).contiguous()
        from_rank = _all_to_all(to_rank, self.group).view(n, B, h, T // n, D)
        return from_rank.transpose(0, 1).reshape(B, n * h, T // n, D)


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    return all_to_all_autograd(x, None, None, group)
