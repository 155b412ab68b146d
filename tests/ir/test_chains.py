"""The verifier: what a block is made of, whatever its stage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from mxmoe.errors import BadText
from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme, banks, build_module, moe_ops, parse_ir, print_ir
from mxmoe.testing import at_stage, modules

ROLES = ("gate", "up", "down")
BANK = BankShape("routed", 4, 2, 64, "silu", True, dict(zip(ROLES, ROLES, strict=True)))
BLOCKS = [BlockShape(name, 128, (BANK,)) for name in ("first", "second")]


@given(modules())
@settings(max_examples=40, deadline=None)
def test_every_block_that_is_built_verifies_and_can_be_walked(module: ModuleOp) -> None:
    module.verify()
    assert all(banks(moe) for moe in moe_ops(module))


def refused(text: str, old: str, new: str, reason: str) -> None:
    assert old in text
    with pytest.raises(BadText, match=reason):
        parse_ir(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("experts=4", "experts=0", "block 'first': bank routed chooses 2 of 0 experts"),
        ("top_k=2", "top_k=5", "bank routed chooses 5 of 4 experts"),
        ('bank="routed"', 'bank="rooted"', "the banks are rooted; they can be routed and shared"),
        ('role="gate"', 'role="gale"', "bank routed is gate, up, down .* not gale, up, down"),
        ('role="up"', 'role="gate"', "not gate, gate, down"),
        ("mxmoe.combine(%down,", "mxmoe.combine(%rows,", "mxmoe.combine of bank routed takes the rows of down"),
        ("mxmoe.yield(%out)", "mxmoe.yield(%x)", "mxmoe.yield takes the combined output of every bank"),
        ("mxmoe.act(%gate, %up)", "mxmoe.act(%up, %gate)", "results of gate and up, in this order"),
        ("(%act, %routing)", "(%gate, %routing)", "down of bank routed takes its rows from mxmoe.act"),
        ("mxmoe.linear(%rows, %routing) role=\"up\"", "mxmoe.linear(%x, %routing) role=\"up\"", "up of bank routed"),
        (
            "mxmoe.combine(%down, %routing) : (tensor<?x128xbf16>, !mxmoe.routing) -> tensor<?x128xbf16>",
            "mxmoe.combine(%down, %routing) : (tensor<?x128xbf16>, !mxmoe.routing) -> tensor<?x128x1xbf16>",
            "hidden tensors of .x128, .x128, .x128, .x128x1",
        ),
        ('block="second"', 'block="first"', "two blocks are named 'first'"),
    ],
)
def test_a_block_that_computes_no_experts_is_refused(old: str, new: str, reason: str) -> None:
    text = print_ir(build_module(BLOCKS, [Scheme(4)]), elide=None)
    yields = "mxmoe.yield(%out) : (tensor<?x128xbf16>)"
    if "x1x" in new:
        text = text.replace(yields, yields.replace("128x", "128x1x"), 1)
    refused(text, old, new, reason)


def test_a_group_gemm_has_a_weight_for_each_of_its_roles() -> None:
    text = print_ir(at_stage(BLOCKS, "lowered", [Scheme(4)]), elide=None)
    refused(text, '["gate", "up"]', '["gate"]', "gate_up of bank routed has 2 results, 1 weights and 0 biases")
    refused(text, '["down"]', '["down"] biases=["a", "b"]', "down of bank routed has 1 results, 1 weights and 2 biases")
