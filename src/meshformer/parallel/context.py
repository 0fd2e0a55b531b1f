"""Context parallelism: every sequence is sharded along time, and only attention communicates between the ranks.

`all_gather`: every rank all-gathers keys and values and computes the attention of its own queries. Works for any number of heads.
`ulysses` (Jacobs et al. 2023): an all-to-all before attention changes the sharding from tokens to heads, and another one after it changes it
back. It sends less from about four ranks on, and kernels keep their causal fast path, but the axis must divide the number of heads.

Shapes as in model/attention.py; t is T / (size of the context axis).
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
    """Shards batches along time and wraps attention with the communication it needs. `mesh` is the one-dimensional context axis."""

    def __init__(self, mesh: DeviceMesh, method: str):
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.method = method
        self._natural = True

    def cut(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's time slice (B, t) of every (B, T) tensor in the batch, plus the `positions` (1 or B, t) of the slice."""
        first = next(iter(batch.values()))
        T = first.shape[1]
        self._natural = "positions" not in batch
        if self._natural:
            batch = {**batch, "positions": torch.arange(T, device=first.device)[None]}
        return {name: x.chunk(self.size, dim=1)[self.rank].contiguous() if x.ndim == 2 else x for name, x in batch.items()}

    def apply(self, model: Any) -> None:
        """Wraps, in place, the attention of every block and the mask function that the model's Plan names."""
        plan = plan_of(model)
        assert plan is not None and plan.attention is not None, "MeshStrategy._check_plan requires both"
        if plan.mask is None and self.method != "ulysses":
            message = "needs a mask over the keys of other processes, and the model's Plan names no `mask`"
            raise ConfigError(message, "strategy.context_method", self.method, fix="Use strategy.context_method=ulysses.")
        path, _, core = plan.attention.rpartition(".")
        for name, module in model.named_modules():
            if fnmatchcase(name, path) and hasattr(module, core):
                self._wrap(module, core)
        if self.method == "ulysses":
            for name in plan.per_head:
                model.get_submodule(name).share_heads(self.rank, self.size)
        if plan.mask is None:
            return
        make_mask = getattr(model, plan.mask)

        def whole_mask(positions_BT: Tensor, documents_BT: Tensor | None, natural: bool, cache: Any) -> Mask:
            """The mask over the keys of all ranks and, for Ulysses, their queries; built once per forward pass for all layers."""
            keys_BS, documents_BS = self._gather(positions_BT), None if documents_BT is None else self._gather(documents_BT)
            if self.method == "ulysses":
                return make_mask(keys_BS, documents_BS, self._natural, cache)
            mask = make_mask(positions_BT, documents_BT, natural, cache)
            return replace(mask, natural=False, k_positions_BS=keys_BS, k_documents_BS=documents_BS)

        setattr(model, plan.mask, whole_mask)

    def _wrap(self, module: Any, core: str) -> None:
        attend = getattr(module, core)
        if isinstance(attend, nn.Module):
            attend.forward = self._with_communication(attend.forward)
        else:
            setattr(module, core, self._with_communication(attend))

    def _gather(self, x_Bt: Tensor) -> Tensor:
        return wait_tensor(all_gather(x_Bt.contiguous(), 1, self.group))

    def _with_communication(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(attend)
        def gathered(q_BHtD: Tensor, k_BKtD: Tensor, v_BKtD: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Tensor:
            both_2BKTD = all_gather_autograd(torch.stack((k_BKtD, v_BKtD)), 3, self.group)
            return attend(q_BHtD, both_2BKTD[0], both_2BKTD[1], mask, bias, dropout)

        @wraps(attend)
        def ulysses(q_BHtD: Tensor, k_BKtD: Tensor, v_BKtD: Tensor, *more: Any, **named: Any) -> Tensor:
            q, k, v = (self._shard_heads(x) for x in (q_BHtD, k_BKtD, v_BKtD))
            return self._shard_tokens(attend(q, k, v, *more, **named))

        return gathered if self.method == "all_gather" else ulysses

    def _shard_heads(self, x_BHtD: Tensor) -> Tensor:
        """All-to-all from sharded tokens (B, H, t, D) to sharded heads (B, H/n, T, D)."""
        B, H, t, D = x_BHtD.shape
        n = self.size
        to_rank = x_BHtD.reshape(B, n, H // n, t, D).transpose(0, 1).contiguous()
        from_rank = _all_to_all(to_rank, self.group).view(n, B, H // n, t, D)
        return from_rank.permute(1, 2, 0, 3, 4).reshape(B, H // n, n * t, D)

    def _shard_tokens(self, x_BhTD: Tensor) -> Tensor:
        """All-to-all from sharded heads (B, H/n, T, D) back to sharded tokens (B, H, t, D)."""
        B, h, T, D = x_BhTD.shape
        n = self.size
        to_rank = x_BhTD.reshape(B, h, n, T // n, D).permute(2, 0, 1, 3, 4).contiguous()
        from_rank = _all_to_all(to_rank, self.group).view(n, B, h, T // n, D)
        return from_rank.transpose(0, 1).reshape(B, n * h, T // n, D)


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    return all_to_all_autograd(x, None, None, group)
