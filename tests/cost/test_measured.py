"""Measured profiles: their files, their figures, and what is said of what nobody measured."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.cost import Measured, Profile, Roofline, cost_model
from mxmoe.cost.measured import DATA, Company
from mxmoe.device import DEVICES
from mxmoe.errors import BadProfile, NoProfile, UnknownName
from mxmoe.ir import Scheme, Tile
from mxmoe.testing import schemes

ANY_SCHEME = schemes()

RTX4090 = Measured(DEVICES["rtx4090"])
PATH = DATA / "rtx4090.json"


def test_schema_of_every_profile() -> None:
    for path in DATA.glob("*.json"):
        data: dict[str, Any] = json.loads(path.read_text())
        assert path.stem == data["device"]
        assert set(data) - {"law"} == {"device", "k", "slots", "fixed_us", "schemes"}
        assert data["slots"] == DEVICES[path.stem].sms
        for scheme, tiles in data["schemes"].items():
            assert str(Scheme.parse(scheme)) == scheme
            for tile, row in tiles.items():
                assert str(Tile.parse(tile)) == tile
                assert 0 < (row["reuse_us"] or row["stream_us"]) <= row["stream_us"]
                if "law" in data:
                    assert set(row) == {"stream_us", "reuse_us"}
                    continue
                assert set(row) == {"stream_us", "reuse_us", "dispersion_us", "warps", "stages"}
                assert len(row["warps"]) == 3
                assert row["dispersion_us"] >= 0


def test_no_row_beats_the_hardware() -> None:
    row = DEVICES["rtx4090"]
    for scheme, tiles in RTX4090.profile.rows.items():
        for tile, time in tiles.items():
            payload = tile.n * 2048 * scheme.weight_bits / 8 * row.sms
            assert payload / time.stream_us / 1e3 <= row.dram_gb_s
            _, multiply = Roofline(row).peak_us(scheme, tile, 2048)
            assert (time.reuse_us or time.stream_us) >= multiply


def test_figures_at_the_measured_depth_are_the_profiles() -> None:
    tile = Tile(128, 128, 128)
    scheme = Scheme.parse("w8a8_sym")
    assert RTX4090.tile_us(scheme, tile, 2048) == 41.4
    assert RTX4090.tile_us(scheme, tile, 2048, 256) == 20.7
    assert RTX4090.tile_us(scheme, tile, 2048, 1024) == 17.32
    # the fixed microsecond stays, the rest halves
    assert RTX4090.tile_us(scheme, tile, 1024) == pytest.approx(1 + 40.4 / 2)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("w4a16_g128_asym", "measured"),
        ("w4a16_g128_asym_fp16", "measured"),
        ("w4a4_sym", "measured"),
        ("w3a16_g128_asym", "scaled from w4a16_g128_asym"),
        ("w8a16_sym", "scaled from w4a16_sym"),
        ("bf16", "scaled from w4a16_sym"),
        ("w4a8_g128_sym", "scaled from w8a8_sym"),
        ("w4a8_g128_sym_iscale", "scaled from w8a8_sym"),
        ("w8a8_e4m3", "roofline"),
    ],
)
def test_fallback_says_so(scheme: str, words: str) -> None:
    assert RTX4090.provenance(Scheme.parse(scheme)) == words
    assert RTX4090.provenance(Scheme.parse(scheme), 2048) == words


def test_extrapolation_says_so() -> None:
    assert RTX4090.provenance(Scheme.parse("w8a8_sym"), 1408).startswith("measured (k=1408 from k=2048")
    assert RTX4090.provenance(Scheme.parse("w8a8_e4m3"), 1408) == "roofline"


def test_a_scheme_without_figures_is_the_roofline_where_it_says_so() -> None:
    fp8, tile = Scheme.parse("w8a8_e4m3"), Tile(64, 128, 128)
    assert RTX4090.tile_us(fp8, tile, 777, 99) == RTX4090.roofline.tile_us(fp8, tile, 777, 99)
    assert RTX4090.tiles(fp8) == RTX4090.roofline.tiles(fp8)


@settings(max_examples=100, deadline=None)
@given(ANY_SCHEME, st.integers(1, 20_000), st.floats(0, 1e5), st.data())
def test_finite_and_never_faster_than_the_peaks(scheme: Scheme, k: int, rows: float, data: st.DataObject) -> None:
    tile = data.draw(st.sampled_from(RTX4090.tiles(scheme)))
    us = RTX4090.tile_us(scheme, tile, k, rows)
    assert math.isfinite(us)
    assert us > 0
    if RTX4090.provenance(scheme).startswith("scaled"):
        assert us >= max(RTX4090.roofline.peak_us(scheme, tile, k, rows))


@settings(max_examples=100, deadline=None)
@given(ANY_SCHEME, st.integers(1, 200), st.integers(1, 5000), st.data())
def test_time_grows_with_depth_and_rows(scheme: Scheme, blocks: int, rows: int, data: st.DataObject) -> None:
    tile = data.draw(st.sampled_from(RTX4090.tiles(scheme)))
    here = RTX4090.tile_us(scheme, tile, 128 * blocks, rows)
    assert here <= RTX4090.tile_us(scheme, tile, 128 * (blocks + 1), rows) * (1 + 1e-12)
    one, more = (math.ceil(r / tile.m) * RTX4090.tile_us(scheme, tile, 2048, r) for r in (rows, rows + tile.m))
    assert one <= more * (1 + 1e-12)


def test_an_unmeasured_tile_is_scaled_from_the_nearest() -> None:
    scheme = Scheme.parse("w8a8_sym")
    half = RTX4090.tile_us(scheme, Tile(128, 64, 128), 2048)
    assert half == pytest.approx(41.4 / 2, rel=0.2)


def test_devices_without_a_profile_are_refused() -> None:
    with pytest.raises(NoProfile, match="rtx4090"):
        cost_model("measured", "h100")
    with pytest.raises(UnknownName, match="measured"):
        cost_model("mesured", "rtx4090")


def test_a_profile_that_is_given_is_used() -> None:
    h100 = Measured(DEVICES["h100"], given=RTX4090.profile)
    scheme, tile = next((scheme, tile) for scheme, tiles in RTX4090.profile.rows.items() for tile in tiles)
    assert h100.tile_us(scheme, tile, 2048) == RTX4090.tile_us(scheme, tile, 2048)
    assert replace(h100, company=Company.LIKE).profile is RTX4090.profile
    assert h100 != Measured(DEVICES["rtx4090"])
    assert hash(h100) == hash(replace(h100))


@given(st.sets(ANY_SCHEME, max_size=4))
def test_company_is_said_of_the_schemes_of_a_launch(present: set[Scheme]) -> None:
    company = Company.of(present)
    assert (company is Company.NONE) == (len(present) < 2)
    packed = any(scheme.act_bits == 16 and scheme.weight_bits < 16 for scheme in present)
    assert (company is Company.PACKED) == (packed and len(present) > 1)


def _edit(**changes: object) -> dict[str, Any]:
    return json.loads(PATH.read_text()) | changes


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"device": "x"},
        _edit(schemes={}),
        _edit(schemes={"w9a9": {}}),
        _edit(schemes={"w8a8_sym": {"m1": {}}}),
        _edit(schemes={"w8a8_sym": {"m1n1k1": {"stream_us": 1}}}),
        _edit(schemes={"w8a8_sym": {"m1n1k1": {"stream_us": -1, "reuse_us": None}}}),
        _edit(schemes={"w8a8_sym": {"m1n1k1": {"stream_us": 0.5, "reuse_us": None}}}),
        _edit(k="deep"),
        _edit(fixed_us=math.nan),
    ],
)
def test_bad_profiles_are_refused(data: object) -> None:
    with pytest.raises(BadProfile, match="here"):
        Profile.parse(data, Path("here"))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(PATH.read_text()[:500])
    with pytest.raises(BadProfile, match=r"cut\.json"):
        Profile.read(cut)


@pytest.mark.parametrize("name", ["bf16", "w8a16_sym", "w5a16_g128_sym"])
def test_wide_weights_without_figures_cost_their_bytes_once(name: str) -> None:
    scheme, source, tile = Scheme.parse(name), Scheme.parse("w4a16_sym"), Tile(64, 128, 128)
    one, many = (RTX4090.tile_us(scheme, tile, 2048, rows) for rows in (64, 64 * 64))
    assert one > RTX4090.tile_us(source, tile, 2048, 64)
    assert many < 1.5 * Roofline(RTX4090.device).tile_us(scheme, tile, 2048, 64 * 64)
