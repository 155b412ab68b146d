"""Every row of the table of number formats: nearest codes under given scales, and values that encode to themselves."""

from typing import get_args

import pytest
import torch

from mxmoe.ir import Scheme
from mxmoe.ir.scheme import WeightFormat
from mxmoe.quant import FORMATS
from mxmoe.quant.quantized import CODE_DTYPES

SCHEMES = [
    Scheme.parse(text)
    for text in (
        *(f"w{b}a16{g}_{s}" for b in range(1, 9) for g in ("", "_g4") for s in ("sym", "asym")),
        *("w8a8_e4m3", "w8a8_g4_e4m3", "bf16", "fp16"),
    )
]


def test_the_table_has_every_format_of_a_scheme() -> None:
    assert set(FORMATS) == set(get_args(WeightFormat)) == set(CODE_DTYPES)
    assert {s.weight_format for s in SCHEMES} == set(FORMATS)


def decoded(codes: torch.Tensor, scheme: Scheme, scale: torch.Tensor | None, zero: torch.Tensor | None) -> torch.Tensor:
    values = FORMATS[scheme.weight_format].values(codes, scheme, zero)
    if scale is None:
        return values
    size = scheme.group_size or codes.shape[-1]
    return values * scale.float().repeat_interleave(size, -1)[..., : codes.shape[-1]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_decoded_values_encode_to_themselves(scheme: Scheme) -> None:
    fmt = FORMATS[scheme.weight_format]
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    scale, zero = fmt.fit(weight, scheme)
    codes = fmt.encode(weight, scheme, scale, zero)
    again = fmt.encode(decoded(codes, scheme, scale, zero), scheme, scale, zero)
    assert codes.dtype == CODE_DTYPES[scheme.weight_format]
    assert torch.equal(codes.float(), again.float())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.weight_format == "int" and s.weight_bits < 5], ids=str)
def test_no_other_code_is_nearer(scheme: Scheme) -> None:
    # also for weights outside the range that the scale was fitted to, as error-compensating quantizers produce them
    fmt = FORMATS[scheme.weight_format]
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
    scale, zero = fmt.fit(weight * 0.5, scheme)
    if zero is not None:
        zero = zero + 0.25
    error = (decoded(fmt.encode(weight, scheme, scale, zero), scheme, scale, zero) - weight).abs()
    lowest = 1 if scheme.symmetric and scheme.weight_bits > 1 else 0
    for code in range(lowest, 2**scheme.weight_bits):
        other = decoded(torch.full(weight.shape, code, dtype=torch.uint8), scheme, scale, zero)
        assert (error <= (other - weight).abs() + 1e-6).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_codes_stay_symmetric_far_outside_the_range(bits: int) -> None:
    scheme = Scheme.parse(f"w{bits}a16_sym")
    codes = FORMATS["int"].encode(torch.tensor([[-1e9, 1e9]]), scheme, torch.ones(1, 1), None)
    assert codes.tolist() == [[1, 2**bits - 1]]


def test_e4m3_takes_the_codes_of_the_standard() -> None:
    fmt, scheme = FORMATS["e4m3"], Scheme.parse("w8a8_e4m3")
    weight = torch.tensor([[448.0, 1e9, -465.0, 17.0, 2.0**-9, 2.0**-11, 0.0]])
    codes = fmt.encode(weight, scheme, torch.ones(1, 1), None)
    assert fmt.values(codes, scheme, None).tolist() == [[448.0, 448.0, -448.0, 16.0, 2.0**-9, 0.0, 0.0]]
    assert codes.view(torch.uint8)[0, :2].tolist() == [0x7E, 0x7E]
