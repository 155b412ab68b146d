"""Marks: met and missed by hand-made times, and nothing claimed of what was not measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import (
    Mark,
    Row,
    all_marks,
    block_marks,
    class_marks,
    expected_us,
    geometric_mean,
    markdown,
    mix_marks,
    parse,
    plan_marks,
    roofline_marks,
    winners,
)
from moe_plans import INT8, W4A8, Plan
from moe_workloads import MODELS, TOKENS, Cell

CELLS = [(model, tokens, part) for model in ("qwen15_moe", "mixtral", "dsv3") for tokens in TOKENS
         for part in ("gate_up", "down")]  # fmt: skip
BLOCKS = [(model, tokens, "block") for model in ("qwen15_moe", "mixtral", "dsv3") for tokens in TOKENS]


def times(contender: str, weight_class: str, us: float, cells: list[tuple[str, int, str]] = CELLS) -> list[Row]:
    return [Row(cell, contender, weight_class, us) for cell in cells]


def by_name(marks: list[Mark]) -> dict[str, Mark]:
    return {mark.name: mark for mark in marks}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.floats(0.1, 10))
@settings(max_examples=50, deadline=None)
def test_geometric_means_scale_and_stay_between(values: list[float], factor: float) -> None:
    mean = geometric_mean(values)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert geometric_mean(value * factor for value in values) == pytest.approx(mean * factor)
    assert math.isnan(geometric_mean([]))


def test_the_fastest_of_ours_meets_the_fastest_peer() -> None:
    rows = [
        *times("ours_w4a16_sym", "4bit", 20.0), *times("ours_w4a8_g128_sym", "4bit", 10.0),
        *times("slow", "4bit", 40.0), *times("fast", "4bit", 14.0), *times("other", "8bit", 1.0),
    ]  # fmt: skip
    marks = by_name(class_marks(rows, times("known", "4bit", 12.0), "4bit"))
    share, mean = marks["4bit products"], marks["4bit products, mean"]
    assert share.found["same run"] == "36 of 36 cells (100%), worst 1.40x"
    assert share.passed == {"same run": True, "published": True}
    assert mean.passed == {"same run": True, "published": False}


@pytest.mark.parametrize(("slow", "passed"), [(3, True), (4, False)])
def test_nine_cells_in_ten_must_be_faster(slow: int, passed: bool) -> None:
    peer = times("peer", "8bit", 10.0)
    ours = [*times("ours_w8a8_sym", "8bit", 11.0, CELLS[:slow]), *times("ours_w8a8_sym", "8bit", 9.0, CELLS[slow:])]
    mark = class_marks([*peer, *ours], [], "8bit")[0]
    assert mark.passed == {"same run": passed, "published": None}
    assert len(mark.misses) == slow
    assert mark.misses[0].endswith("0.909x (same run)")


def test_bf16_may_be_five_percent_slower() -> None:
    peer = times("peer", "bf16", 100.0)
    assert class_marks([*peer, *times("ours_bf16", "bf16", 104.9)], [], "bf16")[0].passed["same run"]
    assert not class_marks([*peer, *times("ours_bf16", "bf16", 105.1)], [], "bf16")[0].passed["same run"]


def test_missing_cells_are_counted() -> None:
    mark = class_marks([*times("peer", "4bit", 2.0), *times("ours_x", "4bit", 1.0, CELLS[:5])], [], "4bit")[0]
    assert "5 of 5 cells (100%), worst 2.00x, 31 not measured" in mark.found["same run"]


def test_fractions_of_rooflines() -> None:
    rows = [
        Row(("dsv3", 1, "gate_up"), "ours_a", "4bit", 10.0, 0.8),
        Row(("dsv3", 1, "gate_up"), "ours_b", "4bit", 11.0, 0.9),
        Row(("mixtral", 64, "gate_up"), "ours_a", "4bit", 10.0, 0.7),
        Row(("qwen15_moe", 1, "gate_up"), "ours_a", "4bit", 10.0, 0.1),
        Row(("mixtral", 8192, "down"), "ours_i", "8bit", 10.0, 0.1, 1500.0, "w8a8_sym"),
        Row(("mixtral", 8192, "down"), "ours_f", "8bit", 11.0, 0.1, 1400.0, "w8a8_e4m3"),
    ]
    decode, prefill = roofline_marks(rows)
    assert decode.passed == {"": False}
    assert decode.found[""] == "1 of 2, worst 0.700"
    assert decode.misses == ["mixtral 64 gate_up: 0.700"]
    # 1400 of fp8's 1475 beats 1500 of int8's 1593
    assert prefill.found[""] == "1 of 1, worst 0.949"


def test_a_mix_of_equals_is_expected_to_cost_the_same() -> None:
    cell = Cell(MODELS["mixtral"], 512, "gate_up")
    plan = (INT8,) * 4 + (W4A8,) * 4
    assert expected_us(cell, plan, {INT8: 100.0, W4A8: 100.0}) == pytest.approx(100.0, rel=0.35)
    assert expected_us(cell, (INT8,) * 8, {INT8: 100.0}) == pytest.approx(100.0)
    cheap = expected_us(cell, plan, {INT8: 100.0, W4A8: 10.0})
    assert 10.0 < cheap < 100.0


def half(name: str, cell: Cell) -> Plan:
    del name
    return ((INT8,) * (cell.model.experts // 2) + (W4A8,) * (cell.model.experts // 2),)


def test_mixed_launches_are_held_against_parts_launches_and_streams() -> None:
    key = ("mixtral", 2048, "down")
    rows = [
        Row(key, name, kind, us)
        for name, kind, us in (
            ("ours_w8a8_sym", "8bit", 100.0), (f"ours_{W4A8}", "4bit", 100.0), ("ours_hot025", "mixed", 90.0),
            ("ours_hot025_split", "mixed", 99.0), ("ours_hot025_streams", "mixed", 81.0),
        )
    ]  # fmt: skip
    parts, split, streams = mix_marks(rows, ("hot:0.25",), half)
    assert parts.passed == {"": True}
    assert split.found[""] == "1 of 1, worst 1.100x"
    assert streams.passed == {"": False}
    assert streams.misses == ["hot:0.25 mixtral 2048 down: 0.900x"]
    nothing = mix_marks([], ("hot:0.25",), half)
    assert [mark.passed[""] for mark in nothing] == [None] * 3


def test_plans_must_win_everywhere_below_and_tie_above() -> None:
    peer = times("peer", "8bit", 100.0)
    ours = [Row(cell, "ours_bits5", "mixed", 100.0 if cell[1] == 8192 else 70.0) for cell in CELLS]
    few, many, mean = plan_marks([*peer, *ours], [])
    assert few.passed["same run"]
    assert many.passed["same run"]
    assert mean.found["same run"] == "1.429x over 6 cells"
    slower = [Row(cell, "ours_bits5", "mixed", 101.0) for cell in CELLS]
    assert [mark.passed["same run"] for mark in plan_marks([*peer, *slower], [])] == [False] * 3


def test_blocks_and_what_they_cost_beyond_their_products() -> None:
    rows = [
        *times("peer", "bf16", 100.0, BLOCKS), *times("ours_bf16", "bf16", 50.0, BLOCKS),
        *times("ours_bf16", "bf16", 22.0),
    ]  # fmt: skip
    marks = by_name(block_marks(rows, []))
    assert marks["block, all classes"].passed == {"same run": True, "published": None}
    fixed = marks["block at 16 tokens, beyond its products"]
    assert fixed.passed == {"": True}
    assert fixed.found[""] == "3 of 3, worst 6.0 us"


def test_it_is_said_which_scheme_won() -> None:
    rows = [
        Row(CELLS[0], "ours_a", "4bit", 1.0, format="a"), Row(CELLS[0], "ours_b", "4bit", 2.0, format="b"),
        Row(CELLS[1], "ours_b", "4bit", 1.0, format="b"), Row(CELLS[2], "ours_b", "4bit", 1.0, format="b"),
        Row(CELLS[2], "peer", "4bit", 0.5, format="c"),
    ]  # fmt: skip
    assert winners(rows) == ["Fastest of ours, 4bit: b in 2, a in 1 of 3 cells."]


def test_an_empty_file_claims_nothing() -> None:
    marks = all_marks([], [], half)
    assert all(verdict is None for mark in marks for verdict in mark.passed.values())
    text = markdown(marks)
    assert text.count("| - | not measured |") == sum(len(mark.found) for mark in marks)


def test_only_rows_that_count_are_read(tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    path.write_text(
        "model,tokens,routing,part,contender,weight_class,format,time_us,fraction,tflops,status\n"
        "dsv3,1,skew,down,a,4bit,w4a16,10.0,0.5,3.0,ok\n"
        "dsv3,1,balanced,down,a,4bit,w4a16,10.0,0.5,3.0,ok\n"
        "dsv3,1,skew,down,b,4bit,w4a16,10.0,0.5,3.0,wrong\n"
        "dsv3,1,skew,down,c,4bit,w4a16,,,,failed: no\n"
        "tiny,1,skew,down,a,4bit,w4a16,10.0,0.5,3.0,ok\n"
    )
    assert parse(path) == [Row(("dsv3", 1, "down"), "a", "4bit", 10.0, 0.5, 3.0, "w4a16")]
