"""`annotate-sensitivity`: what each scheme of each linear costs in accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from mxmoe.ir import ModuleOp, Table, banks
from mxmoe.passes.base import EARLIER, Environment, Pass, advance
from mxmoe.passes.sensitivities import SeenBank, Sensitivity, parse_sensitivity


@dataclass(frozen=True)
class AnnotateSensitivity(Pass):
    """
    Write `sensitivity[expert, scheme]` on every linear, from the observed statistics.

    How is the method's business: by default the squared change of the block's output when that linear alone is
    quantized. docs/sensitivities.md lists all; `method="pmq{gamma=1}"` gives one its options.
    """

    name = "annotate-sensitivity"
    method: str = "squared"
    """A name in `SENSITIVITIES`, with options in braces."""

    def __post_init__(self) -> None:
        """Find out now whether there is such a method."""
        _ = self.sensitivity

    @property
    def sensitivity(self) -> Sensitivity:
        """The method with its options; raises what `parse_sensitivity` raises."""
        return parse_sensitivity(self.method)

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Annotate every linear; the blocks become annotated."""
        stats = environment.need_stats(self.name)
        blocks = self.blocks(module, "lifted", "annotated", "allocated", way=EARLIER)
        held = [(moe, bank) for moe in blocks for bank in banks(moe).values()]
        seen = [
            SeenBank(
                block=moe.block,
                name=bank.name,
                sizes={role: (op.n, op.k) for role, op in bank.linears.items()},
                schemes=moe.candidates,
                stats=stats,
                sums=environment.seen(self.name, moe, bank),
            )
            for moe, bank in held
        ]
        for (_, bank), losses in zip(held, self.sensitivity.losses(seen), strict=True):
            for role, op in bank.linears.items():
                op.set_table("sensitivity", Table(("expert", "scheme"), losses[role]))
        for moe in blocks:
            advance(moe, "annotated")
