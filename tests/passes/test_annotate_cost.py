"""Costs: from a model, for a device, over one or several token counts."""

from __future__ import annotations

import numpy as np
import pytest

from mxmoe.cost import Measured, Roofline, linear_cost_us
from mxmoe.device import device
from mxmoe.errors import BadOption, BadWorkload, UnknownName
from mxmoe.ir import ModuleOp, Scheme, linears, moe_ops
from mxmoe.passes import AnnotateCost, AnnotateRouting, Environment, find_cost_model, parse_passes, run_passes
from mxmoe.target import find_target

from .modules import before_and_after, small, small_bank, small_stats


def costs(step: AnnotateCost, module: ModuleOp | None = None, target: str = "numba") -> list[np.ndarray]:
    done = run_passes(small() if module is None else module, [step], Environment(target=find_target(target)))
    return [op.cost.array for op in linears(done) if op.cost is not None]


def test_roofline(golden: object) -> None:
    assert golden == before_and_after(AnnotateCost(model="roofline"), small(small_bank(gated=False)))


def test_auto_takes_the_profile_where_there_is_one() -> None:
    assert isinstance(find_cost_model("auto", "rtx4090"), Measured)
    assert isinstance(find_cost_model("auto", find_target("triton-sm90").device), Measured)
    assert isinstance(find_cost_model("auto", "a100"), Roofline)
    np.testing.assert_array_equal(costs(AnnotateCost())[0], costs(AnnotateCost(model="measured", device="rtx4090"))[0])


def test_the_device_is_the_target_s_unless_it_is_named() -> None:
    roofline = AnnotateCost(model="roofline")
    on_h200 = costs(roofline, target="triton-sm90")[0]
    np.testing.assert_array_equal(on_h200, costs(AnnotateCost(model="roofline", device="h200"))[0])
    assert not np.array_equal(on_h200, costs(roofline)[0])


def test_a_scheme_that_the_device_cannot_run_is_impossible() -> None:
    candidates = (Scheme.parse("w8a8_e4m3"), Scheme.parse("w8a8_sym"))
    cost = costs(AnnotateCost(device="a100"), small(candidates=candidates))[0]
    assert np.isinf(cost[:, 0]).all()
    assert np.isfinite(cost[:, 1]).all()


def test_rows_come_from_the_frequencies() -> None:
    module = small()
    run_passes(module, [AnnotateRouting(), AnnotateCost(model="roofline")], Environment(small_stats(module)))
    op, moe = linears(module)[0], moe_ops(module)[0]
    assert op.cost is not None
    assert op.route.frequency is not None
    model = Roofline(device("rtx4090"))
    expected = linear_cost_us(
        model, moe.candidates, n=op.n, k=op.k, frequency=op.route.frequency.array, tokens=512
    )
    np.testing.assert_array_equal(op.cost.array, expected)


def test_several_token_counts_are_weighed() -> None:
    one, many = (costs(AnnotateCost(tokens=(count,)))[0] for count in (1, 4096))
    both = costs(AnnotateCost(tokens=(1, 4096), token_weights=(0.75, 0.25)))[0]
    np.testing.assert_allclose(both, 0.75 * one + 0.25 * many)
    (spelled,) = parse_passes("annotate-cost{tokens=1,4096 token-weights=3,1}")
    assert isinstance(spelled, AnnotateCost)
    np.testing.assert_allclose(costs(spelled)[0], both)


def test_weights_and_counts_must_be_as_many() -> None:
    with pytest.raises(BadOption, match=r"token-weights: 2 token counts have 1 weights"):
        costs(AnnotateCost(tokens=(1, 2), token_weights=(1.0,)))
    with pytest.raises(BadWorkload, match="counts start at 1"):
        costs(AnnotateCost(tokens=(0,)))


def test_an_unknown_model_or_device_answers_with_near_names() -> None:
    with pytest.raises(UnknownName, match="did you mean roofline"):
        costs(AnnotateCost(model="rooflin"))
    with pytest.raises(UnknownName, match="did you mean rtx4090"):
        costs(AnnotateCost(device="rtx409"))
