"""Frequencies and masses, observed and uniform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from mxmoe.errors import NotInStats, StatsDoNotFit, WrongStage
from mxmoe.ir import ModuleOp, banks, moe_ops
from mxmoe.passes import AnnotateRouting, Environment, LowerToGroupGemm, run_passes
from mxmoe.testing import modules

from .modules import before_and_after, choose, small, small_bank, small_stats


def test_observed(golden: object) -> None:
    module = small()
    assert golden == before_and_after(AnnotateRouting(), module, Environment(small_stats(module)))


@given(modules("lifted"))
@settings(max_examples=25, deadline=None)
def test_without_statistics_routing_is_uniform_and_frequencies_sum_to_top_k(module: ModuleOp) -> None:
    run_passes(module, [AnnotateRouting()], Environment())
    for moe in moe_ops(module):
        assert moe.stage == "annotated"
        for bank in banks(moe).values():
            frequency, mass = bank.route.frequency, bank.route.mass
            assert frequency is not None
            assert mass is not None
            assert frequency.array.sum() == pytest.approx(bank.top_k, rel=1e-5)
            assert mass.array.sum() == pytest.approx(1, rel=1e-5)
            assert np.ptp(frequency.array) == 0


def test_frequencies_are_per_token_and_not_per_assignment() -> None:
    module = small()
    run_passes(module, [AnnotateRouting()], Environment(small_stats(module, tokens=300)))
    frequency = banks(moe_ops(module)[0])["routed"].route.frequency
    assert frequency is not None
    np.testing.assert_allclose(frequency.array, [1 / 3, 2 / 3, 1.0], rtol=1e-6)


def test_an_allocated_block_may_be_annotated_anew_and_stays_allocated() -> None:
    module = choose(small())
    run_passes(module, [AnnotateRouting()], Environment())
    assert moe_ops(module)[0].stage == "allocated"


def test_a_lowered_block_is_refused_and_left_as_it_was() -> None:
    module = choose(small())
    run_passes(module, [LowerToGroupGemm()], Environment())
    with pytest.raises(WrongStage, match=r"annotate-routing takes .*, layers.0.mlp is lowered; run it earlier"):
        run_passes(module, [AnnotateRouting()], Environment())
    module.verify()


def test_statistics_of_another_model_are_refused() -> None:
    stats = small_stats(small())
    with pytest.raises(StatsDoNotFit, match=r"layers\.0\.mlp routed has 5 experts, 3 were observed"):
        run_passes(small(small_bank(experts=5)), [AnnotateRouting()], Environment(stats))
    with pytest.raises(NotInStats, match=r"layers\.1\.mlp"):
        run_passes(small(blocks=2), [AnnotateRouting()], Environment(stats))
