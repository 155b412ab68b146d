"""From an annotated module to the solver's problem, and from its solution to a plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mxmoe.errors import MissingInput
from mxmoe.ir import Allocation, LinearOp, ModuleOp, Plan, Scheme, banks, fingerprint, moe_ops, rotations_of, rows_of
from mxmoe.solver import Problem, Solution, tie


def problem_of(module: ModuleOp, *, granularity: str = "linear", tie_gate_up: bool = True) -> Problem:
    """
    Collect the tables of an annotated module into one problem; rows are in the order of `rows_of`.

    All blocks must offer the same candidates. Bits are effective bits per weight, scales and zero points included.

    Raises:
        MissingInput: a linear without sensitivity or cost, or blocks with different candidates.
    """
    candidates = common_candidates(module)
    loss, cost, bits, numel = [], [], [], []
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            for role, op in bank.linears.items():
                where = f"{moe.block} {bank.name} {role}"
                loss.append(_annotation(op, "sensitivity", where))
                cost.append(_annotation(op, "cost", where))
                bits.append(np.tile([scheme.effective_bits(op.k) for scheme in candidates], (op.experts, 1)))
                numel.append(np.full(op.experts, op.n * op.k))
    rows = rows_of(module)
    return Problem(
        np.concatenate(loss),
        np.concatenate(bits),
        np.concatenate(cost),
        numel=np.concatenate(numel),
        groups=tie(rows, granularity, gate_up=tie_gate_up),
        labels=[" ".join(map(str, row)) for row in rows],
    )


def common_candidates(module: ModuleOp) -> tuple[Scheme, ...]:
    """Return the candidates that all blocks share."""
    offered = {moe.candidates for moe in moe_ops(module)}
    if not offered:
        raise MissingInput(name="allocate-bits", what="at least one block", way="lift a module with experts")
    if len(offered) != 1:
        raise MissingInput(name="allocate-bits", what="blocks with the same candidates", way="lift them together")
    return offered.pop()


def plan_from(
    module: ModuleOp, solution: Solution, budget: dict[str, float], objective: dict[str, float | str]
) -> Plan:
    """Name the choices of a solution, and say what it was solved for and from."""
    candidates = common_candidates(module)
    schemes = (candidates[index] for index in solution.choice.tolist())
    allocation = Allocation(
        budget=budget,
        objective=objective,
        solver=solution.solver,
        value=float(solution.objective),
        bound=float(solution.bound),
        gap=float(solution.gap),
        loss=float(solution.loss),
        time_us=float(solution.latency_us or 0.0),
        weight_bits=float(solution.weight_bits),
        nbytes=float(solution.bytes),
        solved_from=fingerprint(module),
    )
    return Plan(dict(zip(rows_of(module), schemes, strict=True)), allocation, rotations_of(module))


def _annotation(op: LinearOp, key: str, where: str) -> NDArray[np.float64]:
    table = op.sensitivity if key == "sensitivity" else op.cost
    if table is None:
        raise MissingInput(name="allocate-bits", what=f"{key} of {where}", way=f"run annotate-{key} first")
    return table.array.astype(np.float64)
