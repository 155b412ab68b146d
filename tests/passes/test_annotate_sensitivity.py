"""Sensitivities from statistics: norms, scales, and what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from mxmoe.calib import Stats
from mxmoe.errors import BadOption, BadPipeline, MissingInput, NotInStats, StatsDoNotFit, UnknownName
from mxmoe.ir import ModuleOp, Scheme, linears
from mxmoe.passes import AnnotateSensitivity, Environment, parse_passes, run_passes

from .modules import before_and_after, small, small_bank, small_stats


def sensitivities(module: ModuleOp, step: AnnotateSensitivity, stats: Stats) -> list[np.ndarray]:
    run_passes(module, [step], Environment(stats))
    return [op.sensitivity.array for op in linears(module) if op.sensitivity is not None]


def test_squared(golden: object) -> None:
    module = small(small_bank(gated=False))
    assert golden == before_and_after(AnnotateSensitivity(), module, Environment(small_stats(module)))


def test_unsquared_is_the_root() -> None:
    stats = small_stats(small())
    squared = sensitivities(small(), AnnotateSensitivity(), stats)
    unsquared = sensitivities(small(), AnnotateSensitivity(method="mxmoe{scale=relative}"), stats)
    assert len(squared) == len(unsquared) == 6
    for one, other in zip(squared, unsquared, strict=True):
        np.testing.assert_allclose(one, other**2)


@pytest.mark.parametrize(("method", "unit"), [("squared", 70.0), ("mxmoe", 70.0**0.5)])
def test_relative_divides_by_the_output_of_all_banks(method: str, unit: float) -> None:
    stats = small_stats(small())  # squared outputs 10 + 20 + 30 routed, and 10 shared
    total = sensitivities(small(), AnnotateSensitivity(method=f"{method}{{scale=total}}"), stats)
    relative = sensitivities(small(), AnnotateSensitivity(method=f"{method}{{scale=relative}}"), stats)
    for one, other in zip(total, relative, strict=True):
        np.testing.assert_allclose(one / unit, other)


def test_columns_follow_the_candidates_and_not_the_statistics() -> None:
    stats = small_stats(small())
    turned = small(candidates=tuple(reversed(stats.schemes)))
    for one, other in zip(
        sensitivities(small(), AnnotateSensitivity(), stats),
        sensitivities(turned, AnnotateSensitivity(), stats),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other[:, ::-1])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(MissingInput, match=r"annotate-sensitivity needs statistics; .*--stats FILE"):
        run_passes(small(), [AnnotateSensitivity()], Environment())
    stats = small_stats(small())
    with pytest.raises(NotInStats, match="w3a16_sym"):
        run_passes(small(candidates=(Scheme.parse("w3a16_sym"),)), [AnnotateSensitivity()], Environment(stats))
    with pytest.raises(StatsDoNotFit, match="5 experts"):
        run_passes(small(small_bank(experts=5)), [AnnotateSensitivity()], Environment(stats))


def test_a_method_that_cannot_be_is_found_out_before_anything_runs() -> None:
    with pytest.raises(UnknownName, match="no sensitivity named 'squred'; did you mean squared"):
        AnnotateSensitivity(method="squred")
    with pytest.raises(BadOption, match=r"scale=per-token.*relative or total"):
        AnnotateSensitivity(method="squared{scale=per-token}")
    with pytest.raises(BadOption, match="the option scal: did you mean scale"):
        parse_passes('annotate-sensitivity{method="mxmoe{scal=total}"}')
    with pytest.raises(BadPipeline, match="one sensitivity is wanted"):
        AnnotateSensitivity(method="squared,fisher")
    with pytest.raises(BadPipeline, match="not a pipeline"):
        AnnotateSensitivity(method="squared{")


def test_options_of_a_method_are_spelled_within_those_of_the_pass() -> None:
    step = AnnotateSensitivity(method="pmq{alpha=2.0 gamma=1.0}")
    assert str(step) == 'annotate-sensitivity{method="pmq{alpha=2.0 gamma=1.0}"}'
    assert parse_passes(str(step)) == (step,)
    assert str(step.sensitivity) == "pmq{alpha=2.0 gamma=1.0}"
