"""
The work list of a group GEMM: which rows and columns of which expert each tile computes.

The arithmetic is two functions of plain numbers, `n_blocks` and `block_bounds`, and a running sum over experts; that
every output element is in exactly one tile is proved for them symbolically in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

DECODE_ROWS = 4
"""Rows whose multiplication takes about as long as decoding a tile's weights: what a tile costs besides its rows."""


def n_blocks(count: Any, size: Any) -> Any:  # noqa: ANN401  # int, array or symbolic integer alike
    """Number of blocks of `size` that cover `count` elements: 9 in blocks of 4 -> 3, 0 -> 0."""
    return (count + size - 1) // size


def block_bounds(
    index: Any,  # noqa: ANN401  # as above
    count: Any,  # noqa: ANN401  # as above
    size: Any,  # noqa: ANN401  # as above
    minimum: Callable[[Any, Any], Any] = np.minimum,
) -> tuple[Any, Any]:
    """First element of block `index`, and the one behind its last: block 2 of 9 in blocks of 4 -> 8, 9."""
    return index * size, minimum((index + 1) * size, count)


def tile_list(counts: np.ndarray, tile_rows: np.ndarray, tile_columns: np.ndarray, n: int) -> np.ndarray:
    """
    List the tiles of all experts, longest first; ties keep the order of experts, rows, columns.

    Args:
        counts: int64 [experts], rows of each expert; its rows lie behind those of the experts before it.
        tile_rows: int64 [experts], largest rows of a tile.
        tile_columns: int64 [experts], largest columns of a tile.
        n: columns of the output.

    Returns:
        int64 [tiles, 5]: expert, first row, row behind the last, first column, column behind the last.
        counts [3, 0, 5], tiles of 4 rows, one column block of n=8 ->
        (0: 0-3) (2: 3-7) (2: 7-8), longest first (2: 3-7) (0: 0-3) (2: 7-8).
    """
    row_blocks, column_blocks = n_blocks(counts, tile_rows), n_blocks(n, tile_columns)
    tiles = row_blocks * column_blocks
    expert = np.repeat(np.arange(len(counts)), tiles)
    within = np.arange(len(expert)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    row, row_end = block_bounds(within // column_blocks[expert], counts[expert], tile_rows[expert])
    column, column_end = block_bounds(within % column_blocks[expert], n, tile_columns[expert])
    start = (np.cumsum(counts) - counts)[expert]
    items = np.stack([expert, start + row, start + row_end, column, column_end], axis=1).astype(np.int64)
    return items[np.argsort(-(row_end - row + DECODE_ROWS) * (column_end - column), kind="stable")]
