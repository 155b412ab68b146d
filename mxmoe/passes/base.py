"""What a pass is: a frozen dataclass whose fields are its options, and the environment it may read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.passes import ModulePass

from mxmoe.calib import BankStats, Stats
from mxmoe.errors import MissingInput, StatsDoNotFit, WrongStage
from mxmoe.ir import STAGES, Bank, ModuleOp, MoeOp, Plan, Stage, moe_ops
from mxmoe.passes.options import Optioned
from mxmoe.target import TARGETS, Target

EARLIER = "run it earlier"
"""The way out for a pass that comes too late."""


@dataclass(frozen=True)
class Environment:
    """What passes read besides the module. Everything is optional; a pass that needs what is absent says so."""

    stats: Stats | None = None
    """Routing and sensitivity, as observed."""
    target: Target = TARGETS["numba"]
    """Where the plan is to run; its device is the one that costs are taken for."""
    plan: Plan | None = None
    """A plan to apply in place of solving."""

    def need_stats(self, name: str) -> Stats:
        """Return the statistics, or say which pass wants them."""
        if self.stats is None:
            raise MissingInput(name=name, what="statistics", way="observe the model first, or pass `--stats FILE`")
        return self.stats

    def seen(self, name: str, moe: MoeOp, bank: Bank) -> BankStats:
        """
        Return what was observed of one bank.

        Raises:
            MissingInput: there are no statistics.
            NotInStats: they do not have the bank.
            StatsDoNotFit: they are of a bank with another number of experts.
        """
        seen = self.need_stats(name).bank(moe.block, bank.name)
        if seen.experts != bank.experts:
            reason = f"{moe.block} {bank.name} has {bank.experts} experts, {seen.experts} were observed"
            raise StatsDoNotFit(reason=reason)
        return seen


@dataclass(frozen=True)
class Pass(Optioned, ModulePass):
    """
    A named step over a module.

    A subclass is a frozen dataclass with a class variable `name` (kebab-case, as its file) and implements `run`,
    which changes the module in place. Its fields are its options and need defaults:

        allocate-bits{weight-bits=4.25 solver=pulp}     <->     AllocateBits(weight_bits=4.25, solver="pulp")

    The module verifies before and after a pass, not necessarily during it. Options are int, float, bool, str, tuples
    of these, or optional.
    """

    @abstractmethod
    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Change `module` in place."""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Run without an environment: the door through which xDSL's own tools run a pass."""
        self.run(op, Environment())

    def blocks(self, module: ModuleOp, *stages: Stage, way: str) -> list[MoeOp]:
        """
        List the blocks of a module once all of them are seen to be at a stage that this pass takes.

        Raises:
            WrongStage: one is not; nothing has been changed then. `way` is the way out, for the message.
        """
        for moe in moe_ops(module):
            if moe.stage not in stages:
                wanted = " or ".join(stages)
                raise WrongStage(name=self.name, wanted=wanted, block=moe.block, stage=moe.stage, way=way)
        return moe_ops(module)


def advance(moe: MoeOp, stage: Stage) -> None:
    """Bring a block to a stage, unless it is further already: an allocated block may be annotated anew."""
    if STAGES.index(moe.stage) < STAGES.index(stage):
        moe.stage = stage
