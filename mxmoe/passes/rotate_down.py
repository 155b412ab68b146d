"""`rotate-down`: a Hadamard rotation between the nonlinearity and down, so that no channel stands out."""

from __future__ import annotations

from dataclasses import dataclass

from mxmoe.ir import ModuleOp, banks, check_rotation
from mxmoe.passes.base import Environment, Pass


@dataclass(frozen=True)
class RotateDown(Pass):
    """
    Write `hadamard` on every nonlinearity: its output and the weight of down are rotated, their product is not changed.

    The input of down has the largest outliers of a block, and MxMoE (ICML 2025) leaves it as it is; QuaRot (Ashkboos et
    al., NeurIPS 2024, section 4.2) multiplies it by a Hadamard matrix at run time. Blocks of 128 channels cost 7
    additions a channel and fit groups of 128. Sensitivities are those of the rotated module only if it was rotated
    before it was observed, so this pass comes first; `compile` observes behind it.
    """

    name = "rotate-down"
    block: int | None = 128
    """Channels that are rotated together; None takes all of a bank."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """
        Rotate every bank; the blocks stay lifted.

        Raises:
            BadRotation: a bank whose width has no such blocks; nothing has been changed then.
        """
        found = [
            bank
            for moe in self.blocks(module, "lifted", way="sensitivities depend on it; run it first")
            for bank in banks(moe).values()
        ]
        widths = [bank.linears["down"].k for bank in found]
        sizes = [width if self.block is None else self.block for width in widths]
        for width, size in zip(widths, sizes, strict=True):
            check_rotation(width, size)
        for bank, size in zip(found, sizes, strict=True):
            bank.act.hadamard = size
