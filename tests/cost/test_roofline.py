"""Laws of the roofline on every device row."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.cost import Roofline
from mxmoe.cost.roofline import REACHED, decode_operations
from mxmoe.device import DEVICES, Device
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme, Tile
from mxmoe.testing import schemes

ANY_SCHEME = schemes()

DEVICE = st.sampled_from(list(DEVICES.values()))
TILES = st.builds(Tile, st.sampled_from((16, 48, 64, 128)), st.sampled_from((64, 128, 256)), st.just(64))


@settings(max_examples=100, deadline=None)
@given(DEVICE, ANY_SCHEME, st.integers(1, 20_000), st.floats(0, 1e5))
def test_finite_exactly_where_the_unit_exists(row: Device, scheme: Scheme, k: int, rows: float) -> None:
    model = Roofline(row)
    assert bool(model.tiles(scheme)) == row.runs(scheme)
    us = model.tile_us(scheme, Tile(16, 128, 64), k, rows)
    assert us > 0
    assert math.isfinite(us) == row.runs(scheme)


@settings(max_examples=50, deadline=None)
@given(DEVICE, ANY_SCHEME, TILES, st.integers(1, 64), st.integers(1, 64))
def test_time_grows_with_depth(row: Device, scheme: Scheme, tile: Tile, blocks: int, more: int) -> None:
    model = Roofline(row)
    shallow, deep = (model.tile_us(scheme, tile, 128 * b) for b in (blocks, blocks + more))
    assert shallow <= deep


@settings(max_examples=50, deadline=None)
@given(DEVICE, st.integers(1, 7), TILES, st.sampled_from((None, 128)), st.booleans(), st.floats(0, 5000))
def test_time_grows_with_weight_bits(
    row: Device, bits: int, tile: Tile, group: int | None, symmetric: bool, rows: float
) -> None:
    model = Roofline(row)
    narrow, wide = (Scheme(b, 16, group, symmetric) for b in (bits, bits + 1))
    assert model.tile_us(narrow, tile, 2048, rows) <= model.tile_us(wide, tile, 2048, rows)


@settings(max_examples=50, deadline=None)
@given(DEVICE, ANY_SCHEME, TILES, st.integers(1, 40))
def test_further_row_tiles_are_cheaper_each_not_together(row: Device, scheme: Scheme, tile: Tile, count: int) -> None:
    model = Roofline(row)
    if row.runs(scheme):
        few, many = (model.tile_us(scheme, tile, 2048, c * tile.m) for c in (count, count + 1))
        assert many <= few
        assert (count + 1) * many >= count * few * (1 - 1e-12)


def test_one_tile_by_hand() -> None:
    # 128 x 2048 four-bit weights with a float32 scale per channel: 1.008 of 8 microseconds of one SM's memory share
    row = DEVICES["rtx4090"]
    scheme, tile = Scheme.parse("w4a16_sym"), Tile(16, 128, 64)
    memory = 128 * (2048 / 2 + 4) / (1008e3 * REACHED["dram"] / 128)
    decode = 128 * 2048 / (64 * 2.52e3)
    assert Roofline(row).tile_us(scheme, tile, 2048) == pytest.approx(memory + decode, rel=1e-12)


def test_integer_scales_leave_one_partial_sum_and_multiply_weights() -> None:
    tile, k = Tile(16, 128, 128), 2048
    names = ("w4a8_sym", "w4a8_g128_sym", "w4a8_g128_sym_iscale")
    alone, grouped, whole = (decode_operations(Scheme.parse(name), tile, k) for name in names)
    assert alone == 128 * k
    assert grouped == alone + 16 * 128 * (k // 128)
    assert whole == alone * 1.5
    # so that they pay with many rows to a tile, and not with few
    wide = [decode_operations(Scheme.parse(name), Tile(128, 128, 128), k) for name in names]
    assert whole > grouped
    assert wide[2] < wide[1]


def test_a_big_tile_is_bound_by_the_matrix_unit() -> None:
    row = DEVICES["h200"]
    us = Roofline(row).tile_us(Scheme.parse("w8a8_sym"), Tile(128, 128, 128), 4096, 8192)
    assert us == pytest.approx(2 * 128 * 128 * 4096 / (1978.9e6 * REACHED["int8"] / 132), rel=1e-12)


@pytest.mark.parametrize(("k", "rows"), [(0, None), (64, -1.0), (64, math.nan), (64, math.inf)])
def test_nonsense_is_refused(k: int, rows: float | None) -> None:
    with pytest.raises(BadWorkload):
        Roofline(DEVICES["a100"]).tile_us(Scheme.parse("bf16"), Tile(16, 64, 64), k, rows)
