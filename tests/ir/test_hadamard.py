"""Which widths can be rotated: Paley's orders against a list by hand, and what is said of others."""

from __future__ import annotations

import pytest

from mxmoe.errors import BadRotation
from mxmoe.ir import check_rotation, hadamard_base, paley_field, rotation_blocks

BASES = {
    1408: 44, 2560: 20, 2816: 44, 2880: 180, 5632: 44, 6400: 100, 10944: 684, 14336: 28,
    768: 12, 1536: 12, 6144: 12, 18432: 36, 896: 28, 1280: 20, 3584: 28, 20480: 20, 832: 52,
}  # fmt: skip


def test_widths_of_models_have_the_smallest_base() -> None:
    assert {n: hadamard_base(n) for n in BASES} == BASES
    assert {hadamard_base(2**m) for m in range(20)} == {1}


def test_the_orders_that_no_construction_gives() -> None:
    # 92 was the smallest that Paley left open; below 300 the others are as in tables of Hadamard matrices
    missing = [n for n in range(4, 300, 4) if hadamard_base(n) is None]
    assert missing == [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]
    assert [n for n in range(-3, 40) if hadamard_base(n)] == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36]


@pytest.mark.parametrize(
    ("order", "field"),
    [(12, (11, 1)), (20, (19, 1)), (36, (17, 1)), (52, (5, 2)), (100, (7, 2)), (92, None), (6, None), (3, None)],
)
def test_fields(order: int, field: tuple[int, int] | None) -> None:
    assert paley_field(order) == field


def test_blocks_divide_and_have_a_matrix() -> None:
    assert rotation_blocks(12) == (2, 4, 12)
    assert rotation_blocks(1408)[-3:] == (352, 704, 1408)
    assert rotation_blocks(7) == ()
    assert rotation_blocks(1) == ()


@pytest.mark.parametrize(
    ("width", "block", "message"),
    [
        (1408, 256, r"1408 channels cannot be rotated in blocks of 256: it must divide; blocks of 64, .*352 work"),
        (92, 92, "no Hadamard matrix of this size is known here; blocks of 2, 4 work"),
        (7, 7, "no block does"),
        (64, 1, "a block has at least 2 channels"),
        (64, -4, "a block has at least 2 channels"),
    ],
)
def test_what_cannot_be_rotated_says_what_can(width: int, block: int, message: str) -> None:
    with pytest.raises(BadRotation, match=message):
        check_rotation(width, block)
