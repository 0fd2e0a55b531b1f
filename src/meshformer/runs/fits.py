"""Fit power laws to a few points (Kaplan et al. 2020, equation 1.1; Hoffmann et al. 2022, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale · x^(−exponent). `residual`: root mean square of log(y − floor) around the fit."""

    scale: float
    exponent: float
    floor: float
    residual: float

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        return self.floor + self.scale * np.asarray(x, dtype=float) ** -self.exponent

    def __str__(self) -> str:
        return f"{f'{self.floor:.2f} + ' if self.floor else ''}{self.scale:.3g} · x^(−{self.exponent:.3g})"


def fit_power_law(x: Sequence[float], y: Sequence[float], floor: bool | None = None) -> PowerLaw:
    """Fit by least squares in logarithms. With `floor`, the additive constant is chosen from a grid below the smallest y.

    `floor` defaults to True from six different x on; with fewer, the constant and the exponent cannot be separated. Raises ValueError for fewer than
    two different x or for values that are not positive.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(np.unique(xs)) < 2 or (xs <= 0).any() or (ys <= 0).any():
        raise ValueError("a power law needs positive values at two different x at least")
    floor = len(np.unique(xs)) >= 6 if floor is None else floor
    floors = np.linspace(0, 0.995 * ys.min(), 400) if floor else [0.0]
    return min((_line(xs, ys, float(constant)) for constant in floors), key=lambda law: law.residual * (ys.mean() - law.floor))


def lower_envelope(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the corners of the lower convex hull in log-log space, up to the lowest y: the best loss reached at each compute."""
    hull: list[tuple[float, float]] = []
    for point in sorted(zip(map(float, x), map(float, y), strict=True)):
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if not hull or point[0] > hull[-1][0]:
            hull.append(point)
    lowest = min(range(len(hull)), key=lambda i: hull[i][1])
    return [px for px, _ in hull[: lowest + 1]], [py for _, py in hull[: lowest + 1]]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return float(np.log(b[1] / a[1]) / np.log(b[0] / a[0])) if b[0] > a[0] else np.inf


def _line(x: np.ndarray, y: np.ndarray, floor: float) -> PowerLaw:
    slope, intercept = np.polyfit(np.log(x), np.log(y - floor), 1)
    off = np.log(y - floor) - (slope * np.log(x) + intercept)
    return PowerLaw(float(np.exp(intercept)), float(-slope), floor, float(np.sqrt((off**2).mean())))
