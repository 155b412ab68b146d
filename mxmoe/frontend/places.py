"""Where a router's experts are in a bank that has fewer."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def places_of(experts: int, dropped: Collection[int]) -> Tensor | None:
    """
    Say where the experts of a bank are once some were dropped: int64 [experts + 1], None if none was.

    4 experts without the second -> [0, 3, 1, 2, 3]: the dropped one is padding, as what was padding is.
    """
    if not dropped:
        return None
    kept = [expert for expert in range(experts) if expert not in dropped]
    places = torch.full((experts + 1,), len(kept))
    places[kept] = torch.arange(len(kept))
    return places
