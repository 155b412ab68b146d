"""The strategies draw valid things, and the nasty ones among them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.vendor.pretty import pretty

from mxmoe.ir import BlockShape, ModuleOp, Scheme, Table, banks, moe_ops, parse_ir, print_ir
from mxmoe.testing import SCHEMES, Case, Routed, blocks, cases, modules, random_weights, routings, schemes, tables
from mxmoe.testing.blocks import at_stage


@settings(max_examples=100, deadline=None)
@given(scheme=schemes())
def test_schemes_are_of_the_grammar(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@settings(max_examples=50, deadline=None)
@given(weight_only=schemes(weight_only=True), others=schemes(weight_only=False))
def test_schemes_can_be_narrowed(weight_only: Scheme, others: Scheme) -> None:
    assert weight_only.is_weight_only
    assert not others.is_weight_only


def test_the_list_of_schemes_has_all_families() -> None:
    assert len(set(SCHEMES)) == len(SCHEMES)
    names = {"w3a16_g128_asym", "w1a16_sym_fp16", "w8a8_sym", "w4a8_g128_sym", "w4a4_g128_sym", "w8a8_e4m3", "bf16"}
    assert names <= {str(scheme) for scheme in SCHEMES}


@settings(max_examples=100, deadline=None)
@given(table=tables())
def test_tables_are_valid(table: Table) -> None:
    assert table.axes == ("expert", "scheme")


@pytest.mark.parametrize("wanted", [np.isinf, np.isnan, lambda x: (x == 0) & np.signbit(x)], ids=["inf", "nan", "-0.0"])
def test_tables_hold_what_breaks_text(wanted: object) -> None:
    assert callable(wanted)
    find(tables(dtype=np.float32), lambda table: bool(wanted(table.array).any()))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), experts=st.integers(1, 8))
def test_routings_are_valid(data: st.DataObject, experts: int) -> None:
    top_k = data.draw(st.integers(1, experts))
    routed = data.draw(routings(experts, top_k))
    assert routed.index.dtype == torch.int64
    assert routed.index.shape == routed.weights.shape
    assert routed.index.shape[1] == top_k
    for row in routed.index.tolist():
        chosen = [expert for expert in row if expert != experts]
        assert len(set(chosen)) == len(chosen)
        assert all(0 <= expert < experts for expert in chosen)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda r: len(r.index) == 0,
        lambda r: len(r.index) == 1 and (r.index < 4).all(),
        lambda r: len(r.index) > 3 and (r.index == 4).all(),
        lambda r: len(r.index) > 3 and (r.index == 4).any() and len(r.index.unique()) == 5,
        lambda r: len(r.index) > 3 and (r.index < 4).any() and len(r.index[r.index < 4].unique()) == 1,
    ],
    ids=["no token", "one token", "all padding", "some padding", "one expert"],
)
def test_routings_hold_what_breaks_kernels(wanted: object) -> None:
    assert callable(wanted)
    drawn = find(routings(4, 2), lambda routed: bool(wanted(routed)))
    assert isinstance(drawn, Routed)
    assert drawn.kind in repr(drawn)


@settings(max_examples=30, deadline=None)
@given(shape=blocks())
def test_blocks_have_the_weights_they_name(shape: BlockShape) -> None:
    weights = random_weights([shape])
    for bank in shape.banks:
        for role, name in bank.weights.items():
            n, k = (shape.hidden, bank.intermediate) if role == "down" else (bank.intermediate, shape.hidden)
            assert weights[name].shape == (bank.experts, n, k)
            if role in bank.biases:
                assert weights[bank.biases[role]].shape == (bank.experts, n)


@settings(max_examples=40, deadline=None)
@given(module=modules())
def test_modules_verify_and_round_trip(module: ModuleOp) -> None:
    module.verify()
    text = print_ir(module, elide=None)
    assert print_ir(parse_ir(text), elide=None) == text


@pytest.mark.parametrize("stage", ["lifted", "annotated", "allocated", "lowered"])
def test_modules_of_a_stage_and_the_same_seed(stage: str) -> None:
    shape = find(blocks(), lambda shape: len(shape.banks) == 2 and shape.banks[0].gated)
    candidates = [Scheme.parse("w8a8_sym"), Scheme.parse("bf16")]
    first, again = (at_stage([shape], stage, candidates, 7) for _ in range(2))  # pyright: ignore[reportArgumentType]
    assert {moe.stage for moe in moe_ops(first)} == {stage}
    assert print_ir(first, elide=None) == print_ir(again, elide=None)


def test_lowered_modules_come_fused_and_apart() -> None:
    def roles(module: ModuleOp) -> list[str]:
        return [gemm.role for moe in moe_ops(module) for bank in banks(moe).values() for gemm in bank.gemms]

    shape = find(blocks(), lambda shape: shape.banks[0].gated)
    candidates = [Scheme.parse("w8a8_sym"), Scheme.parse("bf16")]
    drawn = {tuple(roles(at_stage([shape], "lowered", candidates, seed))) for seed in range(20)}
    assert {("gate_up", "down"), ("gate", "up", "down")} <= drawn


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_cases_fit_together(case: Case) -> None:
    moe = moe_ops(case.module)[0]
    assert moe.stage == "lowered"
    assert case.hidden.shape[1] == case.shape.hidden == moe.hidden
    assert {len(routed.index) for routed in case.routings.values()} == {len(case.hidden)}
    assert list(case.routings) == list(banks(moe))
    assert case.shape.name in repr(case)


def test_a_missing_hypothesis_says_what_to_install() -> None:
    script = "import sys; sys.modules['hypothesis'] = None\nimport mxmoe.testing"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "HypothesisMissing: mxmoe.testing needs hypothesis; install the test extra" in done.stderr


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_a_failing_example_prints_as_text(case: Case) -> None:
    assert pretty(case.module) == print_ir(case.module)
    assert pretty(case) == repr(case)
    assert len(pretty(case)) < 5000
