"""`frequency`: experts by how often they are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxmoe.passes.sensitivities.base import ByScore, Floats, SeenBank, check_word


@dataclass(frozen=True)
class Frequency(ByScore):
    """
    An expert's score is its mean number of assignments per token, or its mean router weight; 1 for a shared expert.

    The baseline of MoPEQ (arXiv 2509.02512) and MC-MoE (arXiv 2410.06270), and a weak one by their own account:
    training balances loads, and a rare expert may hold what nothing else does.
    """

    name = "frequency"
    of: str = "tokens"
    """tokens or mass."""

    def __post_init__(self) -> None:
        check_word(self, "of", ("tokens", "mass"))

    def scores(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Take what was observed."""
        return [bank.frequency if self.of == "tokens" else abs(bank.mass) for bank in banks]
