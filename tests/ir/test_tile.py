"""Tiles: the string form is an inverse, nonsense is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mxmoe.errors import BadTile
from mxmoe.ir import Tile

EXTENTS = st.integers(1, 4096)


@given(st.builds(Tile, EXTENTS, EXTENTS, EXTENTS))
def test_text_is_an_inverse(tile: Tile) -> None:
    assert Tile.parse(str(tile)) == tile


@pytest.mark.parametrize("text", ["", "m0n1k1", "64x128x64", "m64n128", "m64n128k64 "])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(BadTile):
        Tile.parse(text)
