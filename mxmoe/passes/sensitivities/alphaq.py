"""`alphaq`: linears by how heavy the tails of their spectra are; no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mxmoe.ir import Scheme
from mxmoe.passes.sensitivities.base import Floats, SeenBank, Sensitivity


@dataclass(frozen=True)
class Alphaq(Sensitivity):
    """
    (median alpha / alpha)^gamma Var(W) 4^-b, alpha the power law's exponent of the matrix's largest eigenvalues.

    AlphaQ (arXiv 2606.04980), which is for weights alone; the median is over all linears of the model. For schemes that
    quantize activations to a bits as well we add 4^-a to 4^-b. An exponent that could not be had counts as the median.
    """

    name = "alphaq"
    gamma: float = 1.0
    """How much the exponent counts; the paper tries 1 to 10."""

    @property
    def needs_facts(self) -> tuple[str, ...]:
        """Exponent and variance."""
        return ("alpha", "variance")

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Multiply a linear's factor with each scheme's."""
        alphas = np.concatenate([bank.fact("alpha", role) for bank in banks for role in bank.roles] or [np.ones(1)])
        median = float(np.nanmedian(alphas)) if np.isfinite(alphas).any() else 1.0
        return [
            {role: np.outer(self._factor(bank, role, median), [_noise(s) for s in bank.schemes]) for role in bank.roles}
            for bank in banks
        ]

    def _factor(self, bank: SeenBank, role: str, median: float) -> Floats:
        alpha = np.where(np.isfinite(bank.fact("alpha", role)), bank.fact("alpha", role), median)
        return (median / alpha) ** self.gamma * bank.fact("variance", role)


def _noise(scheme: Scheme) -> float:
    activations = 4.0**-scheme.act_bits if scheme.act_bits < 16 else 0.0
    return 4.0**-scheme.weight_bits + activations
