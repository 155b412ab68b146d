"""
Draws the times of `group_gemm.py`: our fastest scheme of each weight class against the fastest peer, cell by cell.

Colour and the large figure are the peer's time over ours; the small figure is the fraction of its own roofline that
ours reaches. The peer is the faster of those of the same run and the published ones. A plan at five bits stands against
8-bit peers. Writes `docs/images/group_gemm.png`.

    python benchmarks/draw_group_gemm.py [results/group_gemm.csv]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS
from marks import Key, Row, best, parse
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from moe_workloads import MODELS, PARTS, TOKENS

from mxmoe.report import save_figure
from mxmoe.report.figure import ACCENT, COOL, INK, dress, new_figure

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "group_gemm.png"
ROWS = (("4bit", "4bit", "4-bit weights"), ("8bit", "8bit", "8-bit"), ("bf16", "bf16", "bf16"))
PLAN = ("ours_bits5", "8bit", "5-bit plan, 8-bit peer")
COLOURS = LinearSegmentedColormap.from_list("ratio", [ACCENT, "#f4f1ea", COOL])
NAMES = [name for name in MODELS if name != "tiny"]


def pairs(rows: Sequence[Row], published: Sequence[Row]) -> list[tuple[str, dict[Key, Row], dict[Key, Row]]]:
    """(title, cell -> ours, cell -> fastest peer) for each line of panels."""
    found: list[tuple[str, dict[Key, Row], dict[Key, Row]]] = []
    for ours, peer, title in (*ROWS, PLAN):

        def is_ours(row: Row, ours: str = ours) -> bool:
            return row.is_ours and ours in (row.weight_class, row.contender)

        def is_peer(row: Row, peer: str = peer) -> bool:
            return not row.is_ours and row.weight_class == peer

        found.append((title, best(rows, is_ours), best([*rows, *published], is_peer)))
    return found


def panel(axes: Any, ours: Mapping[Key, Row], peers: Mapping[Key, Row], part: str) -> Any:  # noqa: ANN401
    """One heat map: models down, tokens across; an empty cell was not measured."""
    grid = np.full((len(NAMES), len(TOKENS)), np.nan)
    for i, name in enumerate(NAMES):
        for j, tokens in enumerate(TOKENS):
            key = (name, tokens, part)
            if key not in ours or key not in peers:
                continue
            grid[i, j] = peers[key].time_us / ours[key].time_us
            axes.text(j, i - 0.1, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8.5, color=INK)
            axes.text(j, i + 0.27, f"{ours[key].fraction:.2f}", ha="center", va="center", fontsize=6, color=INK)
    image = axes.imshow(grid, cmap=COLOURS, norm=LogNorm(0.5, 2.0), aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(TOKENS)), [str(tokens) for tokens in TOKENS])
    axes.set_yticks(range(len(NAMES)), NAMES)
    return image


def draw(rows: Sequence[Row], published: Sequence[Row], path: Path) -> None:
    """Write the picture."""
    lines = pairs(rows, published)
    figure = new_figure(11.5, 1.75 * len(lines) + 0.8)
    grid = figure.subplots(len(lines), len(PARTS), sharex=True, sharey=True, squeeze=False)
    image: Any = None
    for line, (title, ours, peers) in zip(grid, lines, strict=True):
        for axes, part in zip(line, PARTS, strict=True):
            dress(axes, title=f"{title}, {part}", x="tokens" if line is grid[-1] else "")
            image = panel(axes, ours, peers, part)
    bar = figure.colorbar(image, ax=grid, shrink=0.6, ticks=[0.5, 0.7, 1.0, 1.4, 2.0], extend="both")
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels(["0.5", "0.7", "1", "1.4", "2"])
    bar.set_label("fastest peer's time over ours (small: ours as a fraction of its roofline)", color=INK, fontsize=8.5)
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    source = Path(argv[0]) if argv else RESULTS / "group_gemm.csv"
    draw(parse(source), parse(RESULTS / "peers_h200.csv"), IMAGE)
    sys.stdout.write(f"written to {IMAGE}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
