"""The account that a compilation gives of itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from mxmoe.ir import BankShape, BlockShape, Scheme, linears, moe_ops
from mxmoe.report.compiled import CompileReport, PlanSummary
from mxmoe.testing import at_stage, blocks, schemes

SHAPE = BlockShape(
    "moe",
    32,
    (
        BankShape("routed", 4, 2, 64, "silu", True, {role: f"moe.routed.{role}" for role in ("gate", "up", "down")}),
        BankShape("shared", 1, 1, 32, "silu", True, {role: f"moe.shared.{role}" for role in ("gate", "up", "down")}),
    ),
)


def report(**changes: object) -> CompileReport:
    values: dict[str, object] = {
        "target": "numba",
        "device": "rtx4090",
        "quantizer": "rtn",
        "bytes_found": 54_000,
        "bytes_quantized": 27_000,
        "found": "  moe routed",
        "plan": PlanSummary(27_000, 4.0, 4.5, 15_187.5, {"w4a16_g64_asym": 12, "bf16": 3}, {"moe": 4.5}),
        "held_bytes": 15_188,
        "tokens": 512,
        "predicted_us": {"a": 3.0, "b": 5.0},
        "calibration": "80 tokens",
        "seconds": {"annotate-cost": 0.5},
    }
    return CompileReport(**{**values, **changes})  # type: ignore[arg-type]


def test_the_sums_of_a_uniform_plan_are_those_of_its_scheme() -> None:
    scheme = Scheme.parse("w4a16_g32_asym")
    summary = PlanSummary.of(at_stage([SHAPE], "allocated", [scheme]))
    assert summary.n_weights == 4 * 3 * 32 * 64 + 3 * 32 * 32
    assert summary.payload_bits == 4
    assert summary.effective_bits == 5
    assert summary.n_bytes == summary.n_weights * 5 / 8
    assert summary.rows == {"w4a16_g32_asym": 15}
    assert summary.block_bits == {"moe": 5.0}


@given(shape=blocks(), first=schemes(), second=schemes())
@settings(max_examples=30, deadline=None)
def test_averages_are_over_weights(shape: BlockShape, first: Scheme, second: Scheme) -> None:
    candidates = tuple(dict.fromkeys((first, second)))
    module = at_stage([shape], "allocated", candidates)
    summary = PlanSummary.of(module)
    (moe,) = moe_ops(module)
    bits = weights = 0.0
    for op in linears(module):
        assert op.choice is not None
        for index in op.choice.array:
            weights += op.n * op.k
            bits += candidates[index].effective_bits(op.k) * op.n * op.k
    assert summary.n_weights == weights
    assert summary.effective_bits == pytest.approx(bits / weights)
    assert summary.block_bits == {moe.block: pytest.approx(summary.effective_bits)}
    assert sum(summary.rows.values()) == sum(op.experts for op in linears(module))
    assert list(summary.rows.values()) == sorted(summary.rows.values(), reverse=True)
    assert summary.payload_bits <= summary.effective_bits


def test_it_is_written_to_be_read() -> None:
    text = str(report())
    assert "quantized 27,000 of 54,000 bytes of expert weights (50.0%) with rtn; 15,188 bytes are held" in text
    assert "4.000 payload, 4.500 effective" in text
    assert "w4a16_g64_asym x 12, bf16 x 3" in text
    assert "predicted 4.0 us per block of 512 tokens on rtx4090" in text
    assert "calibration: 80 tokens" in text


def test_nothing_found_divides_by_nothing() -> None:
    assert "(0.0%)" in str(report(bytes_found=0, bytes_quantized=0, predicted_us={}))


def test_plain_values_are_an_inverse() -> None:
    one = report()
    assert CompileReport.from_dict(json.loads(json.dumps(one.to_dict()))) == one
