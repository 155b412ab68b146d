"""`squared`: the squared change of the block's output, the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mxmoe.passes.sensitivities.base import Floats, SeenBank, Sensitivity, by_block, check_word

SCALES = ("relative", "total")


@dataclass(frozen=True)
class Squared(Sensitivity):
    """
    Squared change of the block's output over all tokens when one linear alone is quantized, weight and input alike.

    Errors of independent linears add in squares. `relative` divides by the squared norm of what the block's banks put
    out, so that blocks of different magnitude can be weighed against each other.
    """

    name = "squared"
    scale: str = "relative"
    """relative or total."""

    def __post_init__(self) -> None:
        check_word(self, "scale", SCALES)

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Divide the observed errors by their block's output."""
        units = output_of_blocks(banks) if self.scale == "relative" else dict.fromkeys(by_block(banks), 1.0)
        return [{role: bank.squared(role) / units[bank.block] for role in bank.roles} for bank in banks]

    def gone(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Take what the expert puts out, which is the change of the block's output when it does not."""
        units = output_of_blocks(banks) if self.scale == "relative" else dict.fromkeys(by_block(banks), 1.0)
        return [bank.output / units[bank.block] for bank in banks]


def output_of_blocks(banks: Sequence[SeenBank]) -> dict[str, float]:
    """Block -> squared norm of what its banks put out; 1 for a block that puts out nothing."""
    found = by_block(banks).items()
    return {block: sum(float(bank.sums.squared_output.sum()) for bank in held) or 1.0 for block, held in found}
