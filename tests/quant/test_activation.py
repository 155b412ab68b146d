"""Activations: codes and scales per token, within half a step, equal to plain arithmetic, never NaN from finite."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadActivation
from mxmoe.ir import Scheme
from mxmoe.quant import fake_quantize_activation, largest_act_code, quantize_activation

INT = [
    Scheme.parse(text) for text in ("w8a8_sym", "w4a8_g128_sym", "w4a4_sym", "w4a4_g32_sym", "w4a4_g3_asym", "w3a6_sym")
]
E4M3 = [Scheme.parse(text) for text in ("w8a8_e4m3", "w4a8_g128_sym_e4m3")]
SIXTEEN = [Scheme.parse(text) for text in ("bf16", "fp16", "w4a16_g128_asym", "w4a16_g128_asym_fp16")]
LARGEST = torch.finfo(torch.float32).max
TINY = 2.0**-126


@st.composite
def activations(draw: st.DrawFn) -> torch.Tensor:
    """[m, k] with m from 0; rows of ordinary numbers, zeros, or anything that float32 holds."""
    k = draw(st.integers(1, 7) | st.sampled_from([32, 33, 100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
    rows: list[torch.Tensor] = [torch.zeros(0, k)]
    for what in draw(st.lists(st.sampled_from(["normal", "zeros", "tiny", "anything"]), max_size=4)):
        row = torch.randn(k, generator=generator)
        if what == "zeros":
            row = torch.zeros(k)
        elif what == "tiny":
            row = row * 1e-40
        elif what == "anything":
            row = torch.tensor(draw(st.lists(anything, min_size=k, max_size=k)))
        rows.append(row[None])
    return torch.cat(rows)


def spread(scale: torch.Tensor, size: int | None, k: int) -> torch.Tensor:
    """Scales [m, groups] for every channel, float64 [m, k]."""
    return scale.double().repeat_interleave(size or k, dim=-1)[:, :k]


@given(activations(), st.sampled_from(INT))
@settings(max_examples=200, deadline=None)
def test_integers_are_off_by_half_a_step(x: torch.Tensor, scheme: Scheme) -> None:
    codes, scale = quantize_activation(x, scheme)
    k = x.shape[-1]
    groups = 1 if scheme.act_group_size is None else -(-k // scheme.act_group_size)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(x), groups))
    assert (codes.abs() <= largest_act_code(scheme)).all()
    error = (x.double() - fake_quantize_activation(x, scheme).double()).abs()
    assert (error <= spread(scale, scheme.act_group_size, k) * (0.5 + 2.0**-14)).all()


@given(activations(), st.sampled_from(E4M3))
@settings(max_examples=100, deadline=None)
def test_e4m3_is_off_by_a_sixteenth_or_half_its_smallest_step(x: torch.Tensor, scheme: Scheme) -> None:
    codes, scale = quantize_activation(x, scheme)
    assert (codes.dtype, scale.shape) == (torch.float8_e4m3fn, (len(x), 1))
    error = (x.double() - fake_quantize_activation(x, scheme).double()).abs()
    bound = torch.maximum(x.double().abs() / 16, spread(scale, None, x.shape[-1]) * 2.0**-10)
    assert (error <= bound * (1 + 2.0**-14)).all()


@given(activations(), st.sampled_from(SIXTEEN))
@settings(max_examples=100, deadline=None)
def test_sixteen_bits_are_a_cast_that_saturates(x: torch.Tensor, scheme: Scheme) -> None:
    codes, scale = quantize_activation(x, scheme)
    top = torch.finfo(codes.dtype).max
    assert codes.dtype == (torch.float16 if scheme.act_format == "fp16" else torch.bfloat16)
    assert torch.equal(scale, torch.ones(len(x), 1))
    assert torch.equal(codes, x.clamp(-top, top).to(codes.dtype))


@given(activations(), st.sampled_from(INT + E4M3 + SIXTEEN))
@settings(max_examples=200, deadline=None)
def test_finite_stays_finite(x: torch.Tensor, scheme: Scheme) -> None:
    codes, scale = quantize_activation(x, scheme)
    assert codes.float().isfinite().all()
    assert scale.isfinite().all()
    assert (scale >= TINY).all()
    assert fake_quantize_activation(x, scheme).isfinite().all()


@given(activations(), st.sampled_from(INT))
@settings(max_examples=100, deadline=None)
def test_codes_are_those_of_plain_float32_arithmetic(x: torch.Tensor, scheme: Scheme) -> None:
    codes, scale = quantize_activation(x, scheme)
    size, steps = scheme.act_group_size or x.shape[-1], largest_act_code(scheme)
    for row, found, scales in zip(x.numpy(), codes.tolist(), scale.numpy(), strict=True):
        expected: list[int] = []
        for group, s in enumerate(scales):
            part = row[group * size : (group + 1) * size]
            largest = np.abs(part).max()
            plain = np.float32(largest) / np.float32(steps) if largest > 0 else np.float32(1)
            assert s == plain or plain < TINY or largest > LARGEST * 0.999
            expected += [int(np.clip(np.rint(value / s), -steps, steps)) for value in part]
        assert found == expected


def test_the_numbers_of_the_docstring() -> None:
    codes, scale = quantize_activation(torch.tensor([2.0, -1.0]), Scheme.parse("w8a8_sym"))
    assert codes.tolist() == [127, -64]
    assert scale.tolist() == pytest.approx([2 / 127])


@pytest.mark.parametrize("scheme", INT + E4M3, ids=str)
def test_rows_of_zeros_have_scale_one(scheme: Scheme) -> None:
    codes, scale = quantize_activation(torch.zeros(2, 40), scheme)
    assert (codes.float() == 0).all()
    assert (scale == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", INT + E4M3 + SIXTEEN, ids=str)
def test_a_token_that_is_not_finite_shows_it_and_spoils_no_other(scheme: Scheme, bad: float) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    clean = fake_quantize_activation(x, scheme)
    x[1, 5] = bad
    found = fake_quantize_activation(x, scheme)
    assert not found[1, 5].isfinite()
    codes, scale = quantize_activation(x, scheme)
    if scheme.act_bits < 16:
        size = scheme.act_group_size or 40
        group = 5 // size
        assert scale[1, group].isnan()
        assert (codes[1, group * size : (group + 1) * size].float() == 0).all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("scheme", INT + E4M3 + SIXTEEN, ids=str)
def test_every_float_dtype_and_leading_shape(scheme: Scheme) -> None:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = quantize_activation(x, scheme)
    flat_codes, flat_scale = quantize_activation(x.float().reshape(6, 40), scheme)
    assert torch.equal(codes.float().reshape(6, 40), flat_codes.float())
    assert torch.equal(scale.reshape(6, -1), flat_scale)
    assert fake_quantize_activation(x, scheme).dtype == torch.float32


@pytest.mark.parametrize("x", [torch.ones(2, 4, dtype=torch.int8), torch.tensor(1.0), torch.ones(3, 0)])
def test_what_is_no_activation_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(BadActivation, match="activations are torch"):
        quantize_activation(x, Scheme.parse("w8a8_sym"))
