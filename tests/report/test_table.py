"""Tables: alignment, groups, and that CSV reads back."""

from __future__ import annotations

import csv
import io

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mxmoe.errors import RaggedTable
from mxmoe.report import Column, csv_table, text_table
from mxmoe.report.table import Cell

COLUMNS = [Column("scheme"), Column("bits\nper weight", ".2f"), Column("bytes", ",d")]
cells = st.none() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text("abc_ ,\"'", max_size=9)


def test_numbers_stand_right_and_text_left() -> None:
    rows = [["bf16", 16, 7_340_032], [], ["w4a16_g64_asym", 4.5, None]]
    assert text_table(COLUMNS, rows) == (
        "                      bits\n"
        "scheme          per weight      bytes\n"
        "--------------  ----------  ---------\n"
        "bf16                 16.00  7,340,032\n"
        "\n"
        "w4a16_g64_asym        4.50          -"
    )


def test_a_table_without_rows_has_its_head() -> None:
    assert text_table([Column("a"), Column("bc")], []) == "a  bc\n-  --"


@pytest.mark.parametrize("row", [["a"], ["a", 1.0, 2, 3]])
def test_a_ragged_row_is_counted(row: list[Cell]) -> None:
    for table in (text_table, csv_table):
        with pytest.raises(RaggedTable, match=f"row 1 of the table has {len(row)} cells for 3 columns"):
            table(COLUMNS, [["a", 1.0, 2], row])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(cells, min_size=2, max_size=2), max_size=6))
def test_text_keeps_the_columns_apart(rows: list[list[Cell]]) -> None:
    lines = text_table([Column("first"), Column("second")], rows).split("\n")
    assert len(lines) == 2 + len(rows)
    ruler = lines[1]
    start = ruler.index(" ")
    assert set(ruler) == {"-", " "}
    assert all(line[start : start + 2].strip() == "" for line in lines)
    assert all(line == line.rstrip() and len(line) <= len(ruler) for line in lines)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(cells, min_size=2, max_size=2), max_size=6))
def test_csv_reads_back(rows: list[list[Cell]]) -> None:
    text = csv_table([Column("a\nb"), Column("c")], rows)
    head, *body = csv.reader(io.StringIO(text))
    assert head == ["a b", "c"]
    assert len(body) == len(rows)
    for read, row in zip(body, rows, strict=True):
        for found, cell in zip(read, row, strict=True):
            assert found == "" if cell is None else type(cell)(found) == cell


def test_csv_leaves_the_empty_rows_out() -> None:
    assert csv_table([Column("a")], [[1], [], [2]]) == "a\n1\n2\n"
