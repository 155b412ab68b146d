"""The picture of a schedule, by what is drawn where."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from mxmoe.errors import EmptyPicture
from mxmoe.report import Timeline, draw_timelines


def make_timeline(tiles: int = 5) -> Timeline:
    """Tiles of 1, 2, 1, 2, ... us on two SMs of three, one after the other."""
    order = np.arange(tiles)
    duration = 1.0 + order % 2
    slot = order % 2
    start = (order // 2) * duration
    return Timeline("down", slot, start, duration, order % 2, ("w8a8_sym m128n128", "w4a16 m64n128"), 3)


def boxes(figure: Figure) -> list[tuple[float, float, float, float]]:
    """(left, right, low, high) of every bar."""
    found: list[tuple[float, float, float, float]] = []
    for collection in figure.findobj(PolyCollection):
        for path in collection.get_paths():
            low, high = path.vertices.min(axis=0), path.vertices.max(axis=0)
            found.append((float(low[0]), float(high[0]), float(low[1]), float(high[1])))
    return sorted(found)


def test_every_tile_is_a_bar_on_the_line_of_its_sm() -> None:
    figure = draw_timelines([make_timeline()], title="mlp")
    assert boxes(figure) == [
        (0, 1, -0.5, 0.5),
        (0, 2, 0.5, 1.5),
        (1, 2, -0.5, 0.5),
        (2, 3, -0.5, 0.5),
        (2, 4, 0.5, 1.5),
    ]
    words = [text.get_text() for text in figure.findobj(Text)]
    assert {"mlp", "w8a8_sym m128n128", "w4a16 m64n128", "5 tiles"} <= set(words)
    assert "down: 4.0 us, 1.714 of an even spread" in words
    assert figure.axes[0].get_ylim() == (2.5, -0.5)


def test_of_many_tiles_neighbours_run_together() -> None:
    figure = draw_timelines([make_timeline(8000)], title="mlp")
    assert boxes(figure) == [(0, 4000, -0.5, 0.5), (0, 8000, 0.5, 1.5)]


def test_a_panel_for_each_launch() -> None:
    assert len(draw_timelines([make_timeline(), make_timeline(2)], title="mlp").axes) == 2


@pytest.mark.parametrize("nothing", [[], [make_timeline(0)]])
def test_a_schedule_of_nothing_is_refused(nothing: list[Timeline]) -> None:
    with pytest.raises(EmptyPicture, match="no tiles"):
        draw_timelines(nothing, title="mlp")
