"""The picture: which rows stand against which, and that it is drawn of few cells as of many."""

from __future__ import annotations

from pathlib import Path

from draw_group_gemm import draw, pairs
from marks import Row

KEY = ("mixtral", 512, "down")
ROWS = [
    Row(KEY, "ours_w4a16_sym", "4bit", 12.0, 0.5), Row(KEY, "ours_w4a8_g128_sym", "4bit", 10.0, 0.6),
    Row(KEY, "ours_bits5", "mixed", 9.0, 0.7), Row(KEY, "tk_fp8", "8bit", 20.0), Row(KEY, "tk_mxfp4", "4bit", 15.0),
]  # fmt: skip


def test_the_fastest_stand_against_the_fastest_of_both_sources() -> None:
    found = {title: (ours, peers) for title, ours, peers in pairs(ROWS, [Row(KEY, "known", "4bit", 14.0)])}
    ours, peers = found["4-bit weights"]
    assert (ours[KEY].contender, peers[KEY].contender) == ("ours_w4a8_g128_sym", "known")
    ours, peers = found["5-bit plan, 8-bit peer"]
    assert (ours[KEY].contender, peers[KEY].contender) == ("ours_bits5", "tk_fp8")
    assert found["bf16"] == ({}, {})


def test_a_picture_of_few_cells(tmp_path: Path) -> None:
    draw(ROWS, [], tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000
