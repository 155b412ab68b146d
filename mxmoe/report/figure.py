"""Figures without a display and without global state, and labels that keep out of each other's way."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from mxmoe.files import write_whole

INK = "#22303c"
SOFT = "#8a97a3"
ACCENT = "#c8552b"
COOL = "#2f6f9f"

# Where a label may go around its point, in points of type: on rings, the nearest first, and above before below.
_BESIDE = ((7, 4), (7, -10), (-7, 4), (-7, -10), (0, 9), (0, -15))
_AWAY = tuple((side * x, y) for y in (17, -23, 30, -36, 43, -49, 56, 69) for x in (10, 22) for side in (1, -1))
_PLACES = (*_BESIDE, *_AWAY)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of the given size in inches that draws with Agg and belongs to no window manager."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Give axes the house's look: title on the left, no box, a faint grid."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c3ccd4")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_whole(path, buffer.getvalue())


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]], *, color: str = INK) -> list[Annotation]:
    """
    Write a label beside each point, at the nearest place where it covers no other label and no point.

    A label that had to move away is tied to its point by a thin line. Call it last: it lays the figure out. Where
    every place is taken the label stays at the first.
    """
    figure = axes.figure.get_figure(root=True)
    assert figure is not None, "axes outside a figure have no size"
    labels = [
        axes.annotate(
            text,
            (x, y),
            _PLACES[0],
            textcoords="offset points",
            fontsize=8,
            color=color,
            arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        for x, y, text in points
    ]
    figure.draw_without_rendering()
    dots = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(float(x) - 4, float(y) - 4, 8, 8) for x, y in dots]
    for label in labels:
        for place in _PLACES:
            _move(label, place)
            box = _extent(label)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and not any(box.overlaps(other) for other in taken):
                break
        else:
            _move(label, _PLACES[0])
        taken.append(_extent(label))
    return labels


def _move(label: Annotation, place: tuple[int, int]) -> None:
    label.set_position(place)
    label.set_horizontalalignment("left" if place[0] > 0 else "right" if place[0] < 0 else "center")
    assert label.arrow_patch is not None, "labels are made with a line"
    label.arrow_patch.set_visible(place in _AWAY)


def _extent(label: Annotation) -> Bbox:
    """Return the box of the words alone, in pixels; an annotation's own holds its line as well."""
    label.update_positions(_renderer(label))
    return Text.get_window_extent(label)


def _renderer(label: Annotation) -> RendererBase:
    figure = label.get_figure(root=True)
    assert figure is not None, "a label outside a figure has no size"
    assert isinstance(figure.canvas, FigureCanvasAgg), f"the figure draws with {type(figure.canvas)}, not with Agg"
    return figure.canvas.get_renderer()
