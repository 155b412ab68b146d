"""The work list against a count of every output element."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.numba.tiles import DECODE_ROWS, block_bounds, n_blocks, tile_list


def _coverage(counts: np.ndarray, n: int, items: np.ndarray) -> np.ndarray:
    """How often each output element is computed; -1000 where a tile has rows of another expert."""
    seen = np.zeros((counts.sum(), n), int)
    owner = np.repeat(np.arange(len(counts)), counts)
    for expert, row0, row1, column0, column1 in items:
        assert row0 < row1
        assert column0 < column1
        seen[row0:row1, column0:column1] += np.where(owner[row0:row1, None] == expert, 1, -1000)
    return seen


def test_example() -> None:
    counts, fours, eights = np.array([3, 0, 5]), np.full(3, 4), np.full(3, 8)
    assert tile_list(counts, fours, eights, 8).tolist() == [[2, 3, 7, 0, 8], [0, 0, 3, 0, 8], [2, 7, 8, 0, 8]]


def test_blocks_by_example() -> None:
    assert [n_blocks(count, 4) for count in (0, 1, 4, 5, 9)] == [0, 1, 1, 2, 3]
    assert [tuple(map(int, block_bounds(i, 9, 4))) for i in range(3)] == [(0, 4), (4, 8), (8, 9)]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), experts=st.integers(1, 6), n=st.integers(1, 40))
def test_every_element_once_and_longest_first(data: st.DataObject, experts: int, n: int) -> None:
    def draw(low: int, high: int) -> np.ndarray:
        return np.array(data.draw(st.lists(st.integers(low, high), min_size=experts, max_size=experts)))

    counts, rows, columns = draw(0, 20), draw(1, 9), draw(1, 17)
    items = tile_list(counts, rows, columns, n)
    assert (_coverage(counts, n, items) == 1).all()
    assert (items[:, 2] - items[:, 1] <= rows[items[:, 0]]).all()
    assert (items[:, 4] - items[:, 3] <= columns[items[:, 0]]).all()
    cost = (items[:, 2] - items[:, 1] + DECODE_ROWS) * (items[:, 4] - items[:, 3])
    assert (np.diff(cost) <= 0).all()


def test_all_counts_up_to_five_of_three_experts() -> None:
    rows, columns = np.array([1, 2, 3]), np.array([2, 5, 1])
    for counts in itertools.product(range(6), repeat=3):
        items = tile_list(np.array(counts), rows, columns, 3)
        assert (_coverage(np.array(counts), 3, items) == 1).all(), counts
