"""What weights say by themselves: the closed form against sampling, laws of scale, and the router's rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import CHEAP, FACTS, find_router, observe, observe_weights
from mxmoe.calib.facts import alpha, norm, spread, trace, variance
from mxmoe.errors import UnknownName
from mxmoe.frontend import lift

from .test_observer import EXPERTS, HIDDEN, config, randomized


def matrix(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn((n, k), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k"), [(8, 12), (16, 40), (3, 5)])
def test_sampling_the_trace_finds_the_closed_form(n: int, k: int) -> None:
    weight = matrix(n, k)
    size = n * k
    closed = (size - 1) / (size * float(norm(weight)))
    sampled = np.array([float(trace(weight, probes=40, seed=seed)) for seed in range(8)])
    error = sampled.std(ddof=1) / math.sqrt(len(sampled))
    assert abs(sampled.mean() - closed) <= 4 * error
    # one unit vector v gives (1 - (v . w)^2) / ||W||: the spread is of order 1 / size
    assert error < 0.05 * closed


def test_a_hessian_vector_product_is_exact() -> None:
    """With every unit vector of a basis as a probe the trace is exact."""
    weight = matrix(3, 4).double()
    point = weight.flatten()
    hessian = torch.autograd.functional.hessian(lambda w: w.norm(), point)
    assert isinstance(hessian, Tensor)
    assert float(hessian.trace()) == pytest.approx((12 - 1) / float(point.norm()))


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_laws_of_scale(scale: float, seed: int) -> None:
    weight = matrix(20, 24, seed)
    for fact, power in ((norm, 1), (variance, 2), (spread, 2), (alpha, 0)):
        assert float(fact(weight * scale)) == pytest.approx(float(fact(weight)) * scale**power, rel=1e-3), fact
    assert float(trace(weight * scale, probes=3)) == pytest.approx(float(trace(weight, probes=3)) / scale, rel=1e-3)


def test_the_exponent_is_hills() -> None:
    """Eigenvalues in a row of their own: a diagonal matrix, whose one block is itself."""
    values = torch.tensor([100.0, 50, 20, 10, 8, 7, 6, 5, 4, 3, 2, 1, 0.9, 0.8, 0.7])
    top = 10  # a tenth of 15, and ten at least
    want = 1 + top / float((values[:top] / values[top]).log().sum())
    assert float(alpha(torch.diag(values.sqrt()))) == pytest.approx(want, rel=1e-5)
    # heavier tails, smaller exponents
    assert float(alpha(torch.diag(values))) < float(alpha(torch.diag(values.sqrt())))


def test_the_exponent_of_a_law_is_found() -> None:
    """Squared singular values drawn from a power law with density exponent a: Hill's estimator finds a."""
    rng = np.random.default_rng(0)
    for a in (2.0, 3.5):
        values = torch.from_numpy((1 - rng.random(128)) ** (-1 / (a - 1))).float()
        left, _ = torch.linalg.qr(matrix(128, 128, 1))
        right, _ = torch.linalg.qr(matrix(128, 128, 2))
        found = float(alpha(left * values.sqrt() @ right))
        assert found == pytest.approx(a, rel=0.35)


@pytest.mark.parametrize("shape", [(200, 40), (40, 200), (130, 300), (1, 5)])
def test_any_shape_has_an_exponent_or_says_nan(shape: tuple[int, int]) -> None:
    found = float(alpha(matrix(*shape)))
    assert found > 1 or math.isnan(found)
    assert float(alpha(matrix(*shape))) == found or math.isnan(found)
    if shape[0] > 1:
        turned = float(alpha(matrix(*shape).T.contiguous()))
        assert turned == pytest.approx(found, rel=0.2)
    assert math.isnan(float(alpha(torch.zeros(8, 8))))


def test_facts_are_found_while_observing() -> None:
    block = randomized(Qwen2MoeSparseMoeBlock(config()))
    x = torch.randn((40, HIDDEN), generator=torch.Generator().manual_seed(1))
    stats = observe(lift(block), x, schemes=["w4a16_sym"], facts=("norm", "alpha"), quiet=True)
    routed, shared = stats.bank("moe", "routed"), stats.bank("moe", "shared")
    down = block.experts.down_proj.detach()  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(routed.facts["norm"]["down"], down.flatten(1).norm(dim=1), rtol=1e-5)  # type: ignore[operator]
    gate = block.gate.weight.detach()  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(routed.facts["norm"]["router"], gate.norm(dim=1), rtol=1e-5)  # type: ignore[operator]
    assert set(routed.facts) == {"norm", "alpha"}
    assert set(shared.facts["norm"]) == {"gate", "up", "down"}
    free = observe_weights(lift(block), ["w4a16_sym"], quiet=True)
    assert set(free.bank("moe", "routed").facts) == set(CHEAP)
    none = observe_weights(lift(block), ["w4a16_sym"], facts=(), quiet=True)
    assert none.bank("moe", "routed").facts == {}
    with pytest.raises(UnknownName, match="no weight fact named 'nrm'; did you mean norm"):
        observe_weights(lift(block), ["w4a16_sym"], facts=("nrm",), quiet=True)


@pytest.mark.parametrize("name", sorted(FACTS.table))
def test_every_fact_is_one_finite_number_of_the_matrix_alone(name: str) -> None:
    fact = FACTS[name]
    weight = matrix(24, 32)
    before = weight.clone()
    found = fact(weight)
    assert found.shape == ()
    assert bool(found.isfinite())
    assert torch.equal(fact(weight), found)
    assert torch.equal(weight, before)
    assert not found.requires_grad


def test_the_router_is_found_or_not_guessed() -> None:
    block = randomized(Qwen2MoeSparseMoeBlock(config()))
    router = find_router(lift(block).blocks[0])
    assert router is not None
    assert router.weight is block.gate.weight  # type: ignore[union-attr]
    assert router.bias is None
    block.second = nn.Linear(HIDDEN, EXPERTS)
    assert find_router(lift(block).blocks[0]) is None
    assert find_router(lift(block.experts, top_k=2).blocks[0]) is None  # type: ignore[arg-type]
