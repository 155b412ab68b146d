"""Clipped ranges: never worse than rounding to nearest by the sum that is searched for, and valid everywhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxmoe.errors import BadOption
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, dequantize, find_quantizer, pack, quantize, unpack
from mxmoe.quant.clip import RtnMse, rtn_mse
from mxmoe.quant.scales import split_groups
from mxmoe.testing import SCHEMES, schemes

OPTIONS = (
    "rtn_mse",
    "rtn_mse{exponent=2.0}",
    "rtn_mse{exponent=1.0 grid=10 lowest=0.0}",
    "rtn_mse{grid=20 lowest=0.9}",
)


def weights(k: int, seed: int, kind: str) -> Tensor:
    """[2, 3, k]: normal, heavy-tailed, one-sided, constant or tiny."""
    x = torch.randn((2, 3, k), generator=torch.Generator().manual_seed(seed))
    return {"normal": x, "heavy": x**5, "one-sided": x.abs(), "constant": torch.ones_like(x), "tiny": x * 1e-40}[kind]


def errors(weight: Tensor, q: Quantized, exponent: float) -> Tensor:
    """The sum over each group, float64, in units of the group's largest weight."""
    change = split_groups(weight.double() - dequantize(q).double(), q.scheme.group_size)
    largest = split_groups(weight, q.scheme.group_size).abs().amax(-1, keepdim=True).double()
    return (change / largest.clamp(min=2.0**-126)).abs().pow(exponent).sum(-1)


def channel_errors(weight: Tensor, q: Quantized, exponent: float) -> Tensor:
    """The sum over each row, float64, in units of the row's largest weight."""
    largest = weight.abs().amax(-1, keepdim=True).double().clamp(min=2.0**-126)
    return ((weight.double() - dequantize(q).double()) / largest).abs().pow(exponent).sum(-1)


@given(
    st.sampled_from(SCHEMES) | schemes(),
    st.integers(1, 140),
    st.integers(0, 99),
    st.sampled_from(("normal", "heavy", "one-sided", "constant", "tiny")),
    st.sampled_from(OPTIONS),
)
@settings(max_examples=60, deadline=None)
def test_no_group_is_worse_than_by_rounding(scheme: Scheme, k: int, seed: int, kind: str, option: str) -> None:
    quantizer = find_quantizer(option)
    assert isinstance(quantizer, RtnMse)
    weight = weights(k, seed, kind)
    found, plain = quantizer(weight, scheme), quantize(weight, scheme)
    before, after = (errors(weight, q, quantizer.exponent) for q in (plain, found))
    if scheme.integer_scales:  # a channel's groups share what their scales are multiples of
        before, after = (channel_errors(weight, q, quantizer.exponent) for q in (plain, found))
    assert (after <= before * (1 + 1e-5) + 1e-9).all()
    if found.scale is not None and plain.scale is not None and not scheme.integer_scales:
        assert (found.scale <= plain.scale).all(), "ranges are only ever shrunk"
    assert dequantize(found).isfinite().all()
    back = unpack(pack(found[0]))
    assert torch.equal(back.codes.float(), found.codes[0].float())


@pytest.mark.parametrize("text", ["w2a16_sym", "w3a16_g64_sym", "w2a8_g64_sym_iscale", "w2a16_g32_asym", "w1a16_asym"])
def test_few_bits_gain_much(text: str) -> None:
    """Normal weights, summed squares: below 3/4 of the error of rounding over the whole range."""
    scheme, weight = Scheme.parse(text), weights(256, 0, "normal")
    found = RtnMse(exponent=2.0)(weight, scheme)
    changes = [(dequantize(q) - weight).square().sum() for q in (found, quantize(weight, scheme))]
    assert changes[0] < 0.75 * changes[1]


def test_an_outlier_is_clipped_for_the_good_of_its_group() -> None:
    weight = torch.linspace(-1, 1, 128)[None].clone()
    weight[0, 0] = -1.3
    scheme = Scheme.parse("w2a16_sym")
    found, plain = rtn_mse(weight, scheme), quantize(weight, scheme)
    assert found.scale is not None
    assert plain.scale is not None
    assert found.scale < plain.scale
    assert dequantize(found)[0, 0] > -1.3


def test_it_finds_the_best_of_its_grid() -> None:
    """Against trying every range by hand, without the code that searches."""
    weight, scheme = weights(64, 3, "heavy")[0], Scheme.parse("w3a16_sym")
    found = RtnMse(exponent=2.4, grid=25)(weight, scheme)
    tried: list[Tensor] = []
    for step in range(20):
        limit = weight.abs().amax(-1, keepdim=True) * (1 - step / 25)
        scale = limit / 3
        decoded = scale * (weight / scale).round().clamp(-3, 3)
        tried.append((decoded - weight).abs().pow(2.4).sum(-1))
    assert torch.allclose((dequantize(found) - weight).abs().pow(2.4).sum(-1), torch.stack(tried).amin(0), rtol=1e-4)


@given(st.sampled_from([s for s in SCHEMES if not s.is_float]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_stack_gives_what_its_matrices_give(scheme: Scheme, seed: int) -> None:
    weight = weights(70, seed, "heavy")
    stack = rtn_mse(weight, scheme)
    for index in range(2):
        one = rtn_mse(weight[index], scheme)
        assert torch.equal(one.codes.float(), stack.codes[index].float())
        assert one.scale is not None
        assert stack.scale is not None
        assert torch.equal(one.scale, stack.scale[index])


def test_large_weights_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = weights(64, 0, "heavy"), Scheme.parse("w3a16_g32_asym")
    whole = rtn_mse(weight, scheme)
    monkeypatch.setattr("mxmoe.quant.clip._AT_ONCE", 130)
    parts = rtn_mse(weight, scheme)
    assert torch.equal(whole.codes, parts.codes)
    assert whole.zero is not None
    assert parts.zero is not None
    assert torch.equal(whole.zero, parts.zero)


def test_an_empty_stack_is_empty() -> None:
    found = rtn_mse(torch.zeros(0, 3, 64), Scheme.parse("w4a16_g32_asym"))
    assert found.codes.shape == (0, 3, 64)


@pytest.mark.parametrize("option", ["exponent=0.0", "exponent=inf", "grid=0", "lowest=-0.1", "lowest=1.5"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(BadOption, match="rtn_mse cannot take"):
        find_quantizer(f"rtn_mse{{{option}}}")


def test_the_string_form() -> None:
    assert str(dataclasses.replace(rtn_mse, exponent=2.0)) == "rtn_mse{exponent=2.0}"
