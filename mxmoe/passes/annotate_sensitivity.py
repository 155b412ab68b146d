"""`annotate-sensitivity`: what each scheme of each linear costs in accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mxmoe.ir import ModuleOp, Table, banks
from mxmoe.passes.base import EARLIER, Environment, Pass, advance
from mxmoe.passes.dropping import Floats, losses_of_dropping, with_dropped
from mxmoe.passes.sensitivities import SeenBank, Sensitivity, parse_sensitivity


@dataclass(frozen=True)
class AnnotateSensitivity(Pass):
    """
    Write `sensitivity[expert, scheme]` on every linear, from the observed statistics.

    How is the method's business: by default the squared change of the block's output when that linear alone is
    quantized. For a candidate w0, no bits at all, it is what the expert itself puts out (`losses_of_dropping`).
    docs/sensitivities.md lists all; `method="pmq{gamma=1}"` gives one its options.
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
                schemes=tuple(scheme for scheme in moe.candidates if not scheme.is_dropped),
                stats=stats,
                sums=environment.seen(self.name, moe, bank),
            )
            for moe, bank in held
        ]
        gone: Sequence[Mapping[str, Floats] | None] = [None] * len(held)
        if any(scheme.is_dropped for moe in blocks for scheme in moe.candidates):
            gone = losses_of_dropping(self.sensitivity, seen, [bank.top_k for _, bank in held])
        for (moe, bank), losses, dropping in zip(held, self.sensitivity.losses(seen), gone, strict=True):
            for role, op in bank.linears.items():
                table = losses[role] if dropping is None else with_dropped(losses[role], moe.candidates, dropping[role])
                op.set_table("sensitivity", Table(("expert", "scheme"), table))
        for moe in blocks:
            advance(moe, "annotated")
