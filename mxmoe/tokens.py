"""Numbers of tokens per call, in the forms in which a caller may give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from mxmoe.errors import BadArgument

Tokens = int | Sequence[int] | Mapping[int, float]
"""Tokens per call: one count, several alike, or count -> weight."""
USUAL = 512
"""Taken where nothing is given."""


def token_mix(tokens: Tokens | None) -> Mapping[int, float]:
    """
    Bring tokens per call into one form, count -> weight.

    Raises:
        BadArgument: a count below 1, or weights that weigh nothing.
    """
    if tokens is None or not isinstance(tokens, Iterable):
        mix: Mapping[int, float] = {USUAL if tokens is None else tokens: 1.0}
    else:
        mix = tokens if isinstance(tokens, Mapping) else dict.fromkeys(tokens, 1.0)
    weights_fit = all(isinstance(weight, Real) and 0 <= weight < math.inf for weight in mix.values())
    if not all(map(_is_count, mix)) or not weights_fit or not sum(mix.values()):
        reason = "give integers of at least 1, with weights that are not negative and not all zero"
        raise BadArgument(name="tokens", value=tokens, reason=reason)
    return mix


def token_counts(carry: int | Sequence[int] | None) -> Sequence[int] | None:
    """
    Bring the calls whose kernels are carried into one form; None stays what it is.

    Raises:
        BadArgument: a count below 1.
    """
    counts = (carry,) if isinstance(carry, int) else carry
    if counts is not None and not all(map(_is_count, counts)):
        raise BadArgument(name="carry", value=carry, reason="give numbers of tokens, at least 1 each, or () for none")
    return counts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
