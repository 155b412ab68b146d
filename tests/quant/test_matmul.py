"""The definition of the linear: bit for bit against plain integers, within its tolerance against float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadActivation, NotOneMatrix
from mxmoe.ir import Scheme
from mxmoe.quant import (
    Quantized,
    dequantize,
    fake_quantize_activation,
    matmul,
    quantize,
    quantize_activation,
    split_scales,
    tolerance,
)

INT = [
    Scheme.parse(text)
    for text in (
        *("w8a8_sym", "w8a8_asym", "w8a8_g8_sym", "w8a8_g8_asym", "w4a8_sym", "w4a8_g8_sym", "w4a8_g8_asym"),
        *("w4a4_sym", "w4a4_asym", "w4a4_g8_sym", "w4a4_g8_asym", "w1a8_sym", "w1a8_g8_sym", "w1a4_g8_asym"),
        *("w2a8_g8_asym", "w3a6_g8_sym", "w4a8_g8_sym_iscale", "w3a6_g8_sym_iscale", "w2a5_g8_sym_iscale"),
    )
]
E4M3 = [Scheme.parse(text) for text in ("w8a8_e4m3", "w8a8_g8_e4m3", "w4a8_sym_e4m3", "w4a8_g8_asym_e4m3")]
SIXTEEN = [
    Scheme.parse(text)
    for text in ("bf16", "fp16", "w4a16_g32_asym", "w4a16_sym_fp16", "w1a16_g32_sym", "w2a16_g128_asym", "w8a16_sym")
]
WIDE = [Scheme.parse(str(s).replace("_g8", "_g32" if s.integer_scales else "_g128")) for s in INT + E4M3] + SIXTEEN


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value_of(code: float, zero: float, q: Quantized) -> float:
    """What a code stands for before scaling."""
    if q.scheme.weight_format == "e4m3":
        return code
    return 2 * code - 1 if q.scheme.weight_bits == 1 and q.scheme.symmetric else code - zero


def plain(x: torch.Tensor, q: Quantized) -> list[list[float]]:
    """The formula of `matmul` in plain Python: exact inner sums, then one float32 operation after the other."""
    assert q.scale is not None
    codes, act_scale = quantize_activation(x, q.scheme)
    size, bits = q.scheme.group_size or q.k, q.scheme.weight_bits
    if q.scheme.integer_scales:
        return plain_multiples(codes, act_scale, q)
    result: list[list[float]] = []
    for a, s_a in zip(codes.tolist(), act_scale.tolist(), strict=True):
        row: list[float] = []
        for n, c in enumerate(q.codes.tolist()):
            total = np.float32(0)
            for g, s_w in enumerate(q.scale[n].tolist()):
                zero = q.zero[n, g].item() if q.zero is not None else 2 ** (bits - 1)
                part = range(g * size, min((g + 1) * size, q.k))
                # products of codes are short numbers, and fsum rounds the exact sum of them once
                exact = math.fsum(a[i] * value_of(c[i], zero, q) for i in part)
                scales = np.float32(s_a[g if len(s_a) > 1 else 0]) * np.float32(s_w)
                total = total + np.float32(exact) * scales
            row.append(float(total))
        result.append(row)
    return result


def plain_multiples(codes: torch.Tensor, act_scale: torch.Tensor, q: Quantized) -> list[list[float]]:
    """The formula of integer scales: one exact sum over a whole row, in an int32; one conversion, two products."""
    assert q.scale is not None
    channel, multipliers = split_scales(q.scale)
    group, middle = q.scheme.group_size or q.k, 2 ** (q.scheme.weight_bits - 1)
    result: list[list[float]] = []
    for a, s_a in zip(codes.tolist(), act_scale[:, 0].tolist(), strict=True):
        row: list[float] = []
        for c, m, s_w in zip(q.codes.tolist(), multipliers.tolist(), channel[:, 0].tolist(), strict=True):
            weights = [m[i // group] * (c[i] - middle) for i in range(q.k)]
            assert all(-128 <= weight <= 127 for weight in weights), "they are multiplied as int8"
            exact = sum(x * weight for x, weight in zip(a, weights, strict=True))
            assert abs(exact) < 2**31
            row.append(float(np.float32(exact) * (np.float32(s_a) * np.float32(s_w))))
        result.append(row)
    return result


@given(st.sampled_from(INT + E4M3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 21), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_exactly_the_plain_formula(scheme: Scheme, m: int, n: int, k: int, seed: int) -> None:
    x, q = seeded(m, k, seed=seed), quantize(seeded(n, k, seed=seed + 1), scheme)
    assert matmul(x, q).tolist() == plain(x, q)


@pytest.mark.parametrize("scheme", INT + E4M3, ids=str)
@pytest.mark.parametrize("k", [519, 1001])
def test_exact_where_float32_would_not_be(scheme: Scheme, k: int) -> None:
    # codes near the largest ones, so that sums pass 2^24, and rows of widely spread magnitudes
    x = torch.cat([1 - seeded(2, k).abs() / 30, seeded(2, k, seed=1) ** 5])
    weight = torch.cat([1 - seeded(4, k, seed=2).abs() / 30, seeded(2, k, seed=3) ** 5])
    q = quantize(weight, scheme)
    assert matmul(x, q).tolist() == plain(x, q)


@pytest.mark.parametrize("scheme", WIDE, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 7, 512), (3, 4, 300), (1, 1, 1), (2, 1, 129), (0, 3, 5), (3, 0, 5)])
def test_equals_float64_of_the_decoded_operands(scheme: Scheme, m: int, n: int, k: int) -> None:
    x, q = seeded(m, k), quantize(seeded(n, k, seed=1), scheme)
    y = matmul(x, q)
    reference = fake_quantize_activation(x, scheme).double() @ dequantize(q).double().T
    assert (y.dtype, y.shape) == (torch.float32, (m, n))
    # both sides are the definition, so the tightest tolerance of all holds for every scheme
    assert (y - reference).norm() <= tolerance(Scheme.parse("w8a8_sym")) * reference.norm()


@pytest.mark.parametrize("scheme", WIDE, ids=str)
def test_tolerance_covers_operands_rounded_to_sixteen_bits(scheme: Scheme) -> None:
    """What a tensor core does to a weight-only scheme: the decoded weight rounded to the activation's type."""
    x, q = seeded(16, 512), quantize(seeded(24, 512, seed=1), scheme)
    y, weight = matmul(x, q), dequantize(q)
    if scheme.act_bits == 16:
        weight = weight.to(torch.float16 if scheme.act_format == "fp16" else torch.bfloat16).float()
    other = fake_quantize_activation(x, scheme) @ weight.T
    assert (y - other).norm() <= tolerance(scheme) * y.norm()


@pytest.mark.parametrize("scheme", WIDE, ids=str)
def test_rows_do_not_depend_on_each_other_and_leading_axes_are_kept(scheme: Scheme) -> None:
    x, q = seeded(2, 3, 300), quantize(seeded(4, 300, seed=1), scheme)
    y = matmul(x, q)
    assert y.shape == (2, 3, 4)
    torch.testing.assert_close(matmul(x[1, 2], q), y[1, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", WIDE, ids=str)
@pytest.mark.parametrize(("of_x", "of_w"), [(1e30, 1e-38), (1e-38, 1e30), (1e-38, 1e-38), (1e17, 1e17), (0.0, 1e38)])
def test_finite_wherever_the_product_is(scheme: Scheme, of_x: float, of_w: float) -> None:
    if str(scheme) == "fp16":
        of_w = min(of_w, 1e4)
    x, weight = seeded(3, 200).clamp(-2, 2) * of_x, seeded(4, 200, seed=1).clamp(-2, 2) * of_w
    x[1], weight[2] = 0.0, 0.0
    y = matmul(x, quantize(weight, scheme))
    assert y.isfinite().all()
    assert (y[1] == 0).all()
    assert (y[:, 2] == 0).all()


def test_a_fractional_zero_point_of_a_weight_only_scheme() -> None:
    scheme = Scheme.parse("w4a16_asym")
    codes = torch.tensor([[0, 15, 7]], dtype=torch.uint8)
    q = Quantized(scheme, codes, torch.tensor([[2.0]]), torch.tensor([[7.5]]))
    assert dequantize(q).tolist() == [[-15.0, 15.0, -1.0]]
    assert matmul(torch.tensor([[1.0, 1.0, 4.0]]), q).tolist() == [[-4.0]]


def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    for scheme in WIDE:
        x, q = seeded(3, 200), quantize(seeded(4, 200, seed=1), scheme)
        clean = matmul(x, q)
        x[1, 0] = torch.nan
        y = matmul(x, q)
        assert y[1].isnan().all()
        torch.testing.assert_close(y[[0, 2]], clean[[0, 2]], rtol=1e-6, atol=1e-6)


def test_mistakes_are_named() -> None:
    q = quantize(torch.ones(2, 3, 4), Scheme.parse("w8a8_sym"))
    with pytest.raises(NotOneMatrix, match=r"this is \[2, 3, 4\]"):
        matmul(torch.ones(1, 4), q)
    with pytest.raises(BadActivation, match=r"float32 \[1, 5\]; give a tensor \[..., 4\]"):
        matmul(torch.ones(1, 5), q[0])
    with pytest.raises(BadActivation, match=r"torch.int64 \[4\]"):
        matmul(torch.ones(4, dtype=torch.int64), q[0])
