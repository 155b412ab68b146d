"""Pictures by their content: what is drawn, where, and under which words."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from mxmoe.errors import EmptyPicture
from mxmoe.report import (
    BitMap,
    Point,
    draw_bit_map,
    draw_frontier,
    draw_loss_curve,
    draw_overview,
    save_figure,
)
from mxmoe.report.figure import label_points, new_figure

MAP = BitMap("5 bits", ("0 gate", "0 down"), ((2.5, 4.5, 8.25), (4.5, 2.5, 2.5)), (8.25, None), "experts, most used")
UNIFORM = [Point("w8a8_sym", 8.25, 3.1), Point("w4a16_g64_asym", 4.5, 3.4), Point("w2a16_g64_asym", 2.5, 9.0)]
MIXES = [Point("mix 5", 5, 3.11), Point("mix 2.25", 2.25, 4.2), Point("mix 3.25", 3.25, 3.3)]


@pytest.fixture
def axes() -> Axes:
    return new_figure(8, 5).add_subplot()


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_a_bit_map_sets_the_shared_expert_apart(axes: Axes) -> None:
    image = draw_bit_map(axes, MAP, Normalize(2, 9))
    drawn = np.ma.filled(image.get_array().astype(float), math.nan)  # pyright: ignore[reportOptionalMemberAccess]
    expected = [[2.5, 4.5, 8.25, math.nan, 8.25], [4.5, 2.5, 2.5, math.nan, math.nan]]
    np.testing.assert_array_equal(drawn, expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 gate", "0 down"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "shared"]
    assert axes.get_xlabel() == "experts, most used"


def test_blocks_may_have_different_numbers_of_experts(axes: Axes) -> None:
    ragged = BitMap("mixed", ("a", "b"), ((1.0,), (2.0, 3.0)))
    np.testing.assert_array_equal(ragged.grid(), [[1, math.nan], [2, 3]])
    draw_bit_map(axes, ragged, Normalize(1, 3))
    assert "shared" not in [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize("empty", [BitMap("x", (), ()), BitMap("x", ("a",), ((),)), BitMap("x", ("a", "b"), ((1.0,),))])
def test_a_bit_map_of_nothing_is_refused(axes: Axes, empty: BitMap) -> None:
    with pytest.raises(EmptyPicture, match="bit map 'x'"):
        draw_bit_map(axes, empty, Normalize(0, 1))


def test_the_frontier_has_dots_a_line_and_a_dashed_line(axes: Axes) -> None:
    draw_frontier(axes, UNIFORM, MIXES, 3.05)
    (dots,) = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), [(p.bits, p.perplexity) for p in UNIFORM])
    mix, baseline = axes.get_lines()
    np.testing.assert_allclose(mix.get_xdata(), [2.25, 3.25, 5])
    np.testing.assert_allclose(mix.get_ydata(), [4.2, 3.3, 3.11])
    assert baseline.get_linestyle() == "--"
    np.testing.assert_allclose(baseline.get_ydata(), 3.05)
    labels = {a.get_text() for a in axes.texts if isinstance(a, Annotation)}
    assert labels == {p.label for p in UNIFORM + MIXES}
    assert axes.get_xlabel() == "average effective bits per weight"
    assert axes.get_ylabel() == "held-out perplexity"
    assert axes.get_yscale() == "log"


def test_values_under_a_decade_still_have_tick_labels(axes: Axes) -> None:
    draw_frontier(axes, UNIFORM[:2], [], 3.05)
    axes.figure.draw_without_rendering()  # pyright: ignore[reportAttributeAccessIssue]  # a figure, not a subfigure
    low, high = axes.get_ylim()
    shown = [float(t.get_text()) for t in axes.get_yticklabels(which="both") if t.get_text()]
    assert sum(low <= value <= high for value in shown) >= 2


def test_an_infinite_perplexity_is_named_and_not_drawn(axes: Axes) -> None:
    draw_frontier(axes, [*UNIFORM, Point("w1a16_sym", 1.25, math.inf)], MIXES, None)
    assert any("no finite perplexity: w1a16_sym" in text.get_text() for text in axes.texts)
    assert len(axes.collections[0].get_offsets()) == len(UNIFORM)
    assert len(axes.get_lines()) == 1


def test_a_frontier_without_points_is_refused(axes: Axes) -> None:
    with pytest.raises(EmptyPicture, match="no point has a finite perplexity"):
        draw_frontier(axes, [Point("a", 4, math.nan)], [], 3.0)


def test_labels_of_crowded_points_do_not_overlap(axes: Axes) -> None:
    points = [(4 + 0.02 * i, 3 + 0.01 * i, f"w4a16_g{i}_asym") for i in range(8)]
    axes.set(xlim=(0, 8), ylim=(1, 6))
    labels = label_points(axes, points)
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.x0 >= axes.bbox.x0 and box.x1 <= axes.bbox.x1 for box in boxes)


def test_the_overview_shares_one_scale(tmp_path: Path) -> None:
    other = BitMap("2.25 bits", MAP.rows, ((1.5, 1.5, 1.5), (1.5, 1.5, 1.5)), (2.5, 2.5))
    figure = draw_overview([MAP, other], UNIFORM, MIXES, baseline=3.05, title="A tiny MoE")
    images = [image for axes in figure.axes for image in axes.get_images()]
    assert [image.get_clim() for image in images] == [(1.5, 8.25)] * 2
    assert {"A tiny MoE", "5 bits", "2.25 bits", "effective bits per weight", "What the bits buy"} <= set(words(figure))
    assert len(figure.axes) == 4  # two maps, the colour bar, the frontier
    save_figure(figure, tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_plan_of_one_scheme_has_a_scale_too() -> None:
    flat = BitMap("uniform", ("a",), ((4.5, 4.5),))
    figure = draw_overview([flat], UNIFORM, [], baseline=None, title="")
    (image,) = (image for axes in figure.axes for image in axes.get_images())
    assert image.get_clim() == (4.0, 5.0)


def test_an_overview_without_plans_is_refused() -> None:
    with pytest.raises(EmptyPicture, match="no plan to draw"):
        draw_overview([], UNIFORM, MIXES, baseline=3.0, title="")


def test_the_loss_curve_has_both_losses() -> None:
    curve = [(10, 3.0, 3.1), (20, 2.0, 2.2), (30, 1.5, 1.9)]
    figure = draw_loss_curve(curve, title="Tiny MoE")
    (axes,) = figure.axes
    np.testing.assert_allclose([line.get_ydata() for line in axes.get_lines()], [[3, 2, 1.5], [3.1, 2.2, 1.9]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss, nats per token")
    assert {"Tiny MoE", "training", "held out", "1.9000"} <= set(words(figure))


def test_a_curve_of_one_point_is_refused() -> None:
    with pytest.raises(EmptyPicture, match="1 points make no curve"):
        draw_loss_curve([(1, 2.0, 3.0)], title="")


def test_equal_pictures_are_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        save_figure(draw_loss_curve([(1, 2.0, 3.0), (2, 1.0, 2.0)], title="x"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
