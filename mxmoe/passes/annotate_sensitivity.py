"""`annotate-sensitivity`: what each scheme of each linear costs in accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from mxmoe.calib import Norm
from mxmoe.errors import BadOption
from mxmoe.ir import ModuleOp, Table, banks
from mxmoe.passes.base import EARLIER, Environment, Pass, advance

NORMS = ("squared", "unsquared")
SCALES = ("total", "relative")


@dataclass(frozen=True)
class AnnotateSensitivity(Pass):
    """
    Write `sensitivity[expert, scheme]` on every linear, from the observed statistics.

    The value is the change of the block's output over all observed tokens when only that linear is quantized, weight
    and input alike. `squared` (sum of squares) adds up over independent errors; `unsquared` is the Frobenius norm that
    MxMoE sums (ICML 2025, section 3.1). `relative` divides by the squared norm (or the norm) of what the block's banks
    put out, so that blocks of different magnitude can be weighed against each other; `total` leaves it.
    """

    name = "annotate-sensitivity"
    norm: str = "squared"
    """squared or unsquared."""
    scale: str = "relative"
    """total or relative."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Annotate every linear; the blocks become annotated."""
        for option, value, known in (("norm", self.norm, NORMS), ("scale", self.scale, SCALES)):
            if value not in known:
                raise BadOption(name=self.name, option=f"{option}={value}", reason=f"it is {' or '.join(known)}")
        stats = environment.need_stats(self.name)
        for moe in self.blocks(module, "lifted", "annotated", "allocated", way=EARLIER):
            seen = [environment.seen(self.name, moe, bank) for bank in banks(moe).values()]
            output = sum(float(one.squared_output.sum()) for one in seen)
            unit = (output if self.norm == "squared" else output**0.5) if self.scale == "relative" else 1.0
            for bank in banks(moe).values():
                for role, op in bank.linears.items():
                    norm = cast("Norm", self.norm)
                    values = stats.sensitivity(moe.block, bank.name, role, moe.candidates, norm=norm) / (unit or 1.0)
                    op.set_table("sensitivity", Table(("expert", "scheme"), values))
            advance(moe, "annotated")
