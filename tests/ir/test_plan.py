"""Plans: JSON is an inverse, applying and reading back are inverses, mismatches are refused."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from mxmoe.errors import BadPlan, PlanMismatch
from mxmoe.ir import (
    Allocation,
    BankShape,
    BlockShape,
    ModuleOp,
    Plan,
    Row,
    Scheme,
    Table,
    apply_plan,
    build_module,
    fingerprint,
    linears,
    moe_ops,
    parse_ir,
    plan_of,
    print_ir,
    rows_of,
)

CANDIDATES = [Scheme.parse(text) for text in ("w2a16_g128_asym", "w4a16_g128_asym", "w8a8_sym")]
ALLOCATION = Allocation(
    {"weight_bits": 5.0}, {"name": "loss_time", "r": 0.75}, "lagrangian", 1.5, 1.25, 0.2, 3.0, 10.0, 4.9, 1e6, "00"
)


def module(experts: int = 3) -> ModuleOp:
    bank = BankShape("routed", experts, 2, 64, "silu", True, {role: role for role in ("gate", "up", "down")})
    return build_module([BlockShape(f"layers.{i}.mlp", 128, (bank,)) for i in range(2)], CANDIDATES)


def plans() -> st.SearchStrategy[Plan]:
    rows = rows_of(module())
    schemes = st.lists(st.sampled_from(CANDIDATES), min_size=len(rows), max_size=len(rows))
    return st.builds(lambda chosen: Plan(dict(zip(rows, chosen, strict=True)), ALLOCATION), schemes)


@given(plans())
@settings(max_examples=30, deadline=None)
def test_json_is_an_inverse(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).hash == plan.hash


@given(plans())
@settings(max_examples=30, deadline=None)
def test_applying_and_reading_back_are_inverses(plan: Plan) -> None:
    target = module()
    apply_plan(target, plan)
    target.verify()
    assert plan_of(target) == plan
    assert plan_of(parse_ir(print_ir(target, elide=None))) == plan


@given(plans(), plans())
def test_the_hash_tells_plans_apart(one: Plan, other: Plan) -> None:
    assert (one.hash == other.hash) == (one == other)


def test_a_row_a_line(tmp_path: Path) -> None:
    rows = rows_of(module())
    plan = Plan(dict.fromkeys(rows, CANDIDATES[0]))
    other = Plan({**plan.rows, rows[4]: CANDIDATES[1]})
    lines = zip(plan.to_json().splitlines(), other.to_json().splitlines(), strict=True)
    assert sum(one != two for one, two in lines) == 1
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[1]"])
def test_files_that_are_no_plan(text: str) -> None:
    with pytest.raises(BadPlan):
        Plan.from_json(text)


def test_a_plan_cut_short_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(Plan(dict.fromkeys(rows_of(module()), CANDIDATES[0])).to_json()[:200])
    with pytest.raises(BadPlan, match=r"plan\.json"):
        Plan.load(path)


def test_plans_for_other_modules_are_refused_and_change_nothing() -> None:
    target = module()
    rows = rows_of(target)
    before = print_ir(target, elide=None)
    good = dict.fromkeys(rows, CANDIDATES[0])
    for bad in (
        {row: good[row] for row in rows[1:]},
        {**good, Row("layers.9.mlp", "routed", "gate", 0): CANDIDATES[0]},
        {**good, rows[0]: Scheme.parse("bf16")},
    ):
        with pytest.raises(PlanMismatch):
            apply_plan(target, Plan(bad))
    assert print_ir(target, elide=None) == before
    assert moe_ops(target)[0].stage == "lifted"


def test_a_module_without_choices_has_no_plan() -> None:
    with pytest.raises(PlanMismatch, match="allocate-bits"):
        plan_of(module())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"routed.gate.1"', '"routed.gate.0"', "'routed.gate.0' is there twice"),
        ('"routed.gate.1"', '"routed.gate.x"', "write bank.role.expert"),
        ('"routed.gate.1"', '"routed.gate.-1"', "write bank.role.expert"),
        ('"routed.gate.1"', '"routed.gate.01"', "write bank.role.expert"),
        ('"routed.gate.1"', '"gate.1"', "write bank.role.expert"),
        ('"w2a16_g128_asym"', '"w2a17"', "'w2a17' is no scheme"),
        ('"w2a16_g128_asym"', "4", "is 4, no scheme"),
        ('"schemes"', '"scheme"', "it has no schemes"),
        ('"gap"', '"gape"', "strange 'gape'|lacks 'gap'"),
        ('"gap": 0.2', '"gap": "0.2"', "gap of its allocation is '0.2'"),
        ('"mxmoe-plan-1"', '"mxmoe-plan-2"', "its format is 'mxmoe-plan-2'"),
    ],
)
def test_a_plan_that_was_spoilt_by_hand_says_where(old: str, new: str, reason: str) -> None:
    text = Plan(dict.fromkeys(rows_of(module()), CANDIDATES[0]), ALLOCATION).to_json()
    assert old in text
    with pytest.raises(BadPlan, match=reason):
        Plan.from_json(text.replace(old, new, 1))


def test_a_file_that_is_no_text_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadPlan, match=r"plan\.json.*UTF-8"):
        Plan.load(path)


def test_a_lowered_module_takes_no_plan() -> None:
    target = module()
    for moe in moe_ops(target):
        moe.stage = "lowered"
    with pytest.raises(PlanMismatch, match="lowered already"):
        apply_plan(target, Plan({}))


def test_what_a_plan_was_solved_from_does_not_depend_on_choices_made_since() -> None:
    target = module()
    for moe in moe_ops(target):
        moe.stage = "annotated"
    before = fingerprint(target)
    apply_plan(target, Plan(dict.fromkeys(rows_of(target), CANDIDATES[0]), ALLOCATION))
    assert fingerprint(target) == before
    op = linears(target)[0]
    op.set_table("cost", Table(("expert", "scheme"), np.ones((3, 3))))
    assert fingerprint(target) != before
