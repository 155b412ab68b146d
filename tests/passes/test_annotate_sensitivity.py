"""Sensitivities from statistics: norms, scales, and what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from mxmoe.calib import Stats
from mxmoe.errors import BadOption, MissingInput, NotInStats, StatsDoNotFit
from mxmoe.ir import ModuleOp, Scheme, linears, moe_ops
from mxmoe.passes import AnnotateSensitivity, Environment, run_passes

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
    unsquared = sensitivities(small(), AnnotateSensitivity(norm="unsquared"), stats)
    assert len(squared) == len(unsquared) == 6
    for one, other in zip(squared, unsquared, strict=True):
        np.testing.assert_allclose(one, other**2)


@pytest.mark.parametrize(("norm", "unit"), [("squared", 70.0), ("unsquared", 70.0**0.5)])
def test_relative_divides_by_the_output_of_all_banks(norm: str, unit: float) -> None:
    stats = small_stats(small())  # squared outputs 10 + 20 + 30 routed, and 10 shared
    total = sensitivities(small(), AnnotateSensitivity(norm=norm, scale="total"), stats)
    relative = sensitivities(small(), AnnotateSensitivity(norm=norm, scale="relative"), stats)
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


@pytest.mark.parametrize(("step", "option"), [
    (AnnotateSensitivity(norm="cubed"), "norm=cubed"),
    (AnnotateSensitivity(scale="per-token"), "scale=per-token"),
])  # fmt: skip
def test_an_unknown_norm_or_scale_is_refused_before_anything_is_written(step: AnnotateSensitivity, option: str) -> None:
    module = small()
    with pytest.raises(BadOption, match=option):
        run_passes(module, [step], Environment(small_stats(module)))
    assert moe_ops(module)[0].stage == "lifted"
