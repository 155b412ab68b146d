"""Bit maps from allocated modules: labels, order, values."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from mxmoe.errors import NothingChosen
from mxmoe.ir import (
    BankShape,
    BlockShape,
    ModuleOp,
    Plan,
    Scheme,
    Table,
    apply_plan,
    banks,
    build_module,
    moe_ops,
    rows_of,
)
from mxmoe.report import BitMap, bit_map, module_bits, plan_bits, short_names, usage

W2, W4 = Scheme.parse("w2a16_g32_asym"), Scheme.parse("w4a16_g64_sym")


def bank(name: str, experts: int, block: str, *, gated: bool = True) -> BankShape:
    roles = ("gate", "up", "down") if gated else ("up", "down")
    weights = {role: f"{block}.{name}.{role}" for role in roles}
    return BankShape(name, experts, 1, 128, "silu" if gated else "relu", gated, weights)


def blocks_of(*, shared: bool, gated: bool = True) -> ModuleOp:
    shapes = [
        BlockShape(
            block, 64, tuple([bank("routed", 3, block, gated=gated)] + [bank("shared", 1, block, gated=gated)] * shared)
        )
        for block in ("layers.0.mlp", "layers.1.mlp")
    ]
    return build_module(shapes, (W2, W4))


def allocate(module: ModuleOp, wide: set[tuple[str, str, str, int]]) -> ModuleOp:
    """Give W4 to the rows in `wide` and W2 to all others."""
    apply_plan(module, Plan({row: W4 if tuple(row) in wide else W2 for row in rows_of(module)}))
    return module


def drawn(module: ModuleOp, title: str = "") -> BitMap:
    return bit_map(module_bits(module), title, usage(module))


def test_experts_are_ordered_by_use_and_gate_and_up_are_one_row() -> None:
    module = blocks_of(shared=True)
    for moe, frequency in zip(moe_ops(module), ([0.1, 0.7, 0.2], [0.5, 0.2, 0.3]), strict=True):
        banks(moe)["routed"].route.set_table("frequency", Table(("expert",), np.array(frequency)))
    wide = {("layers.0.mlp", "routed", role, 1) for role in ("gate", "up")} | {("layers.1.mlp", "shared", "down", 0)}
    found = drawn(allocate(module, wide), "a plan")
    assert found.title == "a plan"
    assert found.rows == ("0 gate, up", "0 down", "1 gate, up", "1 down")
    two, four = W2.effective_bits(64), W4.effective_bits(64)
    assert found.routed[0] == (four, two, two)
    assert found.routed[1] == (W2.effective_bits(128),) * 3
    assert found.shared == (two, W2.effective_bits(128), two, W4.effective_bits(128))
    assert found.experts == "experts of each block, most used first"


def test_gate_and_up_part_where_they_differ() -> None:
    wide = {("layers.0.mlp", "routed", "gate", 0)}
    found = drawn(allocate(blocks_of(shared=False), wide))
    assert found.rows == ("0 gate", "0 up", "0 down", "1 gate, up", "1 down")
    assert found.routed[0] == (W4.effective_bits(64), W2.effective_bits(64), W2.effective_bits(64))
    assert found.shared == (None,) * 5
    assert found.experts == "expert"


def test_experts_without_a_gate() -> None:
    found = drawn(allocate(blocks_of(shared=True, gated=False), set()))
    assert found.rows == ("0 up", "0 down", "1 up", "1 down")


def test_a_module_without_choices_is_refused() -> None:
    with pytest.raises(NothingChosen, match="run allocate-bits or apply-plan first"):
        module_bits(blocks_of(shared=True))


def test_a_plan_alone_is_drawn_by_its_codes() -> None:
    rows = rows_of(blocks_of(shared=True))
    found = bit_map(plan_bits(Plan(dict.fromkeys(rows, W4))), "")
    assert found.rows == ("0 gate, up", "0 down", "1 gate, up", "1 down")
    assert found.routed == ((4.0, 4.0, 4.0),) * 4
    assert found.shared == (4.0,) * 4


def test_a_block_that_is_only_shared_is_drawn_as_its_experts() -> None:
    module = build_module([BlockShape("mlp", 64, (bank("shared", 1, "mlp"),))], (W2, W4))
    found = drawn(allocate(module, set()))
    assert found.routed == ((W2.effective_bits(64),), (W2.effective_bits(128),))
    assert found.shared == (None, None)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0.mlp", "model.layers.12.mlp"], ["0", "12"]),
        (["moe"], [""]),
        (["a.x", "b.y"], ["a.x", "b.y"]),
        (["a.b", "a"], ["b", ""]),
        ([], []),
    ],
)
def test_what_names_share_is_left_out(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True))
def test_short_names_of_different_names_are_different(names: list[str]) -> None:
    assert len(set(short_names(names))) == len(names)
