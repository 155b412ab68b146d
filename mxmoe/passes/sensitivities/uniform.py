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

    Where the budget is what a scheme costs, and no mix of a narrower and a wider one distorts less for the same bits,
    the plan is that scheme for all; elsewhere which rows get which of two schemes is arbitrary. With
    `allocate-bits{granularity=model}` the plan is always uniform, and may leave bits unused.
    """

    name = "uniform"

    def scores(self, banks: Sequence[SeenBank]) -> Sequence[Floats]:
        """Score 1."""
        return [np.ones(bank.experts) for bank in banks]
