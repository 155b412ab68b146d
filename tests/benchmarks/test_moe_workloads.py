"""Workloads: the same routings in every run, launches that find no weights in the cache, rooflines by hand."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_workloads import (
    COPY_BYTES,
    MODELS,
    PARTS,
    PEAKS,
    TOKENS,
    Cell,
    Model,
    copies_needed,
    draw_routing,
    fixed_rotations,
    plan_copies,
    random_values,
    relative_error,
    roofline_us,
    rotations,
)

L2_BYTES = 60e6

models = st.builds(Model, st.just("drawn"), st.just(64), st.just(32), st.integers(4, 40), st.integers(1, 4))


def test_routings_are_the_published_ones() -> None:
    """The peers' published times hold for these very indices."""
    digest = hashlib.sha256()
    for name in ("qwen15_moe", "mixtral", "dsv3"):
        for tokens in TOKENS:
            for routing in ("skew", "balanced"):
                ids, weights = draw_routing(MODELS[name], tokens, routing)
                digest.update(ids.tobytes())
                np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert digest.hexdigest() == "99f34ad18d594b065db6237b12fc6ed661094a5a76cb63fa4ef7d53fc92f01b0"


@given(models, st.integers(1, 40), st.sampled_from(["skew", "balanced"]))
@settings(max_examples=50, deadline=None)
def test_a_token_never_meets_an_expert_twice(model: Model, tokens: int, routing: str) -> None:
    ids, weights = draw_routing(model, tokens, routing)
    assert ids.shape == weights.shape == (tokens, model.top_k)
    assert all(len(set(row)) == model.top_k for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < model.experts


def test_a_routing_that_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="neither skew nor balanced"):
        draw_routing(MODELS["tiny"], 1, "odd")


@given(models, st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_rotations_relabel_and_sort(model: Model, tokens: int, copies: int) -> None:
    turns = rotations(Cell(model, tokens, "gate_up"), 16, copies=copies, device="cpu")
    loads = np.sort(turns[0].counts)
    for turn in turns:
        flat = turn.ids.flatten()
        assert np.array_equal(np.sort(turn.counts), loads), "relabelling moves loads, it does not change them"
        assert torch.equal(flat[turn.order], flat.sort().values)
        assert torch.equal(turn.order[turn.inverse], torch.arange(flat.numel()))
        assert turn.ends.tolist() == np.cumsum(turn.counts).tolist()
        assert 0 <= turn.copy < copies


@pytest.mark.parametrize("name", ["qwen15_moe", "mixtral", "dsv3"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_an_expert_comes_back_only_after_all_others(name: str, tokens: int) -> None:
    cell = Cell(MODELS[name], tokens, "gate_up")
    seen: set[tuple[int, int]] = set()
    turns = rotations(cell, 4.125, copies=copies_needed(cell, 4.125), device="cpu")
    whole = cell.model.experts * copies_needed(cell, 4.125)
    for turn in turns:
        mine = {(turn.copy, expert) for expert in np.flatnonzero(turn.counts).tolist()}
        if len(seen) + len(mine) > whole or turn.active == cell.model.experts:
            break
        fresh = mine - seen
        # a rotation that runs over the last expert wraps round within its copy
        assert len(fresh) >= len(mine) - max(0, len(seen) % cell.model.experts + len(mine) - cell.model.experts)
        seen |= mine


def test_sets_of_weights_outgrow_the_cache() -> None:
    for model in (MODELS[name] for name in ("qwen15_moe", "mixtral", "dsv3")):
        cell = Cell(model, 1, "down")
        for bits in (16, 8, 4.125):
            assert copies_needed(cell, bits) * cell.weight_bytes(bits, model.experts) >= COPY_BYTES


def test_plans_keep_their_routing_and_turn_over_copies() -> None:
    cell = Cell(MODELS["qwen15_moe"], 1, "gate_up")
    turns = fixed_rotations(cell, plan_copies(cell, 5.0), device="cpu")
    assert [turn.copy for turn in turns] == list(range(len(turns)))
    assert all(torch.equal(turn.ids, turns[0].ids) for turn in turns)
    assert len(turns) * cell.weight_bytes(5.0, turns[0].active) > 2 * L2_BYTES


def test_rooflines_by_hand() -> None:
    cell = Cell(MODELS["qwen15_moe"], 16, "gate_up")
    weights, activations = 30 * 2816 * 2048 * 2, 16 * 2048 * 2 + 64 * 2816 * 2
    us, bound = roofline_us(cell, 16, 2, "bf16", 30)
    assert (us, bound) == (pytest.approx((weights + activations) / PEAKS["bandwidth"] * 1e6), "memory")
    assert us == pytest.approx(75.32, abs=0.1), "the published figure for this cell"
    us, bound = roofline_us(Cell(MODELS["mixtral"], 8192, "down"), 8, 1, "fp8", 8)
    assert (us, bound) == (pytest.approx(2 * 16384 * 4096 * 14336 / PEAKS["fp8"] * 1e6), "compute")


@pytest.mark.parametrize("name", MODELS)
def test_a_block_is_both_products(name: str) -> None:
    gate_up, down, block = (Cell(MODELS[name], 7, part) for part in PARTS)
    assert block.flops == gate_up.flops + down.flops
    assert block.weight_bytes(8, 3) == gate_up.weight_bytes(8, 3) + down.weight_bytes(8, 3)
    assert block.activation_bytes(1.0) < gate_up.activation_bytes(2.0) + down.activation_bytes(2.0)


def test_values_are_seeded_and_spread() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        first, again, other = (random_values((64, 64), 8.0, dtype, "cpu", seed) for seed in (1, 1, 2))
        assert torch.equal(first.float(), again.float())
        assert not torch.equal(first.float(), other.float())
        assert float(first.float().std()) == pytest.approx(8.0, rel=0.05)


def test_an_error_that_is_no_number_is_infinite() -> None:
    exact = torch.ones(3)
    assert relative_error(torch.tensor([1.0, 1.0, 1.3]), exact) == pytest.approx(0.3 / 3**0.5)
    assert relative_error(torch.tensor([1.0, torch.nan, 1.0]), exact) == float("inf")
