"""What holds for every registered sensitivity: shapes, signs, determinism, what it needs, a plan, and its text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.calib import Stats
from mxmoe.errors import MissingInput, NotASensitivity
from mxmoe.ir import ModuleOp, Scheme, banks, linears, moe_ops, plan_of
from mxmoe.passes import (
    SENSITIVITIES,
    AllocateBits,
    AnnotateCost,
    AnnotateRouting,
    AnnotateSensitivity,
    Environment,
    SeenBank,
    parse_sensitivity,
    run_passes,
)
from mxmoe.testing import registered

from .modules import CANDIDATES, before_and_after, small, small_bank, small_stats

METHODS = sorted(SENSITIVITIES.table)
WITH_OPTIONS = (
    *METHODS,
    *("squared{scale=total}", "mxmoe{scale=relative}", "frequency{of=mass}", "random{seed=7}", "pmq{gamma=1.0}"),
    *("mopeq{form=hutchinson scope=layer}", "alphaq{gamma=10.0}", "router-norm{promote=0.0}"),
)


def seen(module: ModuleOp, stats: Stats) -> list[SeenBank]:
    """What the pass shows to a method."""
    return [
        SeenBank(
            moe.block, name, {role: (op.n, op.k) for role, op in bank.linears.items()},
            moe.candidates, stats, stats.bank(moe.block, name),
        )
        for moe in moe_ops(module)
        for name, bank in banks(moe).items()
    ]  # fmt: skip


def losses(method: str, module: ModuleOp | None = None, stats: Stats | None = None) -> list[dict[str, np.ndarray]]:
    module = module or small(blocks=2)
    return [dict(table) for table in parse_sensitivity(method).losses(seen(module, stats or small_stats(module)))]


def without(stats: Stats, **gone: object) -> Stats:
    return replace(stats, banks={key: replace(sums, **gone) for key, sums in stats.banks.items()})


@pytest.mark.parametrize("method", WITH_OPTIONS)
def test_the_text_is_read_back(method: str) -> None:
    one = parse_sensitivity(method)
    assert str(one) == method
    assert parse_sensitivity(str(one)) == one
    assert one.name == method.partition("{")[0]


@pytest.mark.parametrize("method", WITH_OPTIONS)
def test_it_gives_a_table_for_every_linear(method: str) -> None:
    module = small(blocks=2)
    tables = losses(method, module)
    for bank, table in zip(seen(module, small_stats(module)), tables, strict=True):
        assert tuple(table) == bank.roles
        for values in table.values():
            assert values.shape == (bank.experts, len(CANDIDATES))
            assert (values >= 0).all()
            assert np.isfinite(values).all()
            # more bits never cost more here, where errors fall with every candidate
            assert (np.diff(values, axis=1) <= 0).all()
    again = losses(method, small(blocks=2))
    assert all(np.array_equal(a[r], b[r]) for a, b in zip(tables, again, strict=True) for r in a)


@pytest.mark.parametrize("method", [*WITH_OPTIONS, "mopeq{clusters=true}", "mopeq{clusters=true scope=layer}"])
def test_the_pass_takes_it_and_a_plan_comes_out(method: str) -> None:
    module = small(blocks=2)
    bits = None if "clusters" in method else 4.0
    steps = [AnnotateRouting(), AnnotateSensitivity(method), AnnotateCost(), AllocateBits(weight_bits=bits, r=1.0)]
    plan = plan_of(run_passes(module, steps, Environment(small_stats(module))))
    assert plan.allocation is not None
    assert bits is None or plan.allocation.weight_bits <= bits
    assert len(plan.rows) == 2 * (3 + 1) * 3


@pytest.mark.parametrize("method", METHODS)
def test_columns_follow_the_candidates(method: str) -> None:
    stats = small_stats(small(blocks=2))
    turned = losses(method, small(blocks=2, candidates=tuple(reversed(CANDIDATES))), stats)
    for one, other in zip(losses(method, small(blocks=2), stats), turned, strict=True):
        for role in one:
            np.testing.assert_allclose(one[role], other[role][:, ::-1])


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_any_statistics_are_taken(method: str, seed: int) -> None:
    """Experts without tokens, weights of zero, negative router weights, errors of nothing."""
    rng = np.random.default_rng(seed)
    module = small()
    stats = small_stats(module)
    torn = {}
    for key, sums in stats.banks.items():
        hit = rng.random(sums.experts) < 0.6
        facts = {
            fact: {role: np.where(rng.random(sums.experts) < 0.8, values, np.nan if fact == "alpha" else 0.0)
                   for role, values in table.items()}
            for fact, table in sums.facts.items()
        }  # fmt: skip
        errors = {
            name: {role: np.where(hit[:, None], values, 0.0) for role, values in getattr(sums, name).items()}
            for name in ("squared_error", "fisher_error")
        }
        torn[key] = replace(
            sums, tokens=np.where(hit, sums.tokens, 0), mass=np.where(hit, -sums.mass, 0.0),
            squared_output=np.where(hit, sums.squared_output, 0.0), facts=facts, **errors,
        )  # fmt: skip
    for table in losses(method, module, replace(stats, banks=torn)):
        for values in table.values():
            assert not np.isnan(values).any()
            assert (values >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_it_needs(method: str) -> None:
    one = parse_sensitivity(method)
    module = small()
    stats = small_stats(module)
    enough = {
        key: replace(
            sums,
            facts={fact: sums.facts[fact] for fact in one.needs_facts},
            fisher_error=sums.fisher_error if one.needs_gradients else {},
        )
        for key, sums in stats.banks.items()
    }
    assert losses(method, module, replace(stats, banks=enough))
    if one.needs_gradients:
        with pytest.raises(MissingInput, match="gradients=True"):
            losses(method, module, without(stats, fisher_error={}))
    for fact in one.needs_facts:
        left = {key: replace(sums, facts={name: table for name, table in sums.facts.items() if name != fact})
                for key, sums in stats.banks.items()}  # fmt: skip
        with pytest.raises(MissingInput, match=f"needs {fact} of layers.0.mlp .*observe with facts=\\('{fact}',\\)"):
            losses(method, module, replace(stats, banks=left))


@pytest.mark.parametrize("method", METHODS)
def test_golden(method: str, golden: object) -> None:
    module = small(small_bank(gated=False))
    assert golden == before_and_after(AnnotateSensitivity(method), module, Environment(small_stats(module)))


@pytest.mark.parametrize("method", ["uniform", "frequency", "router-norm", "mopeq"])
@given(bits=st.integers(0, len(CANDIDATES) - 1), experts=st.integers(2, 7))
@settings(max_examples=15, deadline=None)
def test_equal_scores_give_the_uniform_plan_where_the_budget_is_a_schemes(method: str, bits: int, experts: int) -> None:
    module = small(small_bank(experts=experts), candidates=tuple(map(Scheme.parse, ("w2a16_g32_sym", "w4a16_g32_sym",
                                                                                    "w8a16_g32_sym"))))  # fmt: skip
    stats = small_stats(module)
    key = ("layers.0.mlp", "routed")
    ones = np.ones(experts)
    facts = {fact: dict.fromkeys((*stats.banks[key].facts["norm"], "router"), ones) for fact in ("norm", "spread")}
    equal = replace(stats.banks[key], tokens=np.full(experts, 10), mass=ones, facts=facts)
    budget = moe_ops(module)[0].candidates[bits].effective_bits(64)
    steps = [AnnotateSensitivity(method), AnnotateCost(), AllocateBits(weight_bits=budget, r=1.0)]
    run_passes(module, steps, Environment(replace(stats, banks={key: equal})))
    assert {index for op in linears(module) if op.choice for index in op.choice.array.tolist()} == {bits}


class NoSensitivity:
    """Registered by mistake."""


def test_what_is_no_sensitivity_is_refused() -> None:
    with registered(SENSITIVITIES, "wrong", NoSensitivity), pytest.raises(NotASensitivity, match="no subclass"):
        parse_sensitivity("wrong")
    with (
        registered(SENSITIVITIES, "other", SENSITIVITIES["pmq"]),
        pytest.raises(NotASensitivity, match="name = 'other'"),
    ):
        parse_sensitivity("other")
