"""The key/value cache: with the keys and values of past tokens stored, generating a token computes one token only."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Holds up to `capacity` tokens. Keys and values of layer i are (B, K, tokens so far, D).

    A forward pass appends to every layer and then calls `advance` once.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # tokens already in the cache
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.positions_BS: Tensor | None = None
        self.documents_BS: Tensor | None = None

    def append(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores this layer's new keys and values; returns all of them, old and new."""
        end = self.length + k_BKTD.shape[2]
        if end > self.capacity:
            raise ValueError(f"the key/value cache holds {self.capacity} tokens, {end} were given")
        if layer not in self._layers:
            B, K, _, D = k_BKTD.shape
            self._layers[layer] = (k_BKTD.new_empty(B, K, self.capacity, D), v_BKTD.new_empty(B, K, self.capacity, D))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k_BKTD
        values[:, :, self.length : end] = v_BKTD
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, positions_BT: Tensor, documents_BT: Tensor | None) -> None:
        self.positions_BS = self.seen_positions(positions_BT)
        self.documents_BS = self.seen_documents(documents_BT)
        self.length += positions_BT.shape[1]

    def seen_positions(self, positions_BT: Tensor) -> Tensor:
        """Positions of all keys, the new tokens' included."""
        return positions_BT if self.positions_BS is None else torch.cat((self.positions_BS, positions_BT), dim=1)

    def seen_documents(self, documents_BT: Tensor | None) -> Tensor | None:
        if documents_BT is None or self.documents_BS is None:
            return documents_BT
        return torch.cat((self.documents_BS, documents_BT), dim=1)
