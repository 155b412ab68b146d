"""`fisher`: the change of the output as the loss sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mxmoe.passes.sensitivities.base import Floats, SeenBank, Sensitivity


@dataclass(frozen=True)
class Fisher(Sensitivity):
    """
    Sum over tokens and channels of (dL/dy)^2 (change of y)^2, y what the bank puts out, L the loss of the next token.

    Twice the second-order forecast of the loss's rise, with the Hessian's diagonal replaced by the squared gradient
    (the Fisher information): GEMQ (arXiv 2605.23078) over decoder layers, ModelOpt's auto_quantize over modules. All
    blocks are in one unit, nats, so one budget over the model needs no scale.
    """

    name = "fisher"

    @property
    def needs_gradients(self) -> bool:
        """It does."""
        return True

    def losses(self, banks: Sequence[SeenBank]) -> Sequence[Mapping[str, Floats]]:
        """Take the weighed errors as they are."""
        return [{role: bank.fisher(role) for role in bank.roles} for bank in banks]

    def gone(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """
        Take what the expert puts out, weighed as the errors of its down are on average over schemes.

        They are spread over the same channels and tokens; the gradient's weight on the output itself was not summed.
        """
        found: list[Floats] = []
        for bank in banks:
            weighed, plain = bank.fisher("down").sum(1), bank.squared("down").sum(1)
            found.append(bank.output * np.divide(weighed, plain, out=np.zeros_like(plain), where=plain > 0))
        return found
