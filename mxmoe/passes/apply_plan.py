"""`apply-plan`: take the choices from a plan in place of solving for them."""

from __future__ import annotations

from dataclasses import dataclass

from mxmoe.errors import MissingInput
from mxmoe.ir import ModuleOp, Plan, apply_plan
from mxmoe.passes.base import EARLIER, Environment, Pass


@dataclass(frozen=True)
class ApplyPlan(Pass):
    """Write a plan's choices into the module; the plan comes from the environment or from a file."""

    name = "apply-plan"
    file: str | None = None
    """Path of a plan; None takes the environment's."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Apply the plan; the blocks become allocated."""
        plan = Plan.load(self.file) if self.file else environment.plan
        self.blocks(module, "lifted", "annotated", "allocated", way=EARLIER)
        if plan is None:
            raise MissingInput(name=self.name, what="a plan", way="give `apply-plan{file=\"plan.json\"}`")
        apply_plan(module, plan)
