"""The verifier: what each stage admits and demands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from xdsl.utils.exceptions import VerifyException

from mxmoe.ir import BankShape, BlockShape, LinearOp, ModuleOp, Scheme, Stage, Table, build_module, linears, moe_ops

CANDIDATES = [Scheme.parse(text) for text in ("w4a16_g128_asym", "w8a8_sym")]
EXPERTS = 4


def module(stage: Stage) -> ModuleOp:
    bank = BankShape("routed", EXPERTS, 2, 64, "silu", True, {role: role for role in ("gate", "up", "down")})
    built = build_module([BlockShape("mlp", 128, (bank,))], CANDIDATES)
    for moe in moe_ops(built):
        moe.stage = stage
    if stage in ("allocated", "lowered"):
        for op in linears(built):
            op.set_table("choice", choice())
    return built


def choice(value: int = 0, experts: int = EXPERTS, dtype: type = np.int8) -> Table:
    return Table(("expert",), np.full(experts, value, dtype=dtype))


def scores(experts: int = EXPERTS, schemes: int = 2) -> Table:
    return Table(("expert", "scheme"), np.zeros((experts, schemes), dtype=np.float32))


@pytest.mark.parametrize("stage", ["lifted", "annotated", "allocated"])
def test_a_block_of_each_stage_verifies(stage: Stage) -> None:
    module(stage).verify()


def complain(stage: Stage, change: Callable[[LinearOp], None], complaint: str) -> None:
    built = module(stage)
    change(linears(built)[0])
    with pytest.raises(VerifyException, match=complaint):
        built.verify()


@pytest.mark.parametrize(
    ("stage", "change", "complaint"),
    [
        ("lifted", lambda op: op.set_table("cost", scores()), "does not admit"),
        ("lifted", lambda op: op.set_table("choice", choice()), "does not admit"),
        ("annotated", lambda op: op.set_table("choice", choice()), "does not admit"),
        ("allocated", lambda op: op.set_table("choice", None), "lacks choice"),
        ("allocated", lambda op: op.set_table("choice", choice(2)), "outside the 2"),
        ("allocated", lambda op: op.set_table("choice", choice(-1)), "outside the 2"),
        ("allocated", lambda op: op.set_table("choice", choice(experts=3)), "expert=4"),
        ("allocated", lambda op: op.set_table("choice", choice(dtype=np.float32)), "indices"),
        ("annotated", lambda op: op.set_table("cost", scores(schemes=3)), "scheme=2"),
        ("annotated", lambda op: op.set_table("cost", Table(("scheme", "expert"), np.zeros((4, 2)))), "expert=4"),
    ],
)
def test_what_a_stage_forbids(stage: Stage, change: Callable[[LinearOp], None], complaint: str) -> None:
    complain(stage, change, complaint)


def test_linears_do_not_belong_in_a_lowered_block() -> None:
    with pytest.raises(VerifyException, match="whose products are"):
        module("lowered").verify()
