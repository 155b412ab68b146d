"""`mxmoe`: the change of the block's output as a norm, as its paper has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mxmoe.passes.sensitivities.base import Floats, SeenBank, Sensitivity, by_block, check_word
from mxmoe.passes.sensitivities.squared import SCALES, output_of_blocks


@dataclass(frozen=True)
class Mxmoe(Sensitivity):
    """
    Frobenius norm, not squared, of the change of the block's output when one linear alone is quantized.

    MxMoE (Duanmu et al., ICML 2025, section 3.1), which gives every block a budget of its own: its plans are those of
    `allocate-bits{budget-per=layer}`. `relative` divides by the norm of what the block's banks put out, for a budget
    over all blocks.
    """

    name = "mxmoe"
    scale: str = "total"
    """relative or total."""

    def __post_init__(self) -> None:
        check_word(self, "scale", SCALES)

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Take the root of the observed errors."""
        units = output_of_blocks(banks) if self.scale == "relative" else dict.fromkeys(by_block(banks), 1.0)
        return [{role: np.sqrt(bank.squared(role) / units[bank.block]) for role in bank.roles} for bank in banks]

    def gone(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Take the root of what the expert puts out."""
        units = output_of_blocks(banks) if self.scale == "relative" else dict.fromkeys(by_block(banks), 1.0)
        return [np.sqrt(bank.output / units[bank.block]) for bank in banks]
