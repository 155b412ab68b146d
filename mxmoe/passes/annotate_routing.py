"""`annotate-routing`: how often each expert is chosen, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mxmoe.ir import ModuleOp, Table, banks
from mxmoe.passes.base import EARLIER, Environment, Pass, advance


@dataclass(frozen=True)
class AnnotateRouting(Pass):
    """
    Write `frequency[expert]` and `mass[expert]` on every route.

    frequency is the mean number of assignments per token (it sums to top_k), mass the mean router weight per token.
    Without statistics routing is taken as uniform: frequency top_k / experts, mass 1 / experts.
    """

    name = "annotate-routing"

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Annotate every bank; the blocks become annotated."""
        for moe in self.blocks(module, "lifted", "annotated", "allocated", way=EARLIER):
            for bank in banks(moe).values():
                if environment.stats is None:
                    frequency = np.full(bank.experts, bank.top_k / bank.experts)
                    mass = np.full(bank.experts, 1 / bank.experts)
                else:
                    seen = environment.seen(self.name, moe, bank)
                    frequency, mass = seen.tokens / seen.n_tokens, seen.mass / seen.n_tokens
                bank.route.set_table("frequency", Table(("expert",), frequency.astype(np.float32)))
                bank.route.set_table("mass", Table(("expert",), mass.astype(np.float32)))
            advance(moe, "annotated")
