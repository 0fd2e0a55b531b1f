"""Counts the bytes of the tensors that are alive, on fake or on real tensors, and records the maximum."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from meshformer.compat.torch import DispatchMode
from meshformer.model.layout import blocks_name
from meshformer.parallel.pipeline import local_tensor

from .reserve import Reserve

KINDS: tuple[str, ...] = ("weights", "gradients", "optimizer", "activations", "communication")
# Operations that write into buffers of collectives. The functional collectives (tensor and context parallelism) are not among them: autograd keeps
# their results like any other activation.
BUFFERS = ("c10d.", "fsdp.")
# Fused updates of an optimizer return nothing and make nothing. Not all of them know fake tensors: torch would run these on real zeros of that size.
IN_PLACE = ("aten._fused_sgd_.", "aten._fused_adam_.", "aten._fused_adamw_.")


class LiveBytes(DispatchMode):
    """Inside, `now` is the number of bytes in storages that are alive, `peak` its largest value since `reset`, `where` and `kinds` that moment.
    `highest`: phase -> bytes by kind at its own highest moment.

    A storage counts once, however many views it has, from the first operation that takes or returns it (or from `hold`) until it is freed.
    Memory that an operation uses only inside its kernel is not seen. `reserved`: what PyTorch's allocator would have reserved since the beginning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = self.at = ""
        self.by_kind = dict.fromkeys(KINDS, 0)
        self.kinds = dict(self.by_kind)
        self.highest: dict[str, dict[str, int]] = {}
        self._most: dict[str, int] = {}  # phase -> bytes at that moment
        self._held: dict[int, tuple[int, str]] = {}  # id of a storage -> bytes, kind
        self._trained: dict[int, Any] = {}
        self.pools = (
            Reserve(),
            Reserve(),
        )  # the second for communication, which has streams of its own on a GPU, so its blocks are not shared
        self._pool: dict[int, Reserve] = {}  # id of a storage -> where its block is

    def __enter__(self) -> LiveBytes:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = resizing(
            self, self._resize
        )  # FSDP frees and allocates gathered parameters that way, not by an operation
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(wraps_others, types)):
            return NotImplemented  # DTensors and pending collectives: they call operations on plain tensors, and these are counted
        name = name_of(function)
        if name in READS and is_fake(args[0]):
            return READS[name](args[0])
        if name.startswith(IN_PLACE) and is_fake(args[0][0]):
            return None
        result = function(*args, **(kwargs or {}))
        kind = "communication" if name.startswith(BUFFERS) else "optimizer" if self.at == "optimizer" else "activations"
        for x in tensors_in((result, args, kwargs)):
            self.see(x, kind)
        if name.startswith("fsdp.chunk_cat"):  # its inputs are the gradients of the gathered parameters
            self.hold(args[0], "gradients")
        return result

    def see(self, x: Tensor, kind: str) -> None:
        """Counts the storage of a plain tensor, as `kind` if it is new."""
        if x.is_meta and not is_fake(x):
            return
        storage = x.untyped_storage()
        self._set(id(storage), storage.nbytes(), kind, storage)

    def hold(self, tensors: Iterable[Any], kind: str) -> None:
        """Counts the storages of `tensors` as `kind`, even if they were counted as another kind before."""
        for x in tensors:
            storage = local_tensor(x).untyped_storage()
            key = id(storage)
            self._set(key, storage.nbytes(), kind, storage)
            if self._held[key][1] not in (kind, "weights", "optimizer"):
                self._rename(key, kind)

    def _set(self, key: int, size: int, kind: str, storage: Any = None) -> None:
        """Counts `size` bytes for the storage `key`. `kind` matters if it is new, or if an activation turns out to be a buffer."""
        if key not in self._held:
            if storage is None:
                return
            weakref.finalize(storage, self._gone, key)
            self._held[key] = 0, kind
        before, old = self._held[key]
        if old != "activations" or kind != "communication":
            kind = old
        elif old != kind:
            self._rename(key, kind)
        if before == size:
            return
        self._held[key] = size, kind
        self.by_kind[kind] += size - before
        self.now += size - before
        self._reserve(key, size, kind)
        if self.now > self._most.get(self.at, 0):
            self._highest()

    def _rename(self, key: int, kind: str) -> None:
        size, before = self._held[key]
        self._held[key] = size, kind
        self.by_kind[before] -= size
        self.by_kind[kind] += size

    def _reserve(self, key: int, size: int, kind: str) -> None:
        if key in self._pool:
            self._pool.pop(key).give(key)
        if size:
            self._pool[key] = self.pools[kind == "communication"]
            self._pool[key].take(key, size)

    def _gone(self, key: int) -> None:
        size, kind = self._held.pop(key)
        self.by_kind[kind] -= size
        self.now -= size
        self._reserve(key, 0, kind)

    @property
    def reserved(self) -> int:
        return sum(pool.reserved for pool in self.pools)

    def _highest(self) -> None:
        if not self.at.startswith("forward"):
            self.find_gradients()
        self._most[self.at], self.highest[self.at] = self.now, dict(self.by_kind)
        if self.now > self.peak:
            self.peak, self.where, self.kinds = self.now, self.at, self.highest[self.at]

    @torch.no_grad()
    def find_gradients(self) -> None:
        self.hold((p.grad for p in self._trained.values() if p.grad is not None), "gradients")

    def reset(self) -> None:
        self.peak = 0
        self.highest, self._most = {}, {}
        self._highest()

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Follows the phases of a step: the forward and backward passes of the parts of `model`, the loss and the optimizer."""
        self.hold((p.detach() for p in model.parameters()), "weights")
        self._trained = {id(p): p for p in model.parameters()}
        for name, part in parts_of(model):
            part.register_forward_pre_hook(self._entering(name))
            part.register_forward_hook(self._leaving(name))
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "at", "optimizer"))

    def _entering(self, name: str) -> Any:
        def enter(part: nn.Module, inputs: Any) -> None:
            self.at = f"forward of {name}"
            for p in part.parameters():  # with FSDP these are now the gathered ones
                if id(p) not in self._trained:
                    self._trained[id(p)] = p
                    self.hold([p.detach()], "communication")

        return enter

    def _leaving(self, name: str) -> Any:
        def backward(gradient: Tensor) -> None:
            self.at = f"backward of {name}"

        def leave(part: nn.Module, inputs: Any, output: Any) -> None:
            self.at = "loss"  # the phase after the last part ends; the next part to begin overwrites it
            for x in tensors_in(output):
                if x.requires_grad:
                    x.register_hook(backward)

        return leave


def resizing(live: LiveBytes, original: Any) -> Any:
    def resize_(storage: Any, size: int) -> Any:
        result = original(storage, size)
        live._set(id(storage), storage.nbytes(), "communication")
        return result

    return resize_


@cache
def wraps_others(kind: type) -> bool:
    return hasattr(kind, "to_local") or hasattr(kind, "trigger_wait")


@cache
def name_of(function: Any) -> str:
    return str(function)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from tensors_in(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors_in(x)


def is_fake(x: Any) -> bool:
    return hasattr(x, "fake_mode")


def number_in(x: Tensor) -> int:
    """The number that the host reads from a fake tensor. A step reads two kinds: the number of a micro-batch, a view of an `arange`, so that its
    place is its value; and the vote (int32) by which the ranks of a pipeline learn whether all know their shapes: they do."""
    return 1 if x.dtype == torch.int32 else int(x.storage_offset())


# The operations by which the host reads a tensor. The checks that all ranks of a pipeline have the same batch pass.
READS: dict[str, Any] = {"aten._local_scalar_dense.default": number_in, "aten.equal.default": lambda x: True}


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each block and of the modules beside the blocks."""
    blocks = blocks_name(model)

    def inside(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            full = prefix + name
            if blocks is not None and f"{blocks}.".startswith(f"{full}."):
                yield from inside(child, f"{full}.")
            else:
                yield full, child

    yield from inside(model, "")
