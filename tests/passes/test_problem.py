"""From tables to the solver's problem, and from its solution to a plan."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings

from mxmoe.ir import ModuleOp, apply_plan, fingerprint, moe_ops, plan_of, rows_of
from mxmoe.passes import plan_from, problem_of
from mxmoe.solver import solve
from mxmoe.testing import modules

from .modules import annotated, small


@given(modules("annotated"))
@settings(max_examples=30, deadline=None)
def test_rows_are_those_of_the_plan_and_bits_those_of_the_schemes(module: ModuleOp) -> None:
    problem, rows = problem_of(module), rows_of(module)
    candidates = moe_ops(module)[0].candidates
    assert problem.loss.shape == problem.bits.shape == (len(rows), len(candidates))
    assert problem.numel is not None
    for row, bits, numel in zip(rows, problem.bits, problem.numel, strict=True):
        moe = next(moe for moe in moe_ops(module) if moe.block == row.block)
        op = next(op for op in moe.body.block.ops if op.name == "mxmoe.linear"
                  and (op.bank_name, op.role) == (row.bank, row.role))  # fmt: skip
        np.testing.assert_array_equal(bits, [scheme.effective_bits(op.k) for scheme in candidates])
        assert numel == op.n * op.k


def test_a_solution_becomes_a_plan_that_says_where_it_is_from() -> None:
    module = annotated(small(blocks=2))
    solution = solve(problem_of(module), 5.0, objective="loss")
    plan = plan_from(module, solution, {"weight_bits": 5.0}, {"r": 1.0})
    assert list(plan.rows) == rows_of(module)
    assert plan.allocation is not None
    assert plan.allocation.solved_from == fingerprint(module)
    assert (plan.allocation.loss, plan.allocation.nbytes) == (solution.loss, solution.bytes)
    apply_plan(module, plan)
    assert plan_of(module) == plan
