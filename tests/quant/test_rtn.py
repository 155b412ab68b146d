"""Round to nearest: the error bound, stacks, idempotence, the edges of float32, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadWeight, NonFiniteWeights, WeightsBeyondFormat
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, dequantize, quantize, split_scales
from mxmoe.quant.scales import SMALLEST, split_groups

GROUPS = ("", "_g32", "_g64", "_g128", "_g3")
INT_SCHEMES = [
    Scheme.parse(f"w{bits}a16{group}_{symmetry}")
    for bits in range(1, 9)
    for group in GROUPS
    for symmetry in ("sym", "asym")
]
ISCALE_SCHEMES = [
    Scheme.parse(f"w{bits}a8{group}_sym_iscale") for bits in (2, 3, 4) for group in ("_g3", "_g32", "_g128")
]
E4M3_SCHEMES = [Scheme.parse(text) for text in ("w8a8_e4m3", "w8a8_g32_e4m3", "w8a8_g3_e4m3")]
FLOAT_SCHEMES = [Scheme.parse(text) for text in ("bf16", "fp16")]
ALL_SCHEMES = INT_SCHEMES + ISCALE_SCHEMES + E4M3_SCHEMES + FLOAT_SCHEMES

# roundings of float32 in w / s + z and in s * (code - z), in steps: 3 of at most 2^-17
SLACK = 2.0**-14
# how far a scale may lie above its exact value because it is rounded up to where it is stored
ROUNDED_UP = {torch.float32: 1 + 2.0**-22, torch.bfloat16: 1 + 2.0**-7}


@st.composite
def weights(draw: st.DrawFn, largest: float = 2.0**126) -> torch.Tensor:
    """A matrix whose rows have their own magnitude each: ordinary, zero, constant, tiny, huge or anything."""
    k = draw(st.integers(1, 9) | st.sampled_from([31, 32, 33, 64, 130]))
    anything = st.floats(-largest, largest, width=32)
    kind = st.sampled_from(["normal", "zeros", "constant", "one-sided", "anything"])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows: list[torch.Tensor] = []
    for what in draw(st.lists(kind, min_size=1, max_size=4)):
        row = torch.randn(k, generator=generator)
        if what == "zeros":
            row = torch.zeros(k)
        elif what == "constant":
            row = torch.full((k,), draw(anything))
        elif what == "one-sided":
            row = row.abs() * draw(st.sampled_from([1.0, -1.0, 1e-38, 1e-44, -1e30]))
        elif what == "anything":
            row = torch.tensor(draw(st.lists(anything, min_size=k, max_size=k)))
        rows.append(row)
    return torch.stack(rows).clamp(-largest, largest)


def same(a: Quantized, b: Quantized) -> bool:
    pairs = ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero))
    return all(x is y or (x is not None and y is not None and torch.equal(x.float(), y.float())) for x, y in pairs)


def step_of(q: Quantized) -> torch.Tensor:
    """The scale of every weight, float64 [..., n, k]."""
    assert q.scale is not None
    size = q.scheme.group_size or q.k
    return q.scale.double().repeat_interleave(size, dim=-1)[..., : q.k]


STEPPED = [s for s in INT_SCHEMES + ISCALE_SCHEMES if s.weight_bits > 1 or not s.symmetric]


@given(weights(), st.sampled_from(STEPPED))
@settings(max_examples=200, deadline=None)
def test_no_weight_is_off_by_more_than_half_a_step(weight: torch.Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    error = (weight.double() - dequantize(q).double()).abs()
    assert (error <= step_of(q) * (0.5 + SLACK)).all()


@given(weights(), st.sampled_from([s for s in INT_SCHEMES if s.weight_bits > 1 or not s.symmetric] + E4M3_SCHEMES))
@settings(max_examples=200, deadline=None)
def test_scales_are_as_small_as_their_type_allows(weight: torch.Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    assert q.scale is not None
    groups = split_groups(weight, scheme.group_size).double()
    if not scheme.symmetric:
        exact = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2**scheme.weight_bits - 1)
    else:
        steps = 448 if scheme.weight_format == "e4m3" else 2 ** (scheme.weight_bits - 1) - 1
        exact = groups.abs().amax(-1) / steps
    found = q.scale.double()
    assert (found[exact == 0] == 1).all()
    assert (found >= exact.clamp(min=SMALLEST))[exact > 0].all(), "a scale below the exact one clips"
    assert (found <= exact.clamp(min=SMALLEST) * ROUNDED_UP[q.scale.dtype])[exact > 0].all()


@given(weights(), st.sampled_from(ISCALE_SCHEMES))
@settings(max_examples=200, deadline=None)
def test_integer_scales_are_rounded_up_by_a_sixteenth_of_their_largest(weight: torch.Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    assert q.scale is not None
    largest_code = 2 ** (scheme.weight_bits - 1) - 1
    exact = split_groups(weight, scheme.group_size).abs().amax(-1).double() / largest_code
    found, sixteenth = q.scale.double(), split_scales(q.scale)[0].double()
    is_zero = (weight == 0).all(-1)
    assert (found[is_zero] == 1).all()
    assert (found >= exact).all(), "a scale below the exact one clips"
    # a channel without weights above 2^-122 has scales above its exact ones, since they are never below 2^-126
    usual = exact.amax(-1) >= 2.0**-122
    assert (found <= exact + sixteenth * (1 + 2.0**-40))[usual].all()
    largest = exact.amax(-1)[usual]
    assert (16 * sixteenth[usual, 0] <= largest * (1 + 2.0**-19)).all()


@given(weights(), st.sampled_from(E4M3_SCHEMES))
@settings(max_examples=100, deadline=None)
def test_e4m3_is_off_by_a_sixteenth_or_half_its_smallest_step(weight: torch.Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    error = (weight.double() - dequantize(q).double()).abs()
    bound = torch.maximum(weight.double().abs() / 16, step_of(q) * 2.0**-10)
    assert (error <= bound * (1 + SLACK)).all()


@given(weights(), st.sampled_from([s for s in INT_SCHEMES if s.weight_bits == 1 and s.symmetric]))
@settings(max_examples=100, deadline=None)
def test_one_bit_keeps_signs_and_the_mean_magnitude(weight: torch.Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    assert q.scale is not None
    size = scheme.group_size or q.k
    for row, scales, back in zip(weight.tolist(), q.scale.tolist(), dequantize(q).tolist(), strict=True):
        for group, scale in enumerate(scales):
            part = row[group * size : (group + 1) * size]
            mean = sum(abs(w) for w in part) / len(part)
            low, high = (mean, mean * ROUNDED_UP[q.scale.dtype]) if mean >= SMALLEST else (min(mean, scale), SMALLEST)
            assert low * (1 - 1e-12) <= scale <= high
            assert back[group * size : (group + 1) * size] == [scale if w >= 0 else -scale for w in part]


@given(weights(largest=torch.finfo(torch.float32).max), st.sampled_from(ALL_SCHEMES[:-1]))
@settings(max_examples=200, deadline=None)
def test_finite_weights_stay_finite(weight: torch.Tensor, scheme: Scheme) -> None:
    q = quantize(weight, scheme)
    assert dequantize(q).isfinite().all()
    for stored in (q.codes, q.scale, q.zero):
        assert stored is None or stored.float().isfinite().all()


@given(weights(largest=60000.0), st.sampled_from(ALL_SCHEMES), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_stack_gives_what_its_matrices_give(weight: torch.Tensor, scheme: Scheme, experts: int) -> None:
    factors = torch.tensor([1.0, 0.25, -3.0])[:experts] / 4
    stack = weight * factors[:, None, None]
    q = quantize(stack, scheme)
    assert dequantize(q).shape == stack.shape
    for expert in range(experts):
        assert same(q[expert], quantize(stack[expert], scheme))
        assert torch.equal(dequantize(q)[expert], dequantize(q[expert]))


@given(
    weights(), st.sampled_from([s for s in INT_SCHEMES if s.symmetric and (s.group_size is None or s.weight_bits < 7)])
)
@settings(max_examples=150, deadline=None)
def test_symmetric_codes_are_kept_when_quantized_again(weight: torch.Tensor, scheme: Scheme) -> None:
    # 7 and 8 bits in groups are left out: a scale rounded up by 2^-7 can leave the largest code unused
    q = quantize(weight, scheme)
    again = quantize(dequantize(q), scheme)
    assert torch.equal(again.codes, q.codes)
    if scheme.group_size is None:
        torch.testing.assert_close(dequantize(again), dequantize(q), rtol=2.0**-22, atol=0)
    else:
        assert torch.equal(dequantize(again), dequantize(q))


@given(weights(), st.sampled_from([s for s in INT_SCHEMES if not s.symmetric and s.group_size]))
@settings(max_examples=150, deadline=None)
def test_asymmetric_groups_that_use_both_ends_are_kept_when_quantized_again(
    weight: torch.Tensor, scheme: Scheme
) -> None:
    q = quantize(weight, scheme)
    again = quantize(dequantize(q), scheme)
    codes = split_groups(q.codes, scheme.group_size)[..., : weight.shape[-1]]
    ends = (codes.amin(-1) == 0) & (codes.amax(-1) == 2**scheme.weight_bits - 1)
    assert q.scale is not None
    assert again.scale is not None
    assert torch.equal(again.scale[ends], q.scale[ends])


@given(weights(largest=60000.0), st.sampled_from(FLOAT_SCHEMES))
@settings(max_examples=50, deadline=None)
def test_float_schemes_are_a_cast(weight: torch.Tensor, scheme: Scheme) -> None:
    dtype = torch.float16 if str(scheme) == "fp16" else torch.bfloat16
    assert torch.equal(dequantize(quantize(weight, scheme)), weight.to(dtype).float())


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_is_read_as_float32(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(quantize(weight, scheme), quantize(weight.float(), scheme))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_rows_of_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = torch.zeros(2, 33)
    weight[1, 5] = 1.0
    assert (dequantize(quantize(weight, scheme))[0] == 0).all()


@given(st.floats(SMALLEST * 255, 2.0**126, width=32), st.booleans(), st.sampled_from(INT_SCHEMES + E4M3_SCHEMES))
@settings(max_examples=100, deadline=None)
def test_constant_groups_are_kept_up_to_the_rounding_of_the_scale(value: float, negative: bool, scheme: Scheme) -> None:
    weight = torch.full((2, 40), -value if negative else value)
    torch.testing.assert_close(dequantize(quantize(weight, scheme)), weight, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (0, 4), (0, 3, 4)])
def test_small_and_empty_shapes(scheme: Scheme, shape: tuple[int, ...]) -> None:
    assert dequantize(quantize(torch.ones(shape), scheme)).shape == shape


def test_the_numbers_of_the_docstring() -> None:
    q = quantize(torch.tensor([[0.0, 1.5, -3.0]]), Scheme.parse("w3a16_sym"))
    assert (q.codes.tolist(), q.scale.tolist() if q.scale is not None else None) == ([[4, 6, 1]], [[1.0]])


def test_asymmetric_by_hand() -> None:
    q = quantize(torch.tensor([[-1.0, 0.0, 2.0, 0.9]]), Scheme.parse("w2a16_asym"))
    assert q.scale is not None
    assert q.zero is not None
    assert (q.codes.tolist(), q.scale.item(), q.zero.item()) == ([[0, 1, 3, 2]], 1.0, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_non_finite_weights_are_named(scheme: Scheme, value: float) -> None:
    weight = torch.ones(2, 3, 4)
    weight[1, 0, 2] = value
    with pytest.raises(NonFiniteWeights, match=r"block\.0\.routed\.up holds 1 values .* first at \[1, 0, 2\]"):
        quantize(weight, scheme, name="block.0.routed.up")


def test_doubles_beyond_float32_are_not_finite() -> None:
    with pytest.raises(NonFiniteWeights):
        quantize(torch.full((1, 2), 1e39, dtype=torch.float64), Scheme.parse("w4a16_sym"))


def test_fp16_refuses_what_it_cannot_hold() -> None:
    fp16 = Scheme.parse("fp16")
    assert dequantize(quantize(torch.tensor([[65519.0]]), fp16)).item() == 65504
    with pytest.raises(WeightsBeyondFormat, match="gate reaches 65520, beyond the 65504 that fp16 holds"):
        quantize(torch.tensor([[-65520.0, 1.0]]), fp16, name="gate")
    assert dequantize(quantize(torch.tensor([[-65520.0]]), Scheme.parse("w4a16_sym_fp16"))).isfinite().all()


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3), torch.ones(3, 0), torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3).to(torch.complex64)],
)
def test_what_is_no_weight_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(BadWeight, match="down is torch"):
        quantize(weight, Scheme.parse("w4a16_sym"), name="down")
