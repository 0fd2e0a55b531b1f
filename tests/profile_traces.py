"""Traces made by hand, as torch.profiler writes them."""

from __future__ import annotations

from typing import Any

from meshformer.profile.trace import Trace, parse


def event(name: str, start: float, end: float, cat: str = "user_annotation", tid: int = 1, **args: Any) -> dict[str, Any]:
    """An event from `start` to `end` in ms; traces have microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": 1e3 * start, "dur": 1e3 * (end - start), "args": args}


def mark(name: str, start: float, end: float) -> dict[str, Any]:
    return event(f"meshformer:{name}", start, end)


def launch(number: int, at: float) -> dict[str, Any]:
    return event("cudaLaunchKernel", at, at + 0.01, "cuda_runtime", correlation=number)


def kernel(name: str, start: float, end: float, number: int, stream: int = 7, **args: Any) -> dict[str, Any]:
    return event(name, start, end, "kernel", tid=stream, stream=stream, correlation=number, **args)


def trace(*events: dict[str, Any], rank: int = 0, device: str = "cpu", base: int = 0, **about: Any) -> Trace:
    return parse({"meshformer": {"rank": rank, "device": device, **about}, "baseTimeNanoseconds": base, "traceEvents": list(events)})
