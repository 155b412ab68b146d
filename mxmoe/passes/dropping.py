"""The candidate w0: what it costs to drop an expert, beside what it costs to quantize its linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mxmoe.errors import MissingInput
from mxmoe.ir import Scheme
from mxmoe.passes.sensitivities import SeenBank, Sensitivity

Floats = NDArray[np.float64]
MOST = 0.5
"""Part of a block's routed experts that may be dropped."""


def with_dropped(table: Floats, candidates: Sequence[Scheme], dropped: Floats) -> Floats:
    """Put the column [expert] of w0 among those of the other candidates: [expert, scheme]."""
    places = [index for index, scheme in enumerate(candidates) if scheme.is_dropped]
    return np.insert(table, places[0], dropped, axis=1) if places else table


def losses_of_dropping(
    method: Sensitivity, banks: Sequence[SeenBank], top_k: Sequence[int]
) -> list[Mapping[str, Floats]]:
    """
    Give for each bank role -> [expert], the loss of w0 in the unit of the method; inf for experts that must stay.

    An expert's loss stands at its down and nowhere else, since w0 takes all of its linears. Up for it are the routed
    experts that REAP (arXiv 2510.13999) scores lowest, by the mean norm of their weighted output over the tokens that
    reach them: half of a block's, and at most so many that a token still finds its top-k.

    Raises:
        MissingInput: statistics without output norms.
        BadOption: a method that does not say what dropping costs.
    """
    found: list[Mapping[str, Floats]] = []
    for bank, loss, taken in zip(banks, method.gone(banks), top_k, strict=True):
        stays = np.ones(bank.experts, dtype=np.bool_)
        if bank.name == "routed":
            if bank.sums.output_norm is None:
                what = f"output norms of {bank.block}"
                raise MissingInput(name="annotate-sensitivity", what=what, way="observe anew: w0 is scored by them")
            scores = bank.sums.output_norm / np.maximum(bank.sums.tokens, 1)
            few = max(min(int(MOST * bank.experts), bank.experts - taken), 0)
            stays[np.argsort(scores, kind="stable")[:few]] = False
        never = np.where(stays, np.inf, 0.0)
        found.append({role: np.where(stays, np.inf, loss) if role == "down" else never for role in bank.roles})
    return found
