"""w0: what it is worth, whole experts only, and what is left of a lowered module."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from xdsl.dialects.builtin import ModuleOp

from mxmoe.backends.eager import EagerBackend
from mxmoe.errors import BadScheme, PlanMismatch
from mxmoe.frontend import places_of
from mxmoe.ir import (
    BankShape,
    BlockShape,
    Scheme,
    apply_plan,
    banks,
    kept_experts,
    moe_ops,
    parse_ir,
    plan_of,
    print_ir,
)
from mxmoe.passes import Environment, LowerToGroupGemm
from mxmoe.quant import quantize
from mxmoe.testing import at_stage, random_weights

W0, W4 = Scheme.parse("w0"), Scheme.parse("w4a16_g8_asym")
EXPERTS, TOP_K = 5, 2


def shape() -> BlockShape:
    weights = {role: f"mlp.routed.{role}" for role in ("gate", "up", "down")}
    biases = {role: f"mlp.routed.{role}.bias" for role in ("gate", "up", "down")}
    bank = BankShape("routed", EXPERTS, TOP_K, 16, weights=weights, biases=biases, act="silu", gated=True)
    return BlockShape("mlp", 8, (bank,))


def allocated(gone: set[int]) -> ModuleOp:
    module = at_stage([shape()], "allocated", (W4, W0))
    plan = plan_of(at_stage([shape()], "allocated", (W4,)))
    rows = {row: W0 if row.expert in gone else W4 for row in plan.rows}
    apply_plan(module, dataclasses.replace(plan, rows=rows))
    return module


def test_it_has_no_bits_and_nothing_to_say_beside() -> None:
    assert str(W0) == "w0"
    assert W0.is_dropped
    assert not W4.is_dropped
    assert W0.effective_bits(128) == 0
    assert not W0.is_float
    assert not W0.is_weight_only
    assert min(W4, W0) == W0
    with pytest.raises(BadScheme, match="not 0; w0 drops an expert"):
        Scheme.parse("w0a8_sym")
    with pytest.raises(BadScheme, match="write w0"):
        Scheme(0, 8, act_format="int")
    with pytest.raises(BadScheme, match="a dropped expert has no codes, and up is to be quantized"):
        quantize(torch.ones(2, 8), W0, name="up")


@given(st.sets(st.integers(0, EXPERTS - 1), max_size=EXPERTS - TOP_K), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_a_lowered_bank_without_experts_gives_what_they_give_as_zeros(gone: set[int], seed: int) -> None:
    module, weights = allocated(gone), random_weights([shape()])
    assert set(plan_of(module).dropped.get(("mlp", "routed"), ())) == gone
    before = EagerBackend().compile(module.clone(), weights)["mlp"]
    kept = kept_experts(module)
    LowerToGroupGemm().run(module, Environment())
    module.verify()
    assert print_ir(parse_ir(print_ir(module, elide=None)), elide=None) == print_ir(module, elide=None)
    bank = banks(moe_ops(module)[0])["routed"]
    assert moe_ops(module)[0].candidates == (W4,)
    assert bank.experts == EXPERTS - len(gone)
    after = EagerBackend().compile(module, weights.keeping(kept))["mlp"]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((7, 8), generator=generator)
    index = torch.stack([torch.randperm(EXPERTS + 1, generator=generator)[:TOP_K] for _ in range(7)])  # 5 is padding
    scores = torch.rand((7, TOP_K), generator=generator)
    places = places_of(EXPERTS, gone)
    moved = index if places is None else places[index]
    found, wanted = after("routed", hidden, moved, scores), before("routed", hidden, index, scores)
    torch.testing.assert_close(found, wanted)
    if places is not None:
        assert bank.route.kept is not None
        assert bank.route.kept.array.tolist() == [e for e in range(EXPERTS) if e not in gone]


def test_a_plan_drops_whole_experts_and_leaves_a_token_its_own() -> None:
    module = at_stage([shape()], "allocated", (W4, W0))
    plan = plan_of(at_stage([shape()], "allocated", (W4,)))
    part = {row: W0 if row.expert == 1 and row.role == "up" else W4 for row in plan.rows}
    with pytest.raises(PlanMismatch, match="w0 takes whole experts, and expert 1 has gate w4a16_g8_asym, up w0"):
        apply_plan(module, dataclasses.replace(plan, rows=part))
    most = {row: W0 if row.expert else W4 for row in plan.rows}
    with pytest.raises(PlanMismatch, match="w0 leaves 1 of 5 experts, and a token takes 2"):
        apply_plan(module, dataclasses.replace(plan, rows=most))
