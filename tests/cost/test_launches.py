"""The launches read from a block."""

import dataclasses

import numpy as np
import pytest

from mxmoe.cost import Gemm, block_launches, fuse_gate_up
from mxmoe.errors import BadWorkload
from mxmoe.ir import BankShape, BlockShape, MoeOp, Scheme, Table, banks, build_module, moe_ops

NAMES = ("bf16", "w4a16_g128_asym", "w8a8_sym")
SCHEMES = tuple(map(Scheme.parse, NAMES))


def _block(gated: bool = True) -> MoeOp:
    roles = ("gate", "up", "down") if gated else ("up", "down")
    shapes = (
        BankShape("routed", 4, 2, 48, "silu", gated, {role: f"r.{role}" for role in roles}),
        BankShape("shared", 1, 1, 96, "silu", gated, {role: f"s.{role}" for role in roles}),
    )
    return moe_ops(build_module([BlockShape("b", 32, shapes)], SCHEMES))[0]


def _choose(moe: MoeOp, choices: dict[tuple[str, str], list[int]]) -> None:
    for bank in banks(moe).values():
        for role, op in bank.linears.items():
            op.set_table("choice", Table(("expert",), np.array(choices[bank.name, role], np.int8)))


ROUTED = [0, 1, 2, 1]
EQUAL = {("routed", r): ROUTED for r in ("gate", "up", "down")} | {("shared", r): [2] for r in ("gate", "up", "down")}


def test_gate_and_up_of_every_bank_are_one_launch() -> None:
    moe = _block()
    _choose(moe, EQUAL)
    entry, exit_ = block_launches(moe, 10)
    routed = tuple(SCHEMES[i] for i in ROUTED)
    assert entry == (Gemm(96, 32, (5, 5, 5, 5), routed), Gemm(192, 32, (10,), (SCHEMES[2],)))
    assert exit_ == (Gemm(32, 48, (5, 5, 5, 5), routed), Gemm(32, 96, (10,), (SCHEMES[2],)))


def test_untied_gate_and_up_stay_two_products() -> None:
    moe = _block()
    _choose(moe, EQUAL | {("routed", "up"): [0, 0, 0, 0]})
    entry, _ = block_launches(moe, 10)
    assert [gemm.n for gemm in entry] == [48, 48, 192]


def test_annotated_frequencies_count() -> None:
    moe = _block()
    _choose(moe, EQUAL)
    banks(moe)["routed"].route.set_table("frequency", Table(("expert",), np.array([1.0, 0.5, 0.5, 0.0])))
    entry, _ = block_launches(moe, 8)
    assert entry[0].rows == (8, 4, 4, 0)


def test_choices_from_outside_stand_in_for_tables() -> None:
    moe = _block()
    with pytest.raises(BadWorkload, match="routed gate"):
        block_launches(moe, 8)
    chosen = block_launches(moe, 8, choices=dict(EQUAL))
    _choose(moe, EQUAL)
    assert block_launches(moe, 8) == chosen


def test_experts_without_a_gate() -> None:
    moe = _block(gated=False)
    _choose(moe, EQUAL)
    entry, exit_ = block_launches(moe, 4)
    assert [gemm.n for gemm in entry] == [48, 96]
    assert [gemm.n for gemm in exit_] == [32, 32]


def test_fuse_needs_equal_schemes() -> None:
    gate = Gemm(8, 4, (1, 1), (SCHEMES[0], SCHEMES[1]))
    assert fuse_gate_up({"gate": gate, "up": gate}) == [dataclasses.replace(gate, n=16)]
    other = dataclasses.replace(gate, schemes=(SCHEMES[0], SCHEMES[0]))
    assert fuse_gate_up({"gate": gate, "up": other}) == [gate, other]
    assert fuse_gate_up({"up": gate}) == [gate]
