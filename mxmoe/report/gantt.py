"""A picture of a schedule: which SM runs what, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from mxmoe.errors import EmptyPicture
from mxmoe.report.figure import ACCENT, INK, SOFT, dress, new_figure

KINDS = ("#2f6f9f", "#e0b04c", "#58a182", "#8c5a8f", "#b5705a", "#7fa3c7", "#c9bb7a", "#4d5f73")
"""Colours of the kinds, in order; they come round again after the last."""
SEPARATE = 6000
"""Up to so many tiles each is outlined; of more, neighbours of one kind run together."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The tiles of one launch with their places and times."""

    title: str
    slot: NDArray[np.int64]
    """[tile], the SM that runs it."""
    start_us: NDArray[np.float64]
    """[tile]"""
    duration_us: NDArray[np.float64]
    """[tile]"""
    kind: NDArray[np.int64]
    """[tile], index into `kinds`."""
    kinds: tuple[str, ...]
    """Labels of the colours, e.g. "w4a16 m64n128"."""
    slots: int
    """SMs, idle ones too."""


def draw_timelines(timelines: Sequence[Timeline], *, title: str) -> Figure:
    """
    Draw one panel for each launch, one line for each SM; a dashed line is the end of an even spread of the work.

    Raises:
        EmptyPicture: no launch, or one without tiles.
    """
    if not timelines or not all(len(one.slot) for one in timelines):
        raise EmptyPicture(what="the schedule", reason="there are no tiles")
    figure = new_figure(11.0, 0.6 + 3.7 * len(timelines))
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=14, fontweight="bold")
    for axes, one in zip(figure.subplots(len(timelines), 1, squeeze=False)[:, 0], timelines, strict=True):
        _draw(axes, one)
    return figure


def _draw(axes: Axes, one: Timeline) -> None:
    end = float((one.start_us + one.duration_us).max())
    ideal = float(one.duration_us.sum()) / one.slots
    separate = len(one.slot) <= SEPARATE
    seen = sorted(set(one.kind.tolist()))
    for kind in seen:
        left, right, slot = _bars(one, kind, separate)
        low, high = slot - 0.5, slot + 0.5
        corners = np.stack([left, low, left, high, right, high, right, low], axis=1).reshape(-1, 4, 2)
        line = 0.15 if separate else 0.0
        axes.add_collection(
            PolyCollection(list(corners), facecolors=KINDS[kind % len(KINDS)], edgecolors="white", linewidths=line)
        )
    axes.axvline(ideal, color=ACCENT, linestyle="--", linewidth=1.2)
    dress(axes, title=f"{one.title}: {end:.1f} us, {end / ideal:.3f} of an even spread", x="microseconds", y="SM")
    axes.grid(visible=False)
    axes.set_xlim(0, end * 1.005)
    axes.set_ylim(one.slots - 0.5, -0.5)
    legend = [Patch(color=KINDS[kind % len(KINDS)], label=one.kinds[kind]) for kind in seen]
    axes.legend(
        handles=legend, frameon=False, fontsize=8, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5),
        title=f"{len(one.slot)} tiles", title_fontproperties={"size": 8}, edgecolor=SOFT,
    )  # fmt: skip


def _bars(
    one: Timeline, kind: int, separate: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Left, right and SM of the bars of one kind; neighbours are one bar unless they are to be told apart."""
    mine = np.flatnonzero(one.kind == kind)
    mine = mine[np.lexsort((one.start_us[mine], one.slot[mine]))]
    left, slot = one.start_us[mine], one.slot[mine]
    right = left + one.duration_us[mine]
    if separate or not len(mine):
        return left, right, slot.astype(np.float64)
    fresh = np.ones(len(mine), dtype=bool)
    fresh[1:] = (slot[1:] != slot[:-1]) | (left[1:] > right[:-1] + 1e-6)
    last = np.append(np.flatnonzero(fresh)[1:] - 1, len(mine) - 1)
    return left[fresh], right[last], slot[fresh].astype(np.float64)
