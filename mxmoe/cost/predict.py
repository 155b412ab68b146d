"""From tiles to tables and launches: the separable cost of each expert's row, and the makespan of a whole block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mxmoe.cost.measured import Company, Measured
from mxmoe.cost.model import CostModel
from mxmoe.cost.roofline import check_depth
from mxmoe.cost.schedule import Schedule, longest_first
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme, Tile

Tokens = int | Sequence[tuple[int, float]]
"""Tokens of one call, or several counts with their weights: ((1, 0.9), (2048, 0.1)) is mostly decoding."""


@dataclass(frozen=True)
class Gemm:
    """One product of one bank with its choices made; gate and up with one choice are one product of twice the width."""

    n: int
    """Output channels."""
    k: int
    """Input channels."""
    rows: tuple[int, ...]
    """Expert -> rows it gets."""
    schemes: tuple[Scheme, ...]
    """Expert -> its scheme."""
    tiles: tuple[Tile, ...] | None = None
    """Expert -> its tile; None takes the fastest for each."""

    def __post_init__(self) -> None:
        counts = {len(self.rows), len(self.schemes), len(self.rows if self.tiles is None else self.tiles)}
        if len(counts) > 1 or self.n < 1:
            raise BadWorkload(reason=f"{self.n} columns, and rows, schemes and tiles for {sorted(counts)} experts")
        check_depth(self.k, min(self.rows, default=0))


def expected_rows(frequency: ArrayLike, tokens: int) -> tuple[int, ...]:
    """
    Share a call's assignments among the experts as whole rows, by largest remainder.

    `expected_rows([0.5, 1.0, 0.5], 3)` is (2, 3, 1): the sum is that of frequency x tokens, rounded.

    Raises:
        BadWorkload: a frequency that is not a finite number from 0 on, or fewer than one token.
    """
    share = _frequency(frequency) * _tokens(tokens)[0][0]
    rows = np.floor(share).astype(np.int64)
    missing = round(float(share.sum())) - int(rows.sum())
    order = np.argsort(-(share - rows), kind="stable")
    rows[order[:missing]] += 1
    return tuple(rows.tolist())


def best_tile(model: CostModel, scheme: Scheme, *, n: int, k: int, rows: float) -> tuple[Tile | None, float]:
    """
    Pick the fastest tile of a scheme for an expert's product [rows, k] x [n, k], and its time spread over all SMs.

    Returns (None, inf) where the scheme cannot run, and time 0 for no rows. The tail wave is not in it. Of tiles that
    are equally fast, the model's first width wins, then the one that moves the fewest operand bytes.
    """
    tiles = model.tiles(scheme)
    widths = list(dict.fromkeys(tile.n for tile in tiles))

    def merit(tile: Tile) -> tuple[float, int, int]:
        count = math.ceil(rows / tile.m) * math.ceil(n / tile.n)
        us = count * model.tile_us(scheme, tile, k, rows) / model.device.sms
        # rounded: sums of the same terms in another order must still tie
        moved = count * (tile.m * scheme.act_bits + tile.n * scheme.weight_bits)
        return round(us, 9), widths.index(tile.n), moved

    best = min(tiles, key=merit, default=None)
    return best, math.inf if best is None else merit(best)[0]


def linear_cost_us(
    model: CostModel, schemes: Sequence[Scheme], *, n: int, k: int, frequency: ArrayLike, tokens: Tokens
) -> NDArray[np.float64]:
    """
    Microseconds [expert, scheme] that each expert's product [rows, k] x [n, k] takes of the device: a separable cost.

    `frequency` [expert] is the mean number of assignments per token, from 0 to 1. An expert that expects fewer than
    one row is charged the cost of an active expert times its chance of being active, 1 - (1 - frequency)^tokens,
    so that a decoding step pays for top-k experts and not for all. Several token counts are weighed together; their
    weights are normalised. For each (expert, scheme, count) the fastest tile counts. `inf`: the scheme cannot run.

    Raises:
        BadWorkload: a frequency, token count or size that cannot be.
    """
    check_depth(min(n, k), None)
    share, counts = _frequency(frequency), _tokens(tokens)
    total = np.zeros((len(share), len(schemes)))
    for count, weight in counts:
        chance = 1 - (1 - np.clip(share, 0, 1)) ** count
        rows = np.zeros_like(share)
        np.divide(share * count, chance, out=rows, where=chance > 0)
        # rounding may leave 7.000000000000001 rows, which would cost a row tile more
        np.round(rows, 9, out=rows)
        for column, scheme in enumerate(schemes):
            total[:, column] += weight * _charged(model, scheme, n, k, rows, chance)
    return total


def predict_launch(model: CostModel, gemms: Sequence[Gemm]) -> Schedule:
    """Schedule all tiles of one launch, longest first, on the SMs of the model's device."""
    durations = [np.full(count, us) for _, count, us in _tiles_of(model, gemms)]
    return longest_first(np.concatenate(durations) if durations else np.zeros(0), model.device.sms)


def predict_launch_us(model: CostModel, gemms: Sequence[Gemm]) -> float:
    """
    Microseconds of one launch: by the law of a profile that has one, or to the end of the last wave.

    A launch of several schemes costs what such launches were measured to cost, see `Law.mixed`.
    """
    law = model.profile.law if isinstance(model, Measured) else None
    if law is None or not isinstance(model, Measured):
        return predict_launch(model, gemms).makespan_us
    present = {scheme for gemm in gemms for rows, scheme in zip(gemm.rows, gemm.schemes, strict=True) if rows}
    model = replace(model, company=Company.of(present))
    busy: dict[tuple[int, Scheme], float] = {}
    longest = missed = 0.0
    for at, gemm in enumerate(gemms):
        for scheme, count, us in _tiles_of(model, [gemm]):
            busy[at, scheme] = busy.get((at, scheme), 0.0) + count * us / model.device.sms
            longest = max(longest, us * model.alone(scheme))
    if not busy:
        return 0.0
    total = sum(busy.values())
    for (at, scheme), us in busy.items():
        active = sum(rows > 0 for rows in gemms[at].rows)
        near = law.factor(scheme, gemms[at].n, gemms[at].k, sum(gemms[at].rows) / active, active)
        missed += us / total * math.log(near)
    return float(law.launch(total, longest)) * math.exp(missed)


def _tiles_of(model: CostModel, gemms: Sequence[Gemm]) -> list[tuple[Scheme, int, float]]:
    """(scheme, number, microseconds) of the tiles of every expert that has rows."""
    found: list[tuple[Scheme, int, float]] = []
    chosen: dict[tuple[Scheme, int, int, int], tuple[Tile | None, float]] = {}
    for gemm in gemms:
        for expert, (rows, scheme) in enumerate(zip(gemm.rows, gemm.schemes, strict=True)):
            if rows == 0:
                continue
            key = (scheme, gemm.n, gemm.k, rows)
            if gemm.tiles is None and key not in chosen:
                chosen[key] = best_tile(model, scheme, n=gemm.n, k=gemm.k, rows=rows)
            tile = gemm.tiles[expert] if gemm.tiles is not None else chosen[key][0]
            us = math.inf if tile is None else model.tile_us(scheme, tile, gemm.k, rows)
            count = 1 if tile is None else math.ceil(rows / tile.m) * math.ceil(gemm.n / tile.n)
            found.append((scheme, count, us))
    return found


def predict_block_us(model: CostModel, launches: Sequence[Sequence[Gemm]]) -> float:
    """
    Microseconds of a block: its launches one after the other, see `predict_launch_us`.

    The usual block has two launches, every bank's gate and up, then every bank's down (`block_launches`). Routing,
    the quantization of activations and the launches themselves are not in it; `inf` if a choice cannot run.
    """
    return sum(predict_launch_us(model, gemms) for gemms in launches)


def _charged(
    model: CostModel, scheme: Scheme, n: int, k: int, rows: NDArray[np.float64], chance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cost [expert] of one scheme: the fastest tile for `rows`, times the chance that there are any."""
    best = np.full(len(rows), math.inf)
    for tile in model.tiles(scheme):
        row_tiles = np.ceil(rows / tile.m)
        us = np.zeros(len(rows))
        for count in np.unique(row_tiles[row_tiles > 0]).tolist():
            each = model.tile_us(scheme, tile, k, count * tile.m)
            us[row_tiles == count] = count * math.ceil(n / tile.n) * each / model.device.sms
        best = np.minimum(best, us)
    # an impossible scheme stays impossible for an expert without rows
    return np.where(np.isinf(best), math.inf, best * np.where(np.isinf(best), 1.0, chance))


def _frequency(frequency: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(frequency, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.all(np.isfinite(values) & (values >= 0)):
        raise BadWorkload(reason="frequencies must be one finite number from 0 on for each expert")
    return values


def _tokens(tokens: Tokens) -> list[tuple[int, float]]:
    pairs = [(tokens, 1.0)] if isinstance(tokens, int | np.integer) else [(int(t), float(w)) for t, w in tokens]
    total = sum(weight for _, weight in pairs)
    if any(count < 1 or not weight >= 0 for count, weight in pairs) or not 0 < total < math.inf:
        raise BadWorkload(reason=f"token counts and weights {pairs}; counts start at 1, weights sum to more than 0")
    return [(int(count), weight / total) for count, weight in pairs]
