"""Tables: exact text, value equality, read-only."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from mxmoe.errors import BadTable, ElidedTable
from mxmoe.ir import Table
from mxmoe.ir.table import DTYPES

AXES = ("expert", "scheme", "tile")


def tables() -> st.SearchStrategy[Table]:
    def filled(dtype: np.dtype) -> st.SearchStrategy[Table]:
        shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6)
        return hnp.arrays(dtype, shapes).map(lambda array: Table(AXES[: array.ndim], array))

    return st.sampled_from(list(DTYPES.values())).flatmap(filled)


def through_text(table: Table) -> Table:
    extents = tuple(zip(table.axes, table.shape, strict=True))
    return Table.from_text(extents, table.dtype, table.body())


SPECIALS = np.array([[np.inf, -np.inf, np.nan], [-0.0, 1e-38, 1234567.0], [1e-45, 3.4028235e38, 0.1]])


@given(tables())
@example(Table(("expert",), np.array([1e-38], dtype=np.float32)))
@example(Table(("expert", "scheme"), SPECIALS.astype(np.float32)))
@example(Table(("expert", "scheme"), SPECIALS))
@settings(max_examples=200, deadline=None)
def test_text_is_an_inverse(table: Table) -> None:
    back = through_text(table)
    assert (back.axes, back.dtype, back.shape) == (table.axes, table.dtype, table.shape)
    nan = table.array != table.array
    assert np.array_equal(back.array != back.array, nan)
    assert back.array[~nan].tobytes() == table.array[~nan].tobytes()


@given(st.floats(width=32, allow_nan=False))
def test_every_float32_comes_back(value: float) -> None:
    table = Table(("expert",), np.array([value], dtype=np.float32))
    assert through_text(table) == table


def test_equality_is_by_bits_and_names() -> None:
    zero, minus = (Table(("expert",), np.array([value], dtype=np.float32)) for value in (0.0, -0.0))
    nan = [Table(("expert",), np.array([np.nan], dtype=np.float32)) for _ in range(2)]
    assert zero != minus
    assert nan[0] == nan[1]
    assert hash(nan[0]) == hash(nan[1])
    assert zero != Table(("scheme",), zero.array)
    assert zero != Table(("expert",), zero.array.astype(np.float64))


def test_values_cannot_be_written_and_are_a_copy() -> None:
    mine = np.zeros(3, dtype=np.float32)
    table = Table(("expert",), mine)
    mine[0] = 1
    assert table.array[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        table.array[0] = 1


@pytest.mark.parametrize(
    ("axes", "array"),
    [
        (("expert",), np.zeros((2, 2), dtype=np.float32)),
        (("expert", "expert"), np.zeros((2, 2), dtype=np.float32)),
        (("expert",), np.zeros(2, dtype=np.float16)),
        ((), np.zeros((), dtype=np.float32)),
        (("an expert",), np.zeros(2, dtype=np.float32)),
    ],
)
def test_tables_that_cannot_be(axes: tuple[str, ...], array: np.ndarray) -> None:
    with pytest.raises(BadTable):
        Table(axes, array)


@pytest.mark.parametrize("body", ["1 2", "1 2 three", "1 2 3 4", "1 2 99999"])
def test_text_that_is_no_table(body: str) -> None:
    with pytest.raises(BadTable):
        Table.from_text((("expert", 3),), "i8", body)


def test_elided_text_is_refused_with_the_way_out() -> None:
    with pytest.raises(ElidedTable, match="--full"):
        Table.from_text((("expert", 3),), "f32", None)
