"""`allocate-bits`: one scheme per row, the least loss and time within the budget."""

from __future__ import annotations

from dataclasses import dataclass

from mxmoe.ir import ModuleOp, Plan, apply_plan
from mxmoe.passes.base import Environment, Pass
from mxmoe.passes.problem import plan_from, problem_of
from mxmoe.solver import Budget, Objective, solve


@dataclass(frozen=True)
class AllocateBits(Pass):
    """
    Choose a scheme for every row of an annotated module, all blocks under one budget.

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
    """What shares one choice: model, layer, role, expert, or linear (expert x role)."""
    tie_gate_up: bool = True
    """Gate and up of an expert take the same scheme, so that they fuse into one launch."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Solve and write the choices; the blocks become allocated."""
        apply_plan(module, self.solve(module))

    def solve(self, module: ModuleOp) -> Plan:
        """Solve for the annotated module without changing it."""
        self.blocks(module, "annotated", "allocated", way="the annotate- passes make annotated blocks")
        problem = problem_of(module, granularity=self.granularity, tie_gate_up=self.tie_gate_up)
        budget = Budget(weight_bits=self.weight_bits, bytes=self.max_bytes, latency_us=self.latency_us)
        solution = solve(problem, budget, objective=Objective(self.r), solver=self.solver)
        objective: dict[str, float | str] = {
            "r": self.r,
            "granularity": self.granularity,
            "tie_gate_up": str(self.tie_gate_up).lower(),
        }
        return plan_from(module, solution, budget.limits(), objective)
