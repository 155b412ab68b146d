"""Lowering: what fuses, and that nothing that is computed changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from mxmoe.errors import WrongStage
from mxmoe.ir import BlockShape, ModuleOp, Table, banks, build_module, linears, moe_ops
from mxmoe.passes import Environment, LowerToGroupGemm, run_passes
from mxmoe.testing import Case, cases, check_pass_on, random_weights

from .modules import CANDIDATES, before_and_after, choose, small, small_bank


def roles(module: ModuleOp) -> list[str]:
    return [gemm.role for moe in moe_ops(module) for bank in banks(moe).values() for gemm in bank.gemms]


def lowered(module: ModuleOp, **options: bool) -> ModuleOp:
    return run_passes(module, [LowerToGroupGemm(**options)], Environment())


def test_gate_and_up_that_chose_alike_fuse(golden: object) -> None:
    module = choose(small(small_bank(bias=("gate", "up", "down"))), 1)
    assert golden == before_and_after(LowerToGroupGemm(), module)


def test_what_fuses() -> None:
    assert roles(lowered(choose(small()))) == ["gate_up", "down", "gate_up", "down"]
    assert roles(lowered(choose(small()), fuse=False)) == ["gate", "up", "down"] * 2
    assert roles(lowered(choose(small(small_bank(gated=False))))) == ["up", "down"]


def test_one_expert_that_chose_otherwise_keeps_its_bank_apart() -> None:
    module = choose(small())
    linears(module)[1].set_table("choice", Table(("expert",), np.array([0, 0, 1], dtype=np.int8)))
    assert roles(lowered(module)) == ["gate", "up", "down", "gate_up", "down"]


@pytest.mark.parametrize("bias", [("gate",), ("up", "down"), ("down",), ("gate", "up")])
@pytest.mark.parametrize("fuse", [True, False])
def test_no_bias_is_lost_where_only_some_roles_have_one(bias: tuple[str, ...], fuse: bool) -> None:
    module = lowered(choose(small(small_bank(bias=bias))), fuse=fuse)
    gemms = banks(moe_ops(module)[0])["routed"].gemms
    assert {name for gemm in gemms for name in gemm.biases} == {f"mlp.routed.{role}.bias" for role in bias}
    assert all(len(gemm.biases) in (0, len(gemm.weights)) for gemm in gemms)


@given(cases("allocated"))
@settings(max_examples=60, deadline=None)
def test_it_computes_what_it_did(case: Case) -> None:
    module = check_pass_on(LowerToGroupGemm(), case)
    assert {moe.stage for moe in moe_ops(module)} == {"lowered"}
    check_pass_on(LowerToGroupGemm(fuse=False), case)


@given(cases("allocated"))
@settings(max_examples=10, deadline=None)
def test_it_computes_what_it_did_where_one_role_has_a_bias(case: Case) -> None:
    shape = BlockShape(case.shape.name, 64, (small_bank(bias=("gate",)),), case.shape.dtype)
    module = choose(build_module([shape], CANDIDATES), 2)
    hidden, routed = case.hidden[:, :1].expand(-1, 64), case.routings["routed"]
    index = routed.index.clamp(max=3)
    ours = Case(shape, module, random_weights([shape]), hidden, {"routed": type(routed)(index, routed.weights)})
    check_pass_on(LowerToGroupGemm(), ours)


@pytest.mark.parametrize("stage", ["lifted", "lowered"])
def test_only_allocated_blocks_are_lowered(stage: str) -> None:
    module = small() if stage == "lifted" else lowered(choose(small()))
    with pytest.raises(WrongStage, match=rf"takes allocated blocks, layers\.0\.mlp is {stage}; allocate-bits"):
        lowered(module)
