"""A figure of matplotlib as the panels of a page: an SVG image for each of its axes and legends, with the values that the pointer shows."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from meshformer.runs.figures import STYLE

PADDING = 0.04  # inches around a panel
MOST_POINTS = 400  # of a line, for the pointer


def panels(figure: Figure) -> list[dict[str, str]]:
    """Return {"data": an SVG data URL, "plot": JSON for the script of the page, or ""} for each axes and legend. Changes the figure's labels.

    As an <img>, an SVG has its own scope, so ids of different figures do not clash. Each panel has a label and ticks of its own, since on a narrow
    screen it does not stand beside its neighbour.
    """
    canvas = FigureCanvasAgg(figure)
    with plt.rc_context(STYLE):
        for axes in figure.axes:
            axes.tick_params(labelleft=True)
            if not axes.get_ylabel():
                axes.set_ylabel(figure.axes[0].get_ylabel())
        canvas.draw()
        figure.set_layout_engine("none")  # the layout is that of the whole figure: a cut must not move anything
        renderer = canvas.get_renderer()
        found, parts = [], [*figure.axes, *figure.legends]
        boxes = [part.get_tightbbox(renderer) for part in parts]
        for legend in figure.legends:
            place = legend.get_window_extent(renderer).transformed(figure.transFigure.inverted())
            legend.set_loc("lower left")
            legend.set_bbox_to_anchor(place.p0, figure.transFigure)
            legend.borderaxespad = 0
        for part, box in zip(parts, boxes, strict=True):
            if box is None:
                continue
            for other in parts:
                other.set_visible(other is part)
            inches = box.transformed(figure.dpi_scale_trans.inverted()).padded(PADDING)
            out = io.BytesIO()
            figure.savefig(out, format="svg", bbox_inches=inches, transparent=True, metadata={"Date": None})
            plot = _plot(part, inches, renderer) if isinstance(part, Axes) else None
            found.append({"data": data_url(out.getvalue()), "plot": json.dumps(plot, separators=(",", ":")) if plot else ""})
    return found


def data_url(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _plot(axes: Axes, crop: Bbox, renderer: Any) -> dict[str, Any] | None:
    """What the script needs to find the values under the pointer: the frame as shares of the image, the ranges, and the lines."""
    lines = [line for each in axes.get_lines() if each.get_transform() == axes.transData and (line := _line(each)) is not None]
    if not lines:
        return None
    figure: Any = axes.figure
    frame = axes.get_window_extent(renderer).transformed(figure.dpi_scale_trans.inverted())
    box = [(frame.x0 - crop.x0) / crop.width, (crop.y1 - frame.y1) / crop.height,
           (frame.x1 - crop.x0) / crop.width, (crop.y1 - frame.y0) / crop.height]  # fmt: skip
    return {
        "box": [round(share, 4) for share in box], "x": axes.get_xlim(), "y": axes.get_ylim(),
        "log": [axes.get_xscale() == "log", axes.get_yscale() == "log"], "names": [axes.get_xlabel(), axes.get_ylabel()], "lines": lines,
    }  # fmt: skip


def _line(line: Any) -> dict[str, Any] | None:
    points = []
    for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
        try:
            x, y = float(x), float(y)
        except (TypeError, ValueError):  # names on an axis
            return None
        if math.isfinite(x) and math.isfinite(y):
            points.append((float(f"{x:.6g}"), float(f"{y:.5g}")))
    every = max(1, -(-len(points) // MOST_POINTS))
    points = [*points[:-1:every], *points[-1:]]
    if not points:
        return None
    label = str(line.get_label())
    name = "" if label.startswith("_") else label
    return {"name": name, "colour": to_hex(line.get_color()), "x": [x for x, _ in points], "y": [y for _, y in points]}
