"""The tile: the piece of an output matrix that one unit of work computes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mxmoe.errors import BadTile

_PATTERN = re.compile(r"m(\d+)n(\d+)k(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """
    Extents of one output tile, written `m64n128k64`; `Tile.parse(str(t)) == t`.

    Raises:
        BadTile: an extent that is not positive, or text outside the grammar.
    """

    m: int
    """Rows: routed tokens of one expert."""
    n: int
    """Columns: output channels."""
    k: int
    """Depth of one step along the input channels."""

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1:
            raise BadTile(text=str(self), reason="every extent is at least 1")

    @classmethod
    def parse(cls, text: str) -> Tile:
        """Read a tile from its string form; the inverse of `str`."""
        match = _PATTERN.fullmatch(text)
        if not match:
            raise BadTile(text=text, reason="it does not follow the grammar")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"m{self.m}n{self.n}k{self.k}"
