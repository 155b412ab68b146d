"""Two pictures of a mixed-precision model: who got how many bits, and what the bits buy; and a loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, NullFormatter

from mxmoe.errors import EmptyPicture
from mxmoe.report.figure import ACCENT, COOL, INK, SOFT, dress, label_points, new_figure

# dark is many bits; the lightest still parts from the white of an expert that is not there
COLOURS = LinearSegmentedColormap.from_list("bits", ["#e9dcae", "#93c79f", "#3f9aa6", "#2c6096", "#1b2759"])


@dataclass(frozen=True, slots=True)
class Point:
    """One way to quantize a model: what it costs and what it is worth."""

    label: str
    bits: float
    """Average effective bits per weight."""
    perplexity: float
    """On held-out text; infinite or NaN leaves the point out of the picture and in its note."""


@dataclass(frozen=True, slots=True)
class BitMap:
    """Bits per block, role and expert of one plan."""

    title: str
    rows: tuple[str, ...]
    """Label of each row, e.g. "block 0 down"."""
    routed: tuple[tuple[float, ...], ...]
    """Row -> expert -> effective bits; rows may have different numbers of experts."""
    shared: tuple[float | None, ...] = ()
    """Row -> effective bits of the shared expert, set apart on the right; empty or None where there is none."""
    experts: str = "expert"
    """Label of the horizontal axis; says how the experts are ordered."""

    def grid(self) -> np.ndarray:
        """Return [row, column] bits, NaN where there is nothing; an empty column parts the shared expert."""
        width = max((len(row) for row in self.routed), default=0)
        has_shared = any(bits is not None for bits in self.shared)
        grid = np.full((len(self.rows), width + 2 * has_shared), np.nan)
        for i, row in enumerate(self.routed):
            grid[i, : len(row)] = row
        if has_shared:
            grid[:, -1] = [math.nan if bits is None else bits for bits in self.shared]
        return grid


def draw_bit_map(axes: Axes, bit_map: BitMap, scale: Normalize) -> AxesImage:
    """
    Draw one plan: a row per block and role, a column per expert, the colour is the effective bits.

    Raises:
        EmptyPicture: no rows or no experts, or as many labels as there are not rows.
    """
    if not bit_map.rows or not all(bit_map.routed) or len(bit_map.routed) != len(bit_map.rows):
        raise EmptyPicture(what=f"bit map {bit_map.title!r}", reason="rows, labels and experts must be there and agree")
    grid = bit_map.grid()
    image = axes.imshow(grid, cmap=COLOURS, norm=scale, aspect="auto", interpolation="nearest")
    dress(axes, title=bit_map.title, x=bit_map.experts)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(len(bit_map.rows)), bit_map.rows, fontsize=7.5)
    width = max(len(row) for row in bit_map.routed)
    ticks = [(i, str(i)) for i in range(0, width, max(1, math.ceil(width / 8)))]
    if grid.shape[1] > width:
        ticks.append((width + 1, "shared"))
    axes.set_xticks([i for i, _ in ticks], [text for _, text in ticks], fontsize=7.5)
    # white lines between the cells, drawn as the grid of the minor ticks
    axes.set_xticks(np.arange(grid.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(grid.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    return image


def draw_frontier(axes: Axes, uniform: Sequence[Point], mixes: Sequence[Point], baseline: float | None) -> None:
    """
    Draw perplexity against bits: one labelled dot per uniform scheme, the mixes as a line, bf16 as a dashed line.

    The vertical axis is logarithmic, since perplexity is the exponential of the loss.

    Raises:
        EmptyPicture: not one point has a finite perplexity.
    """
    shown = [[p for p in points if math.isfinite(p.perplexity) and p.perplexity > 0] for points in (uniform, mixes)]
    if not any(shown):
        raise EmptyPicture(what="the frontier", reason="no point has a finite perplexity")
    axes.set_yscale("log")
    dots, line = shown[0], sorted(shown[1], key=lambda point: point.bits)
    if dots:
        axes.scatter([p.bits for p in dots], [p.perplexity for p in dots], s=28, color=SOFT, label="one scheme for all")
    if line:
        bits, values = [p.bits for p in line], [p.perplexity for p in line]
        axes.plot(bits, values, "o-", color=ACCENT, linewidth=1.8, markersize=6, label="mxmoe's mix", zorder=3)
    if baseline is not None:
        axes.axhline(baseline, color=COOL, linestyle="--", linewidth=1.2, label=f"bf16, {baseline:.4g}")
    dress(axes, title="What the bits buy", x="average effective bits per weight", y="held-out perplexity")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _tick_plainly(axes)
    axes.margins(x=0.08, y=0.12)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    missing = [p.label for p in (*uniform, *mixes) if not math.isfinite(p.perplexity)]
    if missing:
        note = f"no finite perplexity: {', '.join(missing)}"
        axes.text(0.01, 0.01, note, transform=axes.transAxes, fontsize=8, color=SOFT)
    label_points(axes, [(p.bits, p.perplexity, p.label) for p in (*line, *dots)])


def _tick_plainly(axes: Axes) -> None:
    """Label the minor ticks too where the range is less than a decade: there may be no major tick in it."""
    low, high = axes.get_ylim()
    within = high / low < 10
    formatter = FuncFormatter(lambda value, _: f"{value:.3g}") if within else NullFormatter()
    axes.yaxis.set_minor_formatter(formatter)
    axes.tick_params(axis="y", which="minor", labelsize=8, colors=INK)
    axes.grid(axis="y", which="minor", color="#f0f3f5", linewidth=0.6)


def draw_overview(
    maps: Sequence[BitMap], uniform: Sequence[Point], mixes: Sequence[Point], *, baseline: float | None, title: str
) -> Figure:
    """
    Draw both pictures in one figure: the frontier above, the plans' bit maps on one colour scale below.

    Raises:
        EmptyPicture: no bit map, an empty one, or no point with a finite perplexity.
    """
    if not maps:
        raise EmptyPicture(what="the overview", reason="there is no plan to draw")
    known = np.concatenate([bit_map.grid().ravel() for bit_map in maps])
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    scale = Normalize(low - 0.5 * (low == high), high + 0.5 * (low == high))
    figure = new_figure(max(9.0, 3.4 * len(maps)), 9.2)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=14, fontweight="bold")
    grid = figure.add_gridspec(2, len(maps), height_ratios=[1.25, 1])
    below = [figure.add_subplot(grid[1, i]) for i in range(len(maps))]
    image: AxesImage | None = None
    for i, (axes, bit_map) in enumerate(zip(below, maps, strict=True)):
        image = draw_bit_map(axes, bit_map, scale)
        if i and bit_map.rows == maps[0].rows:
            axes.set_yticklabels([])
    assert image is not None, "there is at least one bit map"
    bar = figure.colorbar(image, ax=below, location="bottom", shrink=0.4, aspect=40, pad=0.02)
    bar.set_label("effective bits per weight", color=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  # typed as a descriptor, is a spine
    draw_frontier(figure.add_subplot(grid[0, :]), uniform, mixes, baseline)
    return figure


def draw_loss_curve(curve: Sequence[tuple[float, float, float]], *, title: str) -> Figure:
    """
    Draw (step, training loss, held-out loss) in nats per token.

    Raises:
        EmptyPicture: fewer than two points.
    """
    if len(curve) < 2:
        raise EmptyPicture(what="the loss curve", reason=f"{len(curve)} points make no curve")
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    steps = [point[0] for point in curve]
    axes.plot(steps, [point[1] for point in curve], color=SOFT, linewidth=1.2, label="training")
    axes.plot(steps, [point[2] for point in curve], color=ACCENT, linewidth=1.8, label="held out")
    dress(axes, title=title, x="step", y="loss, nats per token")
    axes.annotate(f"{curve[-1][2]:.4f}", (steps[-1], curve[-1][2]), (-4, 8), textcoords="offset points", ha="right")
    axes.legend(frameon=False)
    return figure
