"""Tables as text for a terminal and as CSV for a spreadsheet, from one description of the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from mxmoe.errors import RaggedTable

Cell = str | int | float | None
"""None prints as a dash: not measured, or without a meaning here."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title and how its numbers are printed."""

    title: str
    """Printed above; a line break makes a second line, for the unit."""
    spec: str = ""
    """Format specification for numbers, e.g. ".3f" or ",d"; text is printed as it is."""


def text_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> str:
    """
    Align a table: text to the left, numbers and their titles to the right, two blanks between columns.

    An empty row becomes an empty line, to set groups apart. Lines carry no trailing blanks, and the last line ends
    without a line break. Columns [scheme, bits .2f] and rows [["bf16", 16], [], ["w4", 4.5]] give

        scheme   bits
        ------  -----
        bf16    16.00

        w4       4.50

    Raises:
        RaggedTable: a row that is neither empty nor as long as there are columns.
    """
    _check(columns, rows)
    texts = [[_text(cell, column.spec) for cell, column in zip(row, columns, strict=bool(row))] for row in rows]
    titles = [column.title.split("\n") for column in columns]
    height = max((len(lines) for lines in titles), default=0)
    head = [[lines[i - height] if height - i <= len(lines) else "" for lines in titles] for i in range(height)]
    widths = [max(len(line[i]) for line in head + texts if line) for i in range(len(columns))]
    right = [any(isinstance(row[i], int | float) for row in rows if row) for i in range(len(columns))]
    body = [*head, ["-" * width for width in widths], *texts]
    return "\n".join(_line(cells, widths, right) for cells in body)


def csv_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> str:
    """
    Write the same table as CSV: full precision, None as an empty field, titles on one line, no empty rows.

    Raises:
        RaggedTable: a row that is neither empty nor as long as there are columns.
    """
    _check(columns, rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([" ".join(column.title.split()) for column in columns])
    writer.writerows(row for row in rows if row)
    return out.getvalue()


def _check(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    for number, row in enumerate(rows):
        if row and len(row) != len(columns):
            raise RaggedTable(number=number, cells=len(row), columns=len(columns))


def _text(cell: Cell, spec: str) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else format(cell, spec)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if to_right else cell.ljust(width)
        for cell, width, to_right in zip(cells, widths, right, strict=False)  # an empty row has no cells
    )
    return "  ".join(aligned).rstrip()
