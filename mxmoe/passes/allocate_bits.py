"""`allocate-bits`: one scheme per row, the least loss and time within the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mxmoe.errors import BadOption
from mxmoe.ir import ModuleOp, Plan, apply_plan, rows_of
from mxmoe.passes.base import Environment, Pass
from mxmoe.passes.problem import common_candidates, plan_from, problem_of
from mxmoe.solver import Budget, Objective, Problem, Solution, solve, solve_parts

SCOPES = ("model", "layer")


@dataclass(frozen=True)
class AllocateBits(Pass):
    """
    Choose a scheme for every row of an annotated module, all blocks under one budget or each under its own.

    Minimises loss^r * time^(1-r) (MxMoE, ICML 2025, section 3.3): r=1 is the least loss, r=0 the least time. The plan
    is never worse in its objective than the best uniform one, and carries a proved lower bound.
    """

    name = "allocate-bits"
    weight_bits: float | None = 5.0
    """Average effective bits per weight, scales and zero points included; None sets no limit."""
    max_bytes: float | None = None
    """Bytes of codes, scales and zero points."""
    latency_us: float | None = None
    """Sum of the costs, in microseconds."""
    r: float = 0.75
    """Weight of the loss against time, 0 to 1."""
    solver: str = "lagrangian"
    """Name of a solver."""
    granularity: str = "linear"
    """What shares one choice: model, layer, role, expert, or linear (expert x role). With a candidate w0, which takes
    whole experts, linear means expert."""
    tie_gate_up: bool = True
    """Gate and up of an expert take the same scheme, so that they fuse into one launch."""
    budget_per: str = "model"
    """model: the budget is over all blocks; layer: each block has it, as in MxMoE's and MC-MoE's papers."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Solve and write the choices; the blocks become allocated."""
        apply_plan(module, self.solve(module))

    def solve(self, module: ModuleOp) -> Plan:
        """Solve for the annotated module without changing it."""
        self._check()
        self.blocks(module, "annotated", "allocated", way="the annotate- passes make annotated blocks")
        dropping = any(scheme.is_dropped for scheme in common_candidates(module))
        granularity = "expert" if dropping and self.granularity == "linear" else self.granularity
        problem = problem_of(module, granularity=granularity, tie_gate_up=self.tie_gate_up)
        budget = Budget(weight_bits=self.weight_bits, bytes=self.max_bytes, latency_us=self.latency_us)
        solution = self._solve(problem, budget, module)
        objective: dict[str, float | str] = {
            "r": self.r,
            "granularity": granularity,
            "tie_gate_up": str(self.tie_gate_up).lower(),
        }
        if self.budget_per != "model":
            objective["budget_per"] = self.budget_per
        return plan_from(module, solution, budget.limits(), objective)

    def _solve(self, problem: Problem, budget: Budget, module: ModuleOp) -> Solution:
        if self.budget_per == "model":
            return solve(problem, budget, objective=Objective(self.r), solver=self.solver)
        _, parts = np.unique([row.block for row in rows_of(module)], return_inverse=True)
        return solve_parts(problem, parts, budget, objective=Objective(self.r), solver=self.solver)

    def _check(self) -> None:
        """Raise BadOption for budgets that cannot be dealt out."""
        if self.budget_per not in SCOPES:
            option = f"budget-per={self.budget_per}"
            raise BadOption(name=self.name, option=option, reason=f"it is {' or '.join(SCOPES)}")
        shared = {"latency-us": self.latency_us is not None, "granularity=model": self.granularity == "model"}
        for option, is_given in shared.items():
            if is_given and self.budget_per == "layer":
                raise BadOption(name=self.name, option=option, reason="blocks share it; leave budget-per=layer out")
