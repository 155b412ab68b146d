"""What each method says, held against its formula on statistics of a few figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.calib import Stats
from mxmoe.errors import BadOption
from mxmoe.passes import AllocateBits, AnnotateCost, AnnotateSensitivity, Environment, distortion, run_passes
from mxmoe.passes.sensitivities.mopeq import clusters_of

from .modules import CANDIDATES, small, small_bank, small_stats
from .test_every_sensitivity import losses, seen

KEY = ("layers.0.mlp", "routed")


def routed(method: str, stats: Stats | None = None) -> dict[str, np.ndarray]:
    module = small()
    return losses(method, module, stats or small_stats(module))[0]


def changed(**fields: object) -> Stats:
    stats = small_stats(small())
    return replace(stats, banks={**stats.banks, KEY: replace(stats.banks[KEY], **fields)})


def test_squared_and_mxmoe_are_the_observed_errors() -> None:
    sums = small_stats(small()).banks[KEY]
    for role, error in sums.squared_error.items():
        np.testing.assert_allclose(routed("squared{scale=total}")[role], error)
        np.testing.assert_allclose(routed("mxmoe")[role], np.sqrt(error))


def test_fisher_takes_the_weighed_errors_with_the_fallback() -> None:
    sums = small_stats(small()).banks[KEY]
    np.testing.assert_allclose(routed("fisher")["up"], sums.fisher_error["up"])
    few = replace(changed(tokens=np.array([50, 1, 49])), min_tokens=32)
    table = routed("fisher", few)["up"]
    per_token = sums.fisher_error["up"][[0, 2]].sum(axis=0) / 99
    np.testing.assert_allclose(table[1], per_token)


@given(st.floats(0, 3), st.floats(0, 3), st.floats(0.5, 3))
@settings(max_examples=30, deadline=None)
def test_pmq_is_a_product_of_powers(alpha: float, beta: float, gamma: float) -> None:
    sums = small_stats(small()).banks[KEY]
    table = routed(f"pmq{{alpha={alpha:.6f} beta={beta:.6f} gamma={gamma:.6f}}}")
    alpha, beta, gamma = (float(f"{value:.6f}") for value in (alpha, beta, gamma))
    f, w = sums.tokens / sums.tokens.sum(), sums.mass / sums.mass.sum()
    for role, error in sums.squared_error.items():
        np.testing.assert_allclose(table[role], (f**alpha * w**beta)[:, None] * np.sqrt(error) ** gamma, rtol=1e-9)


def test_scores_of_frequency_and_mass() -> None:
    stats = small_stats(small())
    curve = distortion(seen(small(), stats))
    sums = stats.banks[KEY]
    np.testing.assert_allclose(routed("frequency")["up"], np.outer(sums.tokens / 100, curve))
    np.testing.assert_allclose(routed("frequency{of=mass}")["up"], np.outer(sums.mass / 100, curve))


def test_the_distortion_is_relative_to_the_output() -> None:
    stats = small_stats(small())
    # errors of gate and up are part * 256 / 16^i, down's four times that; outputs are part * 10: 25.6 and 102.4
    np.testing.assert_allclose(distortion(seen(small(), stats)), (25.6 * 2 + 102.4) / 3 / 16.0 ** np.arange(3))
    assert distortion([]).size == 0


def test_mopeq_scores_by_the_norms() -> None:
    norm, n = np.array([1.0, 2.0, 3.0]), 32 * 64
    score = 3 * (n - 1) / (n * norm)
    table = routed("mopeq")["gate"]
    np.testing.assert_allclose(table[:, 0] / table[0, 0], score / score[0])
    hutchinson = routed("mopeq{form=hutchinson}")["gate"]
    np.testing.assert_allclose(hutchinson, table * n / (n - 1))


def test_scope_layer_divides_by_the_sum_of_the_block() -> None:
    module = small(small_bank(), blocks=2)
    stats = small_stats(module)
    norms = dict.fromkeys(("gate", "up", "down"), np.array([10.0, 20, 30]))
    heavy = replace(stats.banks["layers.1.mlp", "routed"], facts={"norm": norms})
    stats = replace(stats, banks={**stats.banks, ("layers.1.mlp", "routed"): heavy})
    one, other = losses("mopeq{scope=layer}", module, stats)
    np.testing.assert_allclose(one["up"], other["up"])
    one, other = losses("mopeq{scope=model}", module, stats)
    np.testing.assert_allclose(one["up"], 10 * other["up"])


def test_clusters_leave_each_expert_one_scheme() -> None:
    first, second = np.array([1.0, 1.1, 0.1, 0.12, 0.01]), np.array([10.0, 11.0, 1.0, 1.2, 1.1])
    module = small(small_bank(experts=5), small_bank("shared", 1), blocks=2)
    stats = small_stats(module)
    found = {}
    for i, values in enumerate((first, second)):
        sums = stats.banks[f"layers.{i}.mlp", "routed"]
        facts = {"norm": dict.fromkeys(("gate", "up", "down"), 1 / values)}
        found[f"layers.{i}.mlp", "routed"] = replace(sums, facts=facts)
    stats = replace(stats, banks={**stats.banks, **found})
    per_layer = [table["up"] for table in losses("mopeq{clusters=true scope=layer}", module, stats)]
    assert per_layer[0].argmin(axis=1).tolist() == [2, 2, 1, 1, 0]
    model_wide = [table["up"] for table in losses("mopeq{clusters=true}", module, stats)]
    # 10 and 11 lie apart from all others; of these the ones around 1 from those near 0
    assert model_wide[2].argmin(axis=1).tolist() == [2, 2, 1, 1, 1]
    assert model_wide[0].argmin(axis=1).tolist() == [1, 1, 0, 0, 0]
    for table in (*per_layer, *model_wide):
        assert (np.isfinite(table).sum(axis=1) == 1).all()
    assert per_layer[1].argmin() == model_wide[1].argmin() == 2  # the shared expert has the widest
    steps = [AnnotateSensitivity("mopeq{clusters=true}"), AnnotateCost(), AllocateBits(weight_bits=None, r=1.0)]
    assert run_passes(module, steps, Environment(stats))


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_clusters_are_intervals_in_order(values: list[float], k: int) -> None:
    given_values = np.array(values)
    found = clusters_of(given_values, k)
    assert ((found >= 0) & (found < k)).all()
    ranked = found[np.argsort(given_values, kind="stable")]
    assert (np.diff(ranked) >= 0).all()


def test_clusters_that_are_apart_are_found() -> None:
    assert clusters_of(np.array([1, 50.0, 2, 51, 900, 52]), 3).tolist() == [0, 1, 0, 1, 2, 1]


def test_alphaq_is_its_formula() -> None:
    sums = small_stats(small()).banks[KEY]
    alpha, variance = sums.facts["alpha"]["up"], sums.facts["variance"]["up"]
    median = np.median(np.concatenate([np.tile(alpha, 3), np.tile(3.0, 3)]))  # three roles; the shared expert has 3
    noise = [4.0**-2, 4.0**-4, 4.0**-8 + 4.0**-8]  # w2a16, w4a16, w8a8
    for gamma in (1.0, 5.0):
        table = routed(f"alphaq{{gamma={gamma}}}")["up"]
        np.testing.assert_allclose(table, np.outer((median / alpha) ** gamma * variance, noise))
    lost = changed(facts={**sums.facts, "alpha": dict.fromkeys(sums.facts["alpha"], np.full(3, np.nan))})
    np.testing.assert_allclose(routed("alphaq", lost)["up"], np.outer(variance, noise))


def test_router_norm_turns_lengths_around_and_lifts_the_widest() -> None:
    # lengths 1.5, 1, 0.5: scores 2/3, 1, 2; expert 0 has the widest neuron
    table = routed("router-norm{promote=0.0}")["up"][:, 0]
    np.testing.assert_allclose(table / table[1], [2 / 3, 1, 2])
    lifted = routed("router-norm{promote=0.34}")["up"][:, 0]
    np.testing.assert_allclose(lifted / lifted[1], [2, 1, 2])


def test_random_is_the_seeds() -> None:
    one, same, other = (routed(f"random{{seed={seed}}}")["up"] for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    # what is drawn for a block does not depend on the others
    pair = losses("random{seed=3}", small(blocks=2))
    scale = one[0, 0] / pair[0]["up"][0, 0]
    np.testing.assert_allclose(one, pair[0]["up"] * scale)
    assert not np.allclose(pair[0]["up"], pair[2]["up"])
    assert not np.allclose(routed("random")["up"], routed("random")["down"])


@given(factor=st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_only_ratios_count(factor: float) -> None:
    """Scaling all weights of a block, or all its outputs, changes no comparison within it."""
    stats = small_stats(small())
    sums = stats.banks[KEY]
    scaled = changed(
        facts={
            fact: {role: values * factor ** {"norm": 1, "trace": -1, "variance": 2, "spread": 2, "alpha": 0}[fact]
                   for role, values in table.items()}
            for fact, table in sums.facts.items()
        }
    )  # fmt: skip
    for method in ("mopeq", "alphaq{gamma=0.0}", "router-norm"):
        one, other = routed(method)["up"], routed(method, scaled)["up"]
        np.testing.assert_allclose(one / one[0, 0], other / other[0, 0])


@pytest.mark.parametrize(
    "method", ["random{seed=-1}", "router-norm{promote=1.5}", "mopeq{form=open}", "frequency{of=x}"]
)
def test_options_that_cannot_be(method: str) -> None:
    with pytest.raises(BadOption, match=method.partition("{")[2].rstrip("}")):
        losses(method)


def test_all_candidates_are_in_the_fixture() -> None:
    assert [scheme.weight_bits for scheme in CANDIDATES] == [2, 4, 8]
