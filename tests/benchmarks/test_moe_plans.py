"""Plans: the same in every run, within their bits, and rooflines that agree with those of one scheme."""

from __future__ import annotations

import numpy as np
import pytest
from moe_plans import (
    BITS,
    INT8,
    RANDOM_POOL,
    SCHEMES,
    UNITS,
    W4A8,
    hottest,
    mean_bits,
    plan_bytes,
    plan_of,
    plan_roofline_us,
    random_schemes,
    rows_of,
    solve_plan,
    target_costs,
    used_bits,
)
from moe_workloads import MODELS, PARTS, TOKENS, Cell, Model, roofline_us

REAL = ("qwen15_moe", "mixtral", "dsv3")


def test_hot_experts_are_those_with_most_rows() -> None:
    chosen = hottest(np.array([5, 0, 9, 1]), 0.5)
    assert chosen == (INT8, W4A8, INT8, W4A8)
    assert hottest(np.array([1, 1]), 0.0).count(INT8) == 1


def test_random_plans_are_seeded_and_differ() -> None:
    assert random_schemes(64, 3) == random_schemes(64, 3)
    assert len({random_schemes(64, seed) for seed in range(20)}) == 20
    assert set(random_schemes(64, 3)) <= set(RANDOM_POOL)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("tokens", TOKENS)
def test_solved_plans_hold_their_bits(name: str, tokens: int) -> None:
    plan = plan_of("bits:5", Cell(MODELS[name], tokens, "block"))
    assert [len(product) for product in plan] == [MODELS[name].experts] * 2
    # nothing of 0.1 bits is left, or less than what one expert's down would take more: of eight, 0.16
    finest = max(SCHEMES[INT8][0] - SCHEMES[one][0] for one in plan[1]) / 3 / MODELS[name].experts
    assert BITS - max(0.1, finest) < mean_bits(plan) <= BITS
    parts = tuple(plan_of("bits:5", Cell(MODELS[name], tokens, part))[0] for part in PARTS[:2])
    assert parts == plan


def test_a_plan_is_solved_within_its_bits() -> None:
    model = Model("drawn", 256, 128, 16, 2)
    plan = solve_plan(model, 64, 6.0, target_costs()[0])
    assert 5.5 < used_bits(plan) <= 6.0
    assert set("".join(plan.values())) in map(set, UNITS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_a_uniform_plan_has_the_uniform_roofline(part: str, tokens: int) -> None:
    cell = Cell(MODELS["qwen15_moe"], tokens, part)
    rows = rows_of(cell)
    bits, act_bytes, unit, _ = SCHEMES[INT8]
    plan = plan_of(f"all:{INT8}", cell)
    active = int((rows > 0).sum())
    assert plan_roofline_us(cell, rows, plan) == pytest.approx(roofline_us(cell, bits, act_bytes, unit, active)[0])
    assert plan_bytes(cell, rows, plan) == pytest.approx(cell.weight_bytes(bits, active))


def test_a_plan_of_no_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no plans of kind 'odd'"):
        plan_of("odd:1", Cell(MODELS["tiny"], 1, "down"))
