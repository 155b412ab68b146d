"""Allocation: never worse than uniform, within the budget, tied as asked, and clear about what is missing."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from mxmoe.errors import (
    BadOption,
    BadProblem,
    InfeasibleBudget,
    MissingInput,
    NoPossibleScheme,
    UnknownName,
    WrongStage,
)
from mxmoe.ir import ModuleOp, Plan, Scheme, Table, build_module, linears, moe_ops, plan_of
from mxmoe.passes import AllocateBits, Environment, problem_of, run_passes
from mxmoe.testing import modules

from .modules import CANDIDATES, annotated, before_and_after, small, small_bank


def uniform_values(module: ModuleOp, budget: float, r: float) -> list[float]:
    """Objective of each uniform plan that is possible and within the budget."""
    problem = problem_of(module)
    assert problem.cost is not None
    assert problem.numel is not None
    values = []
    for scheme in range(problem.loss.shape[1]):
        loss, time = problem.loss[:, scheme].sum(), problem.cost[:, scheme].sum()
        bits = (problem.bits[:, scheme] * problem.numel).sum() / problem.numel.sum()
        if np.isfinite([loss, time]).all() and bits <= budget:
            values.append(float(loss**r * time ** (1 - r)))
    return values


def test_allocation(golden: object) -> None:
    module = annotated(small(small_bank(gated=False)))
    assert golden == before_and_after(AllocateBits(weight_bits=5.5, r=1.0), module)


@given(modules("annotated"), st.floats(2, 17), st.sampled_from((0.0, 0.5, 0.75, 1.0)))
@settings(max_examples=60, deadline=None)
def test_never_worse_than_uniform_within_the_budget_and_above_its_bound(
    module: ModuleOp, bits: float, r: float
) -> None:
    try:
        plan = AllocateBits(weight_bits=bits, r=r, tie_gate_up=False).solve(module)
    except (InfeasibleBudget, NoPossibleScheme):
        assert not uniform_values(module, bits, r)
        return
    reached = plan.allocation
    assert reached is not None
    assert reached.weight_bits <= bits * (1 + 1e-9)
    assert reached.bound <= reached.value * (1 + 1e-9)
    assert all(reached.value <= value * (1 + 1e-9) for value in uniform_values(module, bits, r))


def schemes_by(plan: Plan, *fields: str) -> list[set[Scheme]]:
    """The schemes of rows that agree in some fields."""
    found: dict[tuple[object, ...], set[Scheme]] = {}
    for row, scheme in plan.rows.items():
        found.setdefault(tuple(getattr(row, field) for field in fields), set()).add(scheme)
    return list(found.values())


@pytest.mark.parametrize(
    ("granularity", "fields"),
    [("model", ()), ("layer", ("block",)), ("expert", ("block", "bank", "expert"))],
)
def test_granularity_says_what_shares_a_choice(granularity: str, fields: tuple[str, ...]) -> None:
    module = annotated(small(blocks=2))
    free = AllocateBits(weight_bits=5.5).solve(module)
    tied = AllocateBits(weight_bits=5.5, granularity=granularity).solve(module)
    assert all(len(schemes) == 1 for schemes in schemes_by(tied, *fields))
    assert any(len(schemes) > 1 for schemes in schemes_by(free, *fields))
    assert free.allocation is not None
    assert tied.allocation is not None
    assert free.allocation.value <= tied.allocation.value


def test_gate_and_up_are_tied_unless_told_otherwise() -> None:
    module = annotated()
    gate, up = linears(module)[:2]
    assert up.sensitivity is not None
    up.set_table("sensitivity", type(up.sensitivity)(up.sensitivity.axes, up.sensitivity.array * 1000))
    tied, free = (AllocateBits(weight_bits=5.0, tie_gate_up=tie).solve(module) for tie in (True, False))

    def differ(plan: Plan) -> bool:
        rows = {row: scheme for row, scheme in plan.rows.items() if row.role == "gate"}
        return any(plan.rows[row._replace(role="up")] != scheme for row, scheme in rows.items())

    assert gate.role == "gate"
    assert not differ(tied)
    assert differ(free)


def test_the_choices_written_are_those_of_the_plan() -> None:
    module = annotated()
    plan = AllocateBits(weight_bits=4.0).solve(module)
    assert moe_ops(module)[0].stage == "annotated"
    run_passes(module, [AllocateBits(weight_bits=4.0)], Environment())
    assert plan_of(module) == plan
    assert plan.allocation is not None
    assert plan.allocation.budget == {"weight_bits": 4.0}
    assert plan.allocation.objective == {"r": 0.75, "granularity": "linear", "tie_gate_up": "true"}


def test_solving_again_replaces_the_choices() -> None:
    module = annotated()
    run_passes(module, [AllocateBits(weight_bits=4.0), AllocateBits(weight_bits=None, r=1.0)], Environment())
    assert set(plan_of(module).rows.values()) == {moe_ops(module)[0].candidates[-1]}


def test_an_infeasible_budget_says_the_smallest_feasible_one() -> None:
    module = annotated()
    smallest = AllocateBits(weight_bits=None, r=0.0).solve(module)  # the narrowest is the fastest here
    assert smallest.allocation is not None
    least = f"smallest feasible weight_bits is {smallest.allocation.weight_bits:g}"
    with pytest.raises(InfeasibleBudget, match=least):
        AllocateBits(weight_bits=1.0).solve(module)
    with pytest.raises(InfeasibleBudget, match="latency_us"):
        AllocateBits(weight_bits=None, latency_us=1.0).solve(module)
    with pytest.raises(InfeasibleBudget, match="bytes"):
        AllocateBits(weight_bits=None, max_bytes=10.0).solve(module)


@pytest.mark.parametrize("key", ["sensitivity", "cost"])
def test_a_missing_table_names_the_pass_that_makes_it(key: str) -> None:
    module = annotated()
    linears(module)[4].set_table(key, None)
    wanted = rf"allocate-bits needs {key} of layers.0.mlp shared up; run annotate-{key} first"
    with pytest.raises(MissingInput, match=wanted):
        run_passes(module, [AllocateBits()], Environment())


def test_a_row_that_cannot_be_solved_is_named() -> None:
    module = annotated()
    op = linears(module)[2]
    assert op.sensitivity is not None
    values = op.sensitivity.array.copy()
    values[1, 0] = np.nan
    op.set_table("sensitivity", Table(op.sensitivity.axes, values))
    with pytest.raises(BadProblem, match=r"\(layers\.0\.mlp routed down 1\) is nan"):
        AllocateBits().solve(module)
    values[1] = np.inf
    op.set_table("sensitivity", Table(op.sensitivity.axes, values))
    with pytest.raises(NoPossibleScheme, match=r"layers\.0\.mlp routed down 1"):
        AllocateBits().solve(module)


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(WrongStage, match=r"layers\.0\.mlp is lifted; the annotate- passes"):
        AllocateBits().solve(small())
    with pytest.raises(MissingInput, match="at least one block"):
        AllocateBits().solve(build_module([], []))
    mixed, turned = annotated(small(blocks=2)), small(candidates=CANDIDATES[::-1])
    moe_ops(mixed)[1].properties["candidates"] = moe_ops(turned)[0].properties["candidates"]
    with pytest.raises(MissingInput, match="same candidates"):
        AllocateBits().solve(mixed)
    with pytest.raises(UnknownName, match="did you mean lagrangian"):
        AllocateBits(solver="lagrange").solve(annotated())
    with pytest.raises(UnknownName, match="did you mean linear"):
        AllocateBits(granularity="linea").solve(annotated())


def test_a_budget_per_layer_is_kept_in_every_layer() -> None:
    module = annotated(small(blocks=3))
    for index, op in enumerate(linears(module)):
        assert op.sensitivity is not None
        op.set_table("sensitivity", Table(op.sensitivity.axes, op.sensitivity.array * 3.0 ** (index // 6)))
    apart = AllocateBits(weight_bits=4.5, r=1.0, budget_per="layer").solve(module)
    joint = AllocateBits(weight_bits=4.5, r=1.0).solve(module)
    assert apart.allocation is not None
    assert joint.allocation is not None
    assert joint.allocation.loss < apart.allocation.loss
    assert apart.allocation.objective["budget_per"] == "layer"
    assert "budget_per" not in joint.allocation.objective
    bits = {scheme: scheme.effective_bits(64) for scheme in set(joint.rows.values()) | set(apart.rows.values())}

    def average(plan: Plan, block: str) -> float:
        own = [bits[scheme] for row, scheme in plan.rows.items() if row.block == block]
        return sum(own) / len(own)

    blocks = [moe.block for moe in moe_ops(module)]
    assert all(average(apart, block) <= 4.55 for block in blocks)  # per channel, down has a little more per weight
    assert max(average(joint, block) for block in blocks) > 4.55
    alone = AllocateBits(weight_bits=4.5, r=1.0).solve(annotated(small()))
    assert [s for row, s in apart.rows.items() if row.block == blocks[0]] == list(alone.rows.values())


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (AllocateBits(budget_per="block"), "budget-per=block: it is model or layer"),
        (AllocateBits(budget_per="layer", latency_us=5.0), "latency-us: blocks share it"),
        (AllocateBits(budget_per="layer", granularity="model"), "granularity=model: blocks share it"),
    ],
)
def test_what_blocks_share_is_not_dealt_out(step: AllocateBits, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        step.solve(annotated())
