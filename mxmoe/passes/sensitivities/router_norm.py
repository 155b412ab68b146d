"""`router-norm`: experts by the length of their row of the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxmoe.errors import BadOption
from mxmoe.passes.sensitivities.base import ByScore, Floats, SeenBank, with_shared


@dataclass(frozen=True)
class RouterNorm(ByScore):
    """
    Shorter router rows get more bits; of the rest, experts with an unusually wide neuron do too.

    After arXiv 2604.06515 (ICLR 2026), which ranks by how much the length of a router's row changed in training, less
    change being more bits, and lifts experts whose largest variance within a neuron is high. Without the checkpoint
    that training began from, the final length stands for the change. The score is the median length over the row's,
    and the `promote` part of the experts with the widest neurons has the highest score of its bank: how many it lifts,
    and to what, is ours. Shared experts, which have no row, score as the median.
    """

    name = "router-norm"
    promote: float = 0.05
    """Part of the experts, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.promote <= 1:
            raise BadOption(name=self.name, option=f"promote={self.promote}", reason="it is a part, from 0 to 1")

    @property
    def needs_facts(self) -> tuple[str, ...]:
        """Lengths, and variances within neurons."""
        return ("norm", "spread")

    def scores(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Score bank by bank."""
        return with_shared(banks, {bank.block: self._score(bank) for bank in banks if bank.name == "routed"})

    def _score(self, bank: SeenBank) -> Floats:
        length = np.maximum(bank.fact("norm", "router"), np.finfo(np.float32).tiny)
        score = np.median(length) / length
        widest = np.max([bank.fact("spread", role) for role in bank.roles], axis=0)
        lifted = np.argsort(-widest, kind="stable")[: round(self.promote * bank.experts)]
        score[lifted] = score.max()
        return score
