"""The simulated tile list: its laws, and how near its makespan comes to an even spread of the work."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.cost import (
    Gemm,
    Schedule,
    cost_model,
    fixed_stride,
    in_order,
    lay_tiles,
    longest_first,
    plan_launch,
    simulate_launch,
    start_times,
)
from mxmoe.cost.simulate import cut
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme

DURATIONS = st.lists(st.floats(0, 1e3, allow_nan=False), max_size=40)
SLOTS = st.integers(1, 9)


@settings(max_examples=100, deadline=None)
@given(DURATIONS, SLOTS)
def test_in_order_never_idles_while_a_tile_waits(durations: list[float], slots: int) -> None:
    got = in_order(durations, slots)
    starts = start_times(durations, got.assignment)
    ends = starts + durations
    for tile, start in enumerate(starts):
        free_at = [max((ends[t] for t in range(tile) if got.assignment[t] == slot), default=0) for slot in range(slots)]
        assert start == pytest.approx(min(free_at), abs=1e-6)
    assert got.makespan_us == pytest.approx(max(ends, default=0), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(DURATIONS, SLOTS)
def test_sorted_tiles_in_order_are_longest_first(durations: list[float], slots: int) -> None:
    got = in_order(sorted(durations, reverse=True), slots)
    assert got.makespan_us == longest_first(durations, slots).makespan_us


@settings(max_examples=100, deadline=None)
@given(DURATIONS, SLOTS)
def test_fixed_stride_adds_up_every_slots_tiles(durations: list[float], slots: int) -> None:
    got = fixed_stride(durations, slots)
    assert got.makespan_us == pytest.approx(max(sum(durations[slot::slots]) for slot in range(slots)))
    assert got.assignment == tuple(tile % slots for tile in range(len(durations)))


def test_over_ideal_of_nothing_and_of_the_impossible() -> None:
    assert in_order([], 3).over_ideal == 1
    assert in_order([1.0, np.inf], 3).over_ideal == np.inf
    assert in_order([3, 3, 2, 2, 2], 2).over_ideal == 7 / 6
    with pytest.raises(BadWorkload, match="0 slots"):
        fixed_stride([1.0], 0)


@given(st.integers(0, 2000), st.sets(st.sampled_from((16, 32, 64, 128, 256)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_bands_cover_the_rows_with_the_least_padding(rows: int, some: set[int]) -> None:
    heights = sorted(some)
    bands = dict(cut(rows, heights))
    covered = sum(height * count for height, count in bands.items())
    rest = rows % heights[-1]
    assert covered - rows == (min(height for height in heights if height >= rest) - rest if rest else 0)
    assert sum(count for height, count in bands.items() if height < heights[-1]) <= 1


class Shape(NamedTuple):
    """A model's experts: always-on ones are one, as wide as all of them."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    shared: int


SHAPES = {
    "mixtral": Shape(4096, 14336, 8, 2, 0),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6, 2816),
    "qwen1.5-moe": Shape(2048, 1408, 60, 4, 5632),
    "qwen2-57b": Shape(3584, 2560, 64, 8, 20480),
}
W4A16, W8A8, W4A4, W4A4_G128 = map(Scheme.parse, ("w4a16_g128_sym", "w8a8_sym", "w4a4_sym", "w4a4_g128_sym"))


def draw_counts(shape: Shape, tokens: int, seed: int) -> tuple[int, ...]:
    """Top-k without replacement (Gumbel top-k) from shares 1 / (rank + 3), ranks in random order of the experts."""
    share = 1 / (np.random.default_rng(1234).permutation(shape.experts) + 3)
    keys = np.log(share) + np.random.default_rng(seed).gumbel(size=(tokens, shape.experts))
    chosen = np.argsort(-keys, axis=1)[:, : shape.top_k]
    return tuple(np.bincount(chosen.ravel(), minlength=shape.experts).tolist())


def make_schemes(mix: str, role: str, experts: int) -> tuple[tuple[Scheme, ...], Scheme]:
    """Scheme of every routed expert and of the shared one; `published` is the mix of MxMoE, table 7."""
    random = np.random.default_rng(0)
    if mix == "w4a16":
        return (W4A16,) * experts, W4A16
    if mix == "mixed":
        return tuple(W4A16 if draw < 0.5 else W8A8 for draw in random.random(experts)), W8A8
    share, other, shared = (9 / 60, W4A4, W4A4) if role == "gate_up" else (34 / 60, W8A8, W8A8)
    order = random.permutation(experts)
    return tuple(other if place < share * experts else W4A4_G128 for place in order), shared


def make_launch(shape: Shape, tokens: int, role: str, mix: str, seed: int) -> list[Gemm]:
    schemes, of_shared = make_schemes(mix, role, shape.experts)
    width = (2 * shape.inner, shape.hidden) if role == "gate_up" else (shape.hidden, shape.inner)
    gemms = [Gemm(*width, draw_counts(shape, tokens, seed), schemes)]
    if shape.shared:
        width = (2 * shape.shared, shape.hidden) if role == "gate_up" else (shape.hidden, shape.shared)
        gemms.append(Gemm(*width, (tokens,), (of_shared,)))
    return gemms


class Runs(NamedTuple):
    """One routing: ours, and the same tiles in the released order, by fixed stride and as SMs get free."""

    ours: Schedule
    stride: Schedule
    released: Schedule


@cache
def simulate(name: str, tokens: int, role: str, mix: str) -> tuple[Runs, ...]:
    """Plan on one routing; run others."""
    model, shape = cost_model("measured", "rtx4090"), SHAPES[name]
    plan = plan_launch(model, make_launch(shape, tokens, role, mix, 0))
    runs: list[Runs] = []
    for seed in (1, 2, 3):
        tiles = lay_tiles(model, plan, make_launch(shape, tokens, role, mix, seed))
        released, sms = tiles.released_order().duration_us, model.device.sms
        runs.append(Runs(in_order(tiles.duration_us, sms), fixed_stride(released, sms), in_order(released, sms)))
    return tuple(runs)


CELLS = [
    *((name, tokens, role, "mixed") for name in SHAPES for tokens in (512, 2048) for role in ("gate_up", "down")),
    *((name, tokens, "down", "w4a16") for name in SHAPES for tokens in (512, 2048)),
    *(("qwen1.5-moe", tokens, role, "published") for tokens in (512, 2048, 8192) for role in ("gate_up", "down")),
]


@pytest.mark.parametrize(("name", "tokens", "role", "mix"), CELLS)
def test_makespan_is_near_an_even_spread(name: str, tokens: int, role: str, mix: str) -> None:
    worst = max(run.ours.over_ideal for run in simulate(name, tokens, role, mix))
    assert worst <= (1.08 if tokens == 512 else 1.03)


@pytest.mark.parametrize(("name", "tokens", "role", "mix"), CELLS)
def test_the_released_order_is_never_faster(name: str, tokens: int, role: str, mix: str) -> None:
    runs = simulate(name, tokens, role, mix)
    ours = sum(run.ours.makespan_us for run in runs)
    # where tiles are many and alike every order ends within one part in a thousand
    assert ours <= sum(run.stride.makespan_us for run in runs) * 1.001
    assert ours <= sum(run.released.makespan_us for run in runs) * 1.01


def test_deep_tiles_that_come_last_cost_a_third() -> None:
    """The shared expert's down is four times as deep as the others', and comes last in the released order."""
    model, shape = cost_model("measured", "rtx4090"), SHAPES["qwen1.5-moe"]
    gemms = make_launch(shape, 512, "down", "published", 1)
    plan = plan_launch(model, gemms, splits=(1,))
    tiles = lay_tiles(model, plan, gemms)
    released = tiles.released_order().duration_us
    assert in_order(released, 128).makespan_us > 1.05 * simulate_launch(model, plan, gemms).makespan_us
    assert simulate_launch(model, plan, gemms).over_ideal <= 1.08


def test_tiles_that_fill_the_slots_by_luck_are_not_preferred() -> None:
    """Of 64 experts' down, tiles of 32 rows fill 28 rounds exactly, until an expert has one row more."""
    gemms = make_launch(SHAPES["deepseek-v2-lite"], 2048, "down", "w4a16", 0)
    model = cost_model("measured", "rtx4090")
    plan = plan_launch(model, gemms)
    shortest = min(lay_tiles(model, plan, gemms).duration_us)
    ends = [simulate_launch(model, plan, make_launch(SHAPES["deepseek-v2-lite"], 2048, "down", "w4a16", seed))
            for seed in range(8)]  # fmt: skip
    assert max(end.over_ideal for end in ends) <= 1.03
    assert max(end.tail_us for end in ends) <= 2 * shortest


def test_k_is_split_where_whole_tiles_cannot_fill_the_machine() -> None:
    """Four experts with 8 columns of tiles, 64 wide and 14336 deep, are 32 tiles for 128 SMs."""
    model = cost_model("measured", "rtx4090")
    gemms = [Gemm(512, 14336, (1, 1, 1, 1), (W4A16,) * 4)]
    whole, split = (plan_launch(model, gemms, splits=splits) for splits in ((1,), (1, 2, 4, 8)))
    assert {one.parts for one in split.classes} == {8}
    ends = [simulate_launch(model, plan, gemms).makespan_us for plan in (whole, split)]
    assert ends[1] < 0.5 * ends[0]


def test_classes_are_ordered_by_the_time_of_their_tiles() -> None:
    model = cost_model("measured", "rtx4090")
    gemms = make_launch(SHAPES["qwen1.5-moe"], 512, "down", "mixed", 1)
    tiles = lay_tiles(model, plan_launch(model, gemms), gemms)
    means = [tiles.duration_us[tiles.class_of == at].mean() for at in sorted(set(tiles.class_of.tolist()))]
    assert all(after <= before + 1e-9 for before, after in pairwise(means))
    assert np.all(np.diff(tiles.class_of) >= 0)


def test_what_cannot_be_planned() -> None:
    model = cost_model("roofline", "h200")
    with pytest.raises(BadWorkload, match="cannot run w4a4_sym"):
        plan_launch(model, [Gemm(256, 256, (4,), (W4A4,))])
    plan = plan_launch(model, [Gemm(256, 256, (4,), (W8A8,))])
    with pytest.raises(BadWorkload, match="no tiles for w4a16_g128_sym"):
        lay_tiles(model, plan, [Gemm(256, 256, (4,), (W4A16,))])


@pytest.mark.parametrize("name", ["roofline", "measured"])
def test_no_rows_take_no_time(name: str) -> None:
    model = cost_model(name, "rtx4090")
    gemms = [Gemm(256, 256, (0, 0), (W8A8, W8A8))]
    assert simulate_launch(model, plan_launch(model, gemms), gemms).makespan_us == 0
