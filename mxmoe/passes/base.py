"""What a pass is: a frozen dataclass whose fields are its options, and the environment it may read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.passes import ModulePass

from mxmoe.calib import Stats
from mxmoe.errors import MissingInput
from mxmoe.ir import ModuleOp, Plan
from mxmoe.target import TARGETS, Target


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


@dataclass(frozen=True)
class Pass(ModulePass):
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
