"""Device rows: figures, sources, units."""

import copy
import dataclasses

import pytest

from mxmoe.device import DEVICES, FIGURES, UNITS, Device, device, unit_of
from mxmoe.errors import BadDevice, UnknownName
from mxmoe.ir import Scheme


@pytest.mark.parametrize("row", DEVICES.values(), ids=str)
def test_every_figure_has_a_source(row: Device) -> None:
    for name in FIGURES:
        assert row.source[name]
    assert row.source["tops"]
    assert set(row.tops) <= set(UNITS)


@pytest.mark.parametrize("row", DEVICES.values(), ids=str)
def test_units_are_ordered_by_width(row: Device) -> None:
    assert row.peak_tops("bf16") == row.peak_tops("fp16") < row.peak_tops("int8")
    if row.peak_tops("int4"):
        assert row.peak_tops("int4") >= row.peak_tops("int8")


def test_units_follow_from_clock_and_sms() -> None:
    # operations per clock and SM of the dense bf16 unit, by generation
    per_clock = {"rtx4090": 512, "rtx3090": 512, "a100": 2048, "h100": 4096, "h200": 4096, "l40s": 1024}
    assert set(per_clock) == set(DEVICES)
    for name, operations in per_clock.items():
        row = DEVICES[name]
        assert row.sms * row.boost_ghz * operations / 1e3 == pytest.approx(row.peak_tops("bf16"), rel=0.02)


@pytest.mark.parametrize(
    ("scheme", "unit"),
    [
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("w4a16_g128_asym", "bf16"),
        ("w4a16_g128_asym_fp16", "fp16"),
        ("w8a8_sym", "int8"),
        ("w4a8_g128_sym", "int8"),
        ("w5a5_sym", "int8"),
        ("w8a4_sym", "int8"),
        ("w4a4_g128_sym", "int4"),
        ("w2a4_sym", "int4"),
        ("w8a8_e4m3", "fp8"),
        ("w4a8_g128_sym_e4m3", "fp8"),
    ],
)
def test_unit_of(scheme: str, unit: str) -> None:
    assert unit_of(Scheme.parse(scheme)) == unit


def test_absent_units_cannot_run() -> None:
    w4a4, fp8 = Scheme.parse("w4a4_sym"), Scheme.parse("w8a8_e4m3")
    assert {name for name, row in DEVICES.items() if not row.runs(w4a4)} == {"h100", "h200"}
    assert {name for name, row in DEVICES.items() if not row.runs(fp8)} == {"rtx3090", "a100"}


def test_a_name_is_read_in_any_case_and_with_blanks() -> None:
    assert device("RTX 4090") is device("rtx4090")
    assert device("L40S") is DEVICES["l40s"]


def test_unknown_device_answers_with_near_names() -> None:
    with pytest.raises(UnknownName, match="rtx4090"):
        device("rtx4900")


@pytest.mark.parametrize(
    "change",
    [
        {"sms": 0},
        {"dram_gb_s": float("nan")},
        {"tops": {"bf16": -1.0}},
        {"tops": {"int3": 1.0}},
        {"source": {}},
    ],
)
def test_bad_rows_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadDevice, match="rtx4090"):
        dataclasses.replace(DEVICES["rtx4090"], **change)


def test_rows_are_plain_values() -> None:
    row = DEVICES["h200"]
    assert copy.deepcopy(row) == row
    assert hash(copy.copy(row)) == hash(row)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.sms = 1  # pyright: ignore[reportAttributeAccessIssue]
