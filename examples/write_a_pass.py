"""A pass of your own: the experts used most keep 8 bits, and the budget still holds; see docs/write-a-pass.md."""

from dataclasses import dataclass

import numpy as np

from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme, Table, banks, plan_of
from mxmoe.passes import PASSES, Environment, Pass, parse_passes, run_passes
from mxmoe.testing import at_stage, check_pass, registered


@dataclass(frozen=True)
class ProtectBusiest(Pass):
    """Make fewer than `bits` weight bits impossible for the `experts` most used experts of every bank."""
    name = "protect-busiest"
    experts: int = 1
    bits: int = 8

    def run(self, module: ModuleOp, environment: Environment) -> None:  # noqa: D102  # the class says it
        for moe in self.blocks(module, "annotated", way="run it just before allocate-bits"):
            narrow = [scheme.weight_bits < self.bits for scheme in moe.candidates]
            for bank in banks(moe).values():
                busiest = np.argsort(-bank.route.frequency.array, kind="stable")[: self.experts]
                for op in bank.linears.values():
                    loss = op.sensitivity.array.copy()
                    loss[np.ix_(busiest, narrow)] = np.inf
                    op.set_table("sensitivity", Table(("expert", "scheme"), loss))

def main() -> None:
    """Register the pass, run it before the allocation, print what was chosen, and test the pass."""
    bank = BankShape("routed", 8, 2, 512, "relu", gated=False, weights={"up": "mlp.up", "down": "mlp.down"})
    module = at_stage([BlockShape("mlp", 256, (bank,))], "annotated", [Scheme(8, 8, act_format="int"), Scheme(4)])
    with registered(PASSES, "protect-busiest", ProtectBusiest):
        run_passes(module, parse_passes("protect-busiest{experts=2},allocate-bits{weight-bits=6}"), Environment())
    print(plan_of(module).to_json())
    check_pass(ProtectBusiest(), "annotated")

if __name__ == "__main__":
    main()
