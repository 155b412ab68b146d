"""Plans into modules and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings

from mxmoe.errors import MissingInput, PlanMismatch, WrongStage
from mxmoe.ir import ModuleOp, Plan, allocation_of, moe_ops, plan_of, print_ir, rows_of
from mxmoe.passes import AllocateBits, ApplyPlan, Environment, LowerToGroupGemm, parse_passes, run_passes
from mxmoe.testing import modules

from .modules import annotated, before_and_after, choose, copy, small, small_bank


def test_a_plan_by_hand(golden: object) -> None:
    module = small(small_bank(gated=False))
    candidates = moe_ops(module)[0].candidates
    plan = Plan({row: candidates[row.expert] for row in rows_of(module)})
    assert golden == before_and_after(ApplyPlan(), module, Environment(plan=plan))


@given(modules("allocated"))
@settings(max_examples=40, deadline=None)
def test_applying_what_was_read_out_changes_nothing(module: ModuleOp) -> None:
    text = print_ir(module, elide=None)
    run_passes(module, [ApplyPlan()], Environment(plan=plan_of(module)))
    assert print_ir(module, elide=None) == text


@given(modules("allocated"))
@settings(max_examples=25, deadline=None)
def test_what_was_applied_is_read_out(module: ModuleOp) -> None:
    plan = Plan.from_json(plan_of(module).to_json())
    assert plan_of(run_passes(copy(module), [ApplyPlan()], Environment(plan=plan))) == plan


def test_a_file_is_an_option_of_the_pass(tmp_path: Path) -> None:
    plan = AllocateBits().solve(annotated())
    plan.save(tmp_path / "my plan.json")
    steps = parse_passes(f'apply-plan{{file="{tmp_path}/my plan.json"}}')
    assert plan_of(run_passes(small(), steps, Environment())) == plan


def test_a_plan_by_hand_does_not_keep_the_allocation_of_the_one_before() -> None:
    module = annotated()
    run_passes(module, [AllocateBits()], Environment())
    assert allocation_of(module) is not None
    run_passes(module, [ApplyPlan()], Environment(plan=Plan(plan_of(module).rows)))
    assert allocation_of(module) is None


def test_what_does_not_fit_is_refused() -> None:
    plan = plan_of(choose(small()))
    with pytest.raises(MissingInput, match=r"apply-plan needs a plan"):
        run_passes(small(), [ApplyPlan()], Environment())
    with pytest.raises(PlanMismatch, match="the plan lacks"):
        run_passes(small(blocks=2), [ApplyPlan()], Environment(plan=plan))
    lowered = run_passes(choose(small()), [LowerToGroupGemm()], Environment())
    with pytest.raises(WrongStage, match=r"layers\.0\.mlp is lowered"):
        run_passes(lowered, [ApplyPlan()], Environment(plan=plan))
