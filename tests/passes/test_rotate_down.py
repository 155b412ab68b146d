"""Rotating what goes to down: written at the front, kept to the end, and nothing that is computed changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.eager import EagerBackend
from mxmoe.errors import BadRotation, BadText, PlanMismatch, WrongStage
from mxmoe.ir import (
    BankShape,
    ModuleOp,
    Plan,
    apply_plan,
    banks,
    moe_ops,
    parse_ir,
    plan_of,
    print_ir,
    rotation_blocks,
    rotations,
    rotations_of,
)
from mxmoe.passes import Environment, LowerToGroupGemm, RotateDown, parse_passes, run_passes
from mxmoe.testing import Case, cases, check_pass_on
from mxmoe.testing.agree import relative_error

from .modules import before_and_after, choose, small, small_bank, small_stats


def blocks_of(module: ModuleOp) -> list[int]:
    return [bank.act.hadamard for moe in moe_ops(module) for bank in banks(moe).values()]


def test_blocks_of_sixteen(golden: object) -> None:
    assert golden == before_and_after(RotateDown(16), small(small_bank(bias=("down",)), small_bank("shared", 1)))


@pytest.mark.parametrize("options", ["", "{block=32}", "{block=none}", "{block=4}"])
def test_spelling(options: str) -> None:
    (step,) = parse_passes(f"rotate-down{options}")
    assert parse_passes(str(step)) == (step,)


def test_none_takes_the_whole_width_of_each_bank() -> None:
    wide = BankShape("shared", 1, 1, 48, "silu", False, {"up": "u", "down": "d"})
    module = run_passes(small(small_bank(), wide), [RotateDown(None)], Environment())
    assert blocks_of(module) == [32, 48]
    assert rotations(module) == {"mlp.routed.down": 32, "d": 48}


def test_the_whole_pipeline_keeps_it() -> None:
    text = "rotate-down{block=8},default"
    module = small(blocks=2)
    run_passes(module, parse_passes(text, {"allocate-bits": {"weight_bits": 6.0}}), Environment(small_stats(module)))
    assert moe_ops(module)[0].stage == "lowered"
    assert blocks_of(module) == [8] * 4
    for generic in (False, True):
        assert blocks_of(parse_ir(print_ir(module, elide=None, generic=generic))) == [8] * 4
    assert "hadamard=8" in print_ir(module)


@given(cases("lifted"), st.data())
@settings(max_examples=40, deadline=None)
def test_it_computes_what_it_did(case: Case, data: st.DataObject) -> None:
    widths = [bank.linears["down"].k for bank in banks(moe_ops(case.module)[0]).values()]
    able = set[int].intersection(*(set(rotation_blocks(width)) for width in widths))
    if not able:
        with pytest.raises(BadRotation):
            RotateDown(2).run(case.module, Environment())
        return
    step = RotateDown(data.draw(st.sampled_from(sorted(able))))
    module = check_pass_on(step, case)
    assert set(blocks_of(module)) == {step.block}
    made = [EagerBackend().compile(one, case.weights.rotated(rotations(one))) for one in (case.module, module)]
    for name, routed in case.routings.items():
        args = (name, case.hidden, routed.index, routed.weights)
        one, other = (executable[case.shape.name].trace(*args)["out"] for executable in made)
        assert relative_error(one, other) < 1e-4


def test_a_plan_keeps_it() -> None:
    module = choose(run_passes(small(), [RotateDown(16)], Environment()), 1)
    plan = plan_of(module)
    assert plan.rotations == rotations_of(module) == {("layers.0.mlp", "routed"): 16, ("layers.0.mlp", "shared"): 16}
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.hash != Plan(plan.rows).hash
    fresh = small()
    apply_plan(fresh, plan)
    assert print_ir(fresh, elide=None) == print_ir(module, elide=None)
    again = run_passes(small(), [RotateDown(16)], Environment())
    apply_plan(again, Plan(plan.rows))
    assert blocks_of(again) == [16, 16]
    assert "rotations" not in Plan(plan.rows).to_json()


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        ({("layers.0.mlp", "routed"): 7}, r"layers\.0\.mlp routed: 32 channels cannot be rotated in blocks of 7"),
        ({("layers.9.mlp", "routed"): 8}, r"it rotates layers\.9\.mlp routed, which the module lacks"),
        ({("layers.0.mlp", "shared"): 8}, "in blocks of 8, the module in blocks of 16"),
    ],
)
def test_a_plan_that_rotates_otherwise_is_refused(rotation: dict[tuple[str, str], int], message: str) -> None:
    plan = plan_of(choose(small(), 1))
    module = run_passes(small(), [RotateDown(16)], Environment()) if "blocks of 16" in message else small()
    text = print_ir(module)
    with pytest.raises(PlanMismatch, match=message):
        apply_plan(module, Plan(plan.rows, rotations=rotation))
    assert print_ir(module) == text


@pytest.mark.parametrize("stage", ["allocated", "lowered"])
def test_it_comes_first(stage: str) -> None:
    module = choose(small())
    if stage == "lowered":
        run_passes(module, [LowerToGroupGemm()], Environment())
    with pytest.raises(WrongStage, match=rf"takes lifted blocks, layers\.0\.mlp is {stage}; .*run it first"):
        run_passes(module, [RotateDown(16)], Environment())


def test_a_width_that_does_not_fit_changes_nothing() -> None:
    module = small(small_bank(), BankShape("shared", 1, 1, 20, "silu", False, {"up": "u", "down": "d"}))
    with pytest.raises(BadRotation, match=r"20 channels cannot be rotated in blocks of 32.*blocks of 2, 4, 20 work"):
        run_passes(module, [RotateDown(32)], Environment())
    assert blocks_of(module) == [0, 0]


@pytest.mark.parametrize("block", ["3", "0", "-8", "64"])
def test_text_with_a_rotation_that_cannot_be_is_refused(block: str) -> None:
    text = print_ir(run_passes(small(), [RotateDown(16)], Environment()), elide=None)
    with pytest.raises(BadText, match=rf"mxmoe\.act hadamard={block}: 32 channels cannot be rotated"):
        parse_ir(text.replace("hadamard=16", f"hadamard={block}"))
