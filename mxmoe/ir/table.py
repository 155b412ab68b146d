"""The table: a small read-only array with named axes, compared by value, exact in text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxmoe.errors import BadTable, ElidedTable

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "i8": np.dtype(np.int8),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """
    An n-dimensional read-only array whose axes have names.

    `Table(("expert", "scheme"), values)`: `inf` means impossible; an absent table means not computed. Two tables are
    equal when axes, dtype, shape and every bit are (so nan equals nan, and -0.0 differs from 0.0). The text form is
    `expert=2 x scheme=2, f32: "1.0 inf; 2.5 nan"`, rows of the last axis separated by `;`, and parses back exactly.

    Raises:
        BadTable: axis names repeat or do not match the shape, or the dtype is none of f32, f64, i8, i32, i64.
    """

    axes: tuple[str, ...]
    """Names of the axes, outermost first."""
    array: NDArray[Any]
    """The values; never writeable."""

    ELIDE_ABOVE: ClassVar[int] = 16
    """Tables with more values than this are elided in text made for reading."""

    def __init__(self, axes: tuple[str, ...], array: ArrayLike) -> None:
        values = np.array(array)
        if values.dtype not in _NAMES:
            raise BadTable(reason=f"dtype {values.dtype} is none of {', '.join(DTYPES)}")
        if len(set(axes)) != len(axes) or len(axes) != values.ndim or not axes:
            raise BadTable(reason=f"axes {axes} do not name the {values.ndim} axes of shape {values.shape}")
        if not all(axis.isidentifier() for axis in axes):
            raise BadTable(reason=f"axes {axes} must be identifiers")
        values = np.ascontiguousarray(values)
        values.flags.writeable = False
        object.__setattr__(self, "axes", tuple(axes))
        object.__setattr__(self, "array", values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of every axis."""
        return self.array.shape

    @property
    def dtype(self) -> str:
        """Short dtype name: f32, f64, i8, i32 or i64."""
        return _NAMES[self.array.dtype]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table):
            return NotImplemented
        mine, theirs = (self.axes, self.dtype, self.shape), (other.axes, other.dtype, other.shape)
        return mine == theirs and self.array.tobytes() == other.array.tobytes()

    def __hash__(self) -> int:
        return hash((self.axes, self.dtype, self.shape, self.array.tobytes()))

    def head(self) -> str:
        """Axes and dtype: `expert=4 x scheme=2, f32`."""
        axes = " x ".join(f"{name}={extent}" for name, extent in zip(self.axes, self.shape, strict=True))
        return f"{axes}, {self.dtype}"

    def body(self) -> str:
        """All values as text, exactly: numbers separated by spaces, rows of the last axis by `; `."""
        if not self.array.size:
            return ""
        width = self.shape[-1]
        words = self.array.ravel().astype("U32").tolist() if self.dtype == "f32" else _words(self.array)
        rows = (" ".join(words[i : i + width]) for i in range(0, len(words), width))
        return "; ".join(rows)

    def summary(self) -> str:
        """What stands for the values in text made for reading: `elided min=1.5e-05 max=1.75`."""
        if not self.array.size:
            return "elided"
        return f"elided min={self.array.min():.6g} max={self.array.max():.6g}"

    @classmethod
    def from_text(cls, extents: tuple[tuple[str, int], ...], dtype: str, body: str | None) -> Table:
        """
        Build a table from the parts of its text; the inverse of `head` and `body`.

        Raises:
            ElidedTable: `body` is None, the values were not printed.
            BadTable: unknown dtype, a word that is not a number, or a count that does not match the extents.
        """
        axes, shape = tuple(name for name, _ in extents), tuple(extent for _, extent in extents)
        if body is None:
            raise ElidedTable(axes=" x ".join(f"{name}={extent}" for name, extent in extents))
        if dtype not in DTYPES:
            raise BadTable(reason=f"dtype {dtype} is none of {', '.join(DTYPES)}")
        words = body.replace(";", " ").split()
        try:
            values = np.array(words, dtype=np.float64 if dtype == "f32" else DTYPES[dtype])
            with np.errstate(over="ignore"):
                values = values.astype(DTYPES[dtype]).reshape(shape)
        except (ValueError, OverflowError) as error:
            raise BadTable(reason=f"{len(words)} words for {'x'.join(map(str, shape))} {dtype}: {error}") from error
        return cls(axes, values)


def _words(array: NDArray[Any]) -> list[str]:
    return [repr(value) for value in array.ravel().tolist()]
