"""`pmq`: how often, how heavily and how badly, each with an exponent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mxmoe.passes.sensitivities.base import Floats, SeenBank, Sensitivity


@dataclass(frozen=True)
class Pmq(Sensitivity):
    """
    f^alpha w^beta e^gamma: an expert's part of its bank's assignments, of its router weights, and the output's error.

    MC-MoE's pre-loading mixed-precision quantization (ICLR 2025, arXiv 2410.06270), whose e is the norm of the change
    when all three matrices of an expert are quantized. Ours is that of each matrix; with gamma = 2 their sum over a
    tied expert is that of independent errors, so `allocate-bits{granularity=expert budget-per=layer}` is the paper's
    program, without its demand that every layer has experts at the two widest schemes. The authors' released solver
    leaves e unsquared: `pmq{gamma=1}`.
    """

    name = "pmq"
    alpha: float = 1.0
    """Exponent of the frequency."""
    beta: float = 1.5
    """Exponent of the router weight."""
    gamma: float = 2.0
    """Exponent of the error's norm."""

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Weigh the observed errors."""
        return [self._losses(bank) for bank in banks]

    def _losses(self, bank: SeenBank) -> Mapping[str, Floats]:
        weight = (_share(bank.frequency) ** self.alpha * _share(bank.mass) ** self.beta)[:, None]
        return {role: weight * bank.squared(role) ** (self.gamma / 2) for role in bank.roles}


def _share(values: Floats) -> Floats:
    """Scale to a sum of one; expert by expert alike if there is nothing to share. Signs of weights do not count."""
    size = np.abs(values)
    total = size.sum()
    return size / total if total > 0 else np.full(len(values), 1 / len(values))
