"""`uniform`: every weight matters alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxmoe.passes.sensitivities.base import ByScore, Floats, SeenBank


@dataclass(frozen=True)
class Uniform(ByScore):
    """
    All experts score 1: a control that knows nothing of them.

    Where the budget is what a scheme costs, the plan is that scheme for all. Between two schemes the bits left over go
    to arbitrary rows; with `allocate-bits{granularity=model}` they stay unused, and the plan is always uniform.
    """

    name = "uniform"

    def scores(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Score 1."""
        return [np.ones(bank.experts) for bank in banks]
