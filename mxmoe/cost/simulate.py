"""
The tile list of a grouped launch, as the device builds it: how experts are cut into tiles, in which order, and by rule.

A launch has *classes*: (product, scheme, tile, parts of K), one kernel body each, in an order that is fixed before the
routing is known. All experts of one product and scheme share a width and a set of heights; an expert is cut into bands
of the tallest height, and its rest into one band of the smallest height that covers it. `plan_launch` chooses widths,
heights and parts of K by simulating; `lay_tiles` makes the list of a routing, with the time of every tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mxmoe.cost.model import CostModel
from mxmoe.cost.predict import Gemm
from mxmoe.cost.roofline import L2_BYTES_PER_CLOCK, Roofline
from mxmoe.cost.schedule import Schedule, in_order
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme, Tile

SPLITS = (1, 2, 4, 8)
"""Parts of K that are tried; their sums are added by whoever comes last."""
PART_DEPTH = 128
"""A part of K is a multiple of this, so that no group of scales is cut."""
START_US = 0.5
"""
Microseconds to start a tile or a part: its place in the lists, its addresses, the first loads. An assumption, on the
high side of the 1000 clocks that two dependent loads and a pipeline of three stages take; models of long tiles, which
scale in proportion, would make very short tiles look free.
"""
LEFT_OUT = 32
"""A height between 16 and 64 saves little (weights bound it) and costs a kernel body."""
TAIL_WEIGHT = 3
"""
How much more a microsecond of tail counts: what a model does not know, other routings above all, shows there first.
In this way a finer cut that costs 1 % more work is preferred to a tail of 3 %.
"""
DRAWS = 3
"""Routings that a plan is tried on, beside the expected one."""
_KEPT = 3
_NEAR = 1.3
_ROUNDS = 2


@dataclass(frozen=True)
class LaunchClass:
    """One class of tiles of a launch."""

    gemm: int
    """Which of the launch's products."""
    scheme: Scheme
    tile: Tile
    """Height, width and step of its tiles."""
    parts: int = 1
    """Parts that K is cut into; each is a tile of its own."""


@dataclass(frozen=True)
class LaunchPlan:
    """The classes of a launch in the order in which their tiles are started."""

    classes: tuple[LaunchClass, ...]

    def heights(self, gemm: int, scheme: Scheme) -> tuple[int, ...]:
        """Heights that experts of a product and scheme are cut into, ascending."""
        return tuple(sorted(one.tile.m for one in self.classes if (one.gemm, one.scheme) == (gemm, scheme)))


@dataclass(frozen=True)
class TileList:
    """Tiles in the order in which they are started; arrays have one entry per tile."""

    plan: LaunchPlan
    duration_us: NDArray[np.float64]
    class_of: NDArray[np.int64]
    """Place of its class in the plan."""
    expert: NDArray[np.int64]
    """Expert within its product."""

    def released_order(self) -> TileList:
        """Order the same tiles product by product and expert by expert, as the problems are listed."""
        gemm = np.array([one.gemm for one in self.plan.classes], dtype=np.int64)[self.class_of]
        order = np.lexsort((self.expert, gemm))
        return replace(
            self, duration_us=self.duration_us[order], class_of=self.class_of[order], expert=self.expert[order]
        )


def cut(rows: int, heights: Sequence[int]) -> Iterator[tuple[int, int]]:
    """
    Cut an expert's rows into bands of given ascending heights: yields (height, number of bands).

    `cut(150, (16, 64, 128))` is one band of 128 and one of 64: 22 rows are left, and 64 is the smallest that covers.
    """
    full, rest = divmod(rows, heights[-1])
    last = next((height for height in heights if height >= rest), heights[-1]) if rest else 0
    if full or last == heights[-1]:
        yield heights[-1], full + (last == heights[-1])
    if last and last < heights[-1]:
        yield last, 1


def lay_tiles(model: CostModel, plan: LaunchPlan, gemms: Sequence[Gemm]) -> TileList:
    """
    List the tiles of one routing, the `rows` of `gemms`, in the order of the plan.

    Raises:
        BadWorkload: a scheme with rows that the plan has no class for.
    """
    counts = _count_bands(plan, gemms)
    durations: list[NDArray[np.float64]] = []
    owners: list[tuple[int, int, int]] = []
    for at, one in enumerate(plan.classes):
        gemm = gemms[one.gemm]
        columns = math.ceil(gemm.n / one.tile.n) * one.parts
        for expert, bands in counts.get((one.gemm, one.scheme, one.tile.m), {}).items():
            us = tile_part_us(model, one, gemm.k, bands)
            durations.append(np.full(bands * columns, us))
            owners.append((at, expert, bands * columns))
    spread = np.array(owners, dtype=np.int64).reshape(-1, 3)
    return TileList(
        plan,
        np.concatenate(durations) if durations else np.zeros(0),
        np.repeat(spread[:, 0], spread[:, 2]),
        np.repeat(spread[:, 1], spread[:, 2]),
    )


def tile_part_us(model: CostModel, one: LaunchClass, k: int, bands: int) -> float:
    """
    Microseconds of one tile, or of one part of it, whose expert has `bands` bands of this height.

    Parts write their sums in fp32 to the second-level cache, and the last reads them.
    """
    depth = math.ceil(k / one.parts / PART_DEPTH) * PART_DEPTH
    us = START_US + model.tile_us(one.scheme, one.tile, min(k, depth), bands * one.tile.m)
    if one.parts == 1:
        return us
    moved = 2 * 4 * one.tile.m * one.tile.n
    return us + moved / (L2_BYTES_PER_CLOCK * model.device.boost_ghz * 1e3)


def plan_launch(
    model: CostModel,
    gemms: Sequence[Gemm],
    *,
    slots: int | None = None,
    splits: Sequence[int] = SPLITS,
    draws: int = DRAWS,
) -> LaunchPlan:
    """
    Choose width, heights and parts of K for every (product, scheme) so that the simulated launch ends earliest.

    The rows of `gemms` are those expected; `draws` routings are drawn from them as well, so that the plan does not
    rest on the exact counts of one. Each scheme begins with the cut of least total work; then one scheme after the
    other tries its best few against all others as they stand. What counts is the makespan, and TAIL_WEIGHT times its
    tail beyond an even spread, or what is usual where it has less by luck. Ties go to less work.

    Raises:
        BadWorkload: no work, or a scheme that the device cannot run.
    """
    groups = sorted({(g, scheme) for g, gemm in enumerate(gemms) for scheme in gemm.schemes}, key=str)
    options = {group: _options(model, gemms, *group, splits) for group in groups}
    chosen = {group: found[0] for group, found in options.items()}
    routings = [gemms, *(_draw(gemms, np.random.default_rng(seed)) for seed in range(draws))]

    def score(chosen: dict[tuple[int, Scheme], _Option]) -> float:
        plan = _ordered(model, gemms, chosen)
        lists = [lay_tiles(model, plan, routing).duration_us for routing in routings]
        runs = [in_order(tiles, slots or model.device.sms) for tiles in lists]
        tails = [max(run.tail_us, _usual_tail(tiles)) for run, tiles in zip(runs, lists, strict=True)]
        return round(sum(run.makespan_us for run in runs) + TAIL_WEIGHT * sum(tails), 6)

    for _ in range(_ROUNDS):
        before = dict(chosen)
        for group, found in options.items():
            scores = {option: score({**chosen, group: option}) for option in found}
            chosen[group] = min(found, key=scores.__getitem__)
        if chosen == before:
            break
    return _ordered(model, gemms, chosen)


def _usual_tail(duration_us: NDArray[np.float64]) -> float:
    """
    Tail that other routings of as many tiles have in the mean: half of the last tile.

    Tiles of one length that happen to fill all slots have none, and one more tile than these has a whole one.
    """
    return float(duration_us[-1]) / 2 if len(duration_us) else 0.0


def _draw(gemms: Sequence[Gemm], random: np.random.Generator) -> list[Gemm]:
    """Draw as many rows as are expected; an expert that sees every token keeps its own."""
    drawn: list[Gemm] = []
    for gemm in gemms:
        share = np.array(gemm.rows, dtype=np.float64)
        rows = random.multinomial(sum(gemm.rows), share / share.sum()) if share.sum() else share.astype(np.int64)
        drawn.append(replace(gemm, rows=tuple(rows.tolist())))
    return drawn


def simulate_launch(model: CostModel, plan: LaunchPlan, gemms: Sequence[Gemm], slots: int | None = None) -> Schedule:
    """Run the tiles of a routing in the order of the plan, each on the slot that is free first."""
    return in_order(lay_tiles(model, plan, gemms).duration_us, slots or model.device.sms)


def _count_bands(plan: LaunchPlan, gemms: Sequence[Gemm]) -> dict[tuple[int, Scheme, int], dict[int, int]]:
    """(product, scheme, height) -> expert -> bands."""
    counts: dict[tuple[int, Scheme, int], dict[int, int]] = {}
    for g, gemm in enumerate(gemms):
        known = {scheme: plan.heights(g, scheme) for scheme in set(gemm.schemes)}
        for expert, (rows, scheme) in enumerate(zip(gemm.rows, gemm.schemes, strict=True)):
            if rows and not known[scheme]:
                raise BadWorkload(reason=f"the plan has no tiles for {scheme} in product {g}")
            for height, bands in cut(rows, known[scheme]) if rows else ():
                counts.setdefault((g, scheme, height), {})[expert] = bands
    return counts


_Option = tuple[LaunchClass, ...]


def _options(model: CostModel, gemms: Sequence[Gemm], g: int, scheme: Scheme, splits: Sequence[int]) -> list[_Option]:
    """Ways to cut one scheme of one product, least work first; those of far more work are left out."""
    gemm = gemms[g]
    rows = tuple(count if one == scheme else 0 for count, one in zip(gemm.rows, gemm.schemes, strict=True))
    alone = [replace(one, rows=rows if at == g else (0,) * len(one.rows)) for at, one in enumerate(gemms)]
    work: dict[_Option, float] = {}
    grid = Roofline(model.device).tiles(scheme)
    # full bands are of a height that the model knows; for heights below it and other widths, its scaling serves
    known = {tile.m for tile in model.tiles(scheme)}
    for tallest in (tile for tile in grid if tile.m in known):
        lower = [tile for tile in grid if tile.n == tallest.n and tile.m < tallest.m and tile.m != LEFT_OUT]
        for parts in splits:
            if parts > 1 and gemm.k < 2 * parts * PART_DEPTH:
                continue
            option = tuple(LaunchClass(g, scheme, tile, parts) for tile in (*lower, tallest))
            work[option] = float(lay_tiles(model, LaunchPlan(option), alone).duration_us.sum())
    if not work or not math.isfinite(min(work.values())):
        raise BadWorkload(reason=f"{model.device.name} cannot run {scheme}")
    ranked = sorted(work, key=lambda option: (round(work[option], 6), -option[-1].tile.m))
    near = [option for option in ranked if work[option] <= _NEAR * work[ranked[0]]]
    # fine cuts balance best: keep the cheapest of every width and number of parts
    best = {(one[-1].tile.n, one[-1].parts): one for one in reversed(near)}
    return list(dict.fromkeys([*near[:_KEPT], *best.values()]))


def _ordered(model: CostModel, gemms: Sequence[Gemm], chosen: dict[tuple[int, Scheme], _Option]) -> LaunchPlan:
    """Order the classes by the mean time of their tiles; a class without rows by that of a lone band."""
    plan = LaunchPlan(tuple(one for option in chosen.values() for one in option))
    listed = lay_tiles(model, plan, gemms)
    n = np.bincount(listed.class_of, minlength=len(plan.classes))
    total = np.bincount(listed.class_of, weights=listed.duration_us, minlength=len(plan.classes))
    lone = [tile_part_us(model, one, gemms[one.gemm].k, 1) for one in plan.classes]
    mean = np.where(n > 0, total / np.maximum(n, 1), lone)
    order = np.argsort(-mean, kind="stable")
    return LaunchPlan(tuple(plan.classes[at] for at in order.tolist()))
