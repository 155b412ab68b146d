"""
Allocation problems with published figures, solved again.

MxMoE: Duanmu et al., ICML 2025. Its unit is the size of one routed expert's matrix; a shared expert counts as as many
experts as it is wide, and gate, up and down are of one size.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import InfeasibleBudget
from mxmoe.solver import Problem, solve, solve_parts

CHARGED = [4.0, 4.25, 8.0]
"""Bits that MxMoE counts for w4a4 per channel, w4a4 in groups of 128, and w8a8; scales per channel are free."""
TRUE = [4.0, 4.125, 8.0]
"""The same where symmetric groups have one 16-bit scale, and no zero point."""

SHAPES = {"Qwen1.5-MoE-A2.7B": (60, 4), "DeepSeek-V2-Lite": (64, 2), "Qwen2-57B-A14B": (64, 8), "Mixtral-8x7B": (8, 0)}
"""Routed experts, and the width of the shared one in experts."""


def sizes(model: str) -> np.ndarray:
    """[row] of gate, up and down of every routed expert, then of the shared one."""
    routed, shared = SHAPES[model]
    return np.repeat([*np.ones(routed), *([shared] if shared else [])], 3).astype(float)


def table_seven() -> np.ndarray:
    """
    [row] the schemes of Qwen1.5-MoE's layer 5 at W5A5, as its table 7 counts them.

    Gate and up: 51 experts in groups, 9 per channel, of these the shared one, and one in 8 bits. Down: 35 in 8 bits, of
    these the shared one, the others in groups. Which expert is which plays no part in sizes.
    """
    gate_up = [1] * 51 + [0] * 8 + [2] + [0]
    down = [2] * 34 + [1] * 26 + [2]
    return np.stack([gate_up, gate_up, down], axis=1).ravel()


def only(choice: np.ndarray) -> np.ndarray:
    """Losses that leave one plan."""
    return np.where(np.arange(3) == choice[:, None], 1.0, np.inf)


def test_table_seven_meets_its_budget_exactly() -> None:
    numel = sizes("Qwen1.5-MoE-A2.7B")
    problem = Problem(only(table_seven()), CHARGED, numel=numel)
    found = solve(problem, 5.0)
    assert found.choice.tolist() == table_seven().tolist()
    assert (found.bytes * 8, numel.sum()) == (960.0, 192.0)
    with pytest.raises(InfeasibleBudget, match=r"smallest feasible weight_bits is 5$"):
        solve(problem, 4.999)
    honest = solve(Problem(only(table_seven()), TRUE, numel=numel), 5.0)
    assert honest.weight_bits == pytest.approx(4.917, abs=5e-4)


@pytest.mark.parametrize(("model", "units"), [("Qwen1.5-MoE-A2.7B", 192), ("DeepSeek-V2-Lite", 198),
                                              ("Qwen2-57B-A14B", 216), ("Mixtral-8x7B", 24)])  # fmt: skip
def test_budget_units_of_a_layer(model: str, units: int) -> None:
    assert sizes(model).sum() == units


@pytest.mark.parametrize("model", SHAPES)
def test_a_quarter_of_a_bit_buys_eight_bits_for_a_sixteenth(model: str) -> None:
    """The mix that the paper's figures call W4.25A15.5: 16 - 8 / 16 bits of activations."""
    numel = sizes(model)
    routed = SHAPES[model][0]
    rng = np.random.default_rng(0)
    loss = np.stack([rng.random(numel.size) + 1, np.zeros(numel.size)], axis=1)
    loss[3 * routed :] = [[1e-6, 0]]  # the shared expert is not what the bits are for
    found = solve(Problem(loss, [4.0, 8.0], numel=numel), 4.25)
    bought = numel[found.choice == 1].sum()
    assert bought == np.floor(numel.sum() / 16)
    if numel.sum() % 16 == 0:
        assert 16 - 8 * bought / numel.sum() == 15.5


@pytest.mark.parametrize(("model", "least"), [("Qwen1.5-MoE-A2.7B", 4.25), ("DeepSeek-V2-Lite", 4.1212),
                                              ("Qwen2-57B-A14B", 4.4444)])  # fmt: skip
def test_which_shared_expert_eight_bits_can_be_bought_for(model: str, least: float) -> None:
    """At 512 tokens that alone would make w8a8 pay; it is a part of 4 / 64, 2 / 66 and 8 / 72 of a layer."""
    numel = sizes(model)
    loss = np.tile([1.0, 0.0], (numel.size, 1))
    loss[-3:] = [np.inf, 0.0]
    problem = Problem(loss, [4.0, 8.0], numel=numel)
    assert solve(problem, least + 1e-4).choice[-3:].tolist() == [1, 1, 1]
    with pytest.raises(InfeasibleBudget, match="smallest feasible"):
        solve(problem, least - 1e-3)


@given(st.integers(0, 2**16), st.integers(2, 12), st.floats(1, 4))
@settings(max_examples=50, deadline=None)
def test_alphaq_is_what_its_greedy_gives(seed: int, rows: int, bits: float) -> None:
    """Costs of a 4^-b over widths in a row are convex, so taking the best step again and again is exact."""
    a = np.random.default_rng(seed).lognormal(size=rows)
    widths = np.arange(1, 5)
    loss = a[:, None] * 4.0**-widths
    choice = np.zeros(rows, int)
    while choice.sum() + rows + 1 <= bits * rows * (1 + 1e-12) and (choice < 3).any():
        gain = np.where(
            choice < 3, loss[np.arange(rows), choice] - loss[np.arange(rows), np.minimum(choice + 1, 3)], -1
        )
        choice[gain.argmax()] += 1
    found = solve(Problem(loss, widths.astype(float)), bits)
    assert found.loss == pytest.approx(loss[np.arange(rows), choice].sum(), rel=1e-9)


@given(st.integers(0, 2**16), st.sampled_from(range(12, 21)))
@settings(max_examples=40, deadline=None)
def test_pmqs_program_is_solved_exactly(seed: int, budget: int) -> None:
    """MC-MoE (ICLR 2025) on Mixtral: 8 experts of 1 to 3 bits, 12 to 20 bits for each of the layers."""
    rng = np.random.default_rng(seed)
    layers, experts = 3, 8
    error = np.sort(rng.random((layers * experts, 3)), axis=1)[:, ::-1] * rng.lognormal(size=(layers * experts, 1))
    layer = np.repeat(np.arange(layers), experts)
    problem = Problem(error, [1.0, 2.0, 3.0])
    found = solve_parts(problem, layer, budget / experts, solver="pulp")
    for part in range(layers):
        own = error[layer == part]
        # dynamic programming over the bits that are left
        best = np.full(budget + 1, np.inf)
        best[0] = 0.0
        for row in own:
            ahead = np.full(budget + 1, np.inf)
            for b in (1, 2, 3):
                ahead[b:] = np.minimum(ahead[b:], best[:-b] + row[b - 1])
            best = ahead
        rows = np.flatnonzero(layer == part)
        assert error[rows, found.choice[rows]].sum() == pytest.approx(best.min(), rel=1e-6)
        assert (found.choice[rows] + 1).sum() <= budget
