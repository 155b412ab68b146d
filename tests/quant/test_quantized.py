"""A `Quantized` that exists is well-formed."""

import pytest
import torch

from mxmoe.errors import BadQuantized
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, quantize, scale_dtype

CODES = torch.zeros(2, 6, dtype=torch.uint8)
SINGLE = torch.ones(2, 1)
GROUPED = torch.ones(2, 2, dtype=torch.bfloat16)


def build(
    text: str, codes: torch.Tensor, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> Quantized:
    return Quantized(Scheme.parse(text), codes, scale, zero)


@pytest.mark.parametrize(
    ("text", "codes", "scale", "zero", "reason"),
    [
        ("w4a16_sym", CODES, None, None, "it has no scale"),
        ("w4a16_asym", CODES, SINGLE, None, "it has no zero"),
        ("w4a16_sym", CODES, SINGLE, SINGLE, "it takes no zero"),
        ("bf16", CODES.bfloat16(), SINGLE, None, "it takes no scale"),
        ("bf16", CODES, None, None, "codes are torch.uint8, not torch.bfloat16"),
        ("w8a8_e4m3", CODES, SINGLE, None, "codes are torch.uint8, not torch.float8_e4m3fn"),
        ("w4a16_sym", CODES.int(), SINGLE, None, "codes are torch.int32, not torch.uint8"),
        ("w4a16_sym", CODES[0], SINGLE, None, r"codes have shape \[6\]"),
        ("w4a16_g4_sym", CODES, SINGLE, None, r"its scale is torch.float32 \[2, 1\], not torch.bfloat16 \[2, 2\]"),
        ("w4a16_sym", CODES, GROUPED, None, r"not torch.float32 \[2, 1\]"),
        ("w4a16_g4_asym", CODES, GROUPED, GROUPED[:, :1], r"its zero is .* \[2, 1\], not torch.bfloat16 \[2, 2\]"),
        ("w4a8_g4_asym", CODES, GROUPED, GROUPED * 0.5, "zero points are fractions"),
        ("w4a8_asym_e4m3", CODES, SINGLE, SINGLE * 0.5, "zero points are fractions"),
        ("w4a8_g4_sym_iscale", CODES, GROUPED, None, r"its scale is torch.bfloat16 \[2, 2\], not torch.float32"),
        ("w4a8_g4_sym_iscale", CODES, torch.tensor([[1.0, 0.3], [1.0, 1.0]]), None, "scales are not 1 to 16 times"),
        ("w4a8_g4_sym_iscale", CODES, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), None, "scales are not 1 to 16 times"),
        ("w4a8_g4_sym_iscale", CODES, torch.zeros(2, 2), None, "scales are not 1 to 16 times"),
        ("w4a8_g4_sym_iscale", CODES, torch.full((2, 2), torch.nan), None, "scales are not 1 to 16 times"),
        ("w4a8_g4_sym_iscale", CODES, torch.full((2, 2), torch.inf), None, "scales are not 1 to 16 times"),
        ("w4a8_g4_sym_iscale", CODES, torch.full((2, 2), 2.0**-124), None, "scales are not 1 to 16 times"),
    ],
)
def test_what_does_not_fit_is_refused(
    text: str, codes: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, reason: str
) -> None:
    with pytest.raises(BadQuantized, match=f"bad quantized weight of {text}: .*{reason}"):
        build(text, codes, scale, zero)


def test_fractional_zero_points_are_for_weight_only_schemes() -> None:
    assert build("w4a16_g4_asym", CODES, GROUPED, GROUPED * 0.5).zero is not None


def test_a_stack_is_indexed_and_a_matrix_is_not() -> None:
    stack = quantize(torch.randn(3, 2, 6), Scheme.parse("w4a16_g4_asym"))
    assert (stack.n, stack.k) == (2, 6)
    assert stack[1:].codes.shape == (2, 2, 6)
    one = stack[2]
    assert one.codes.data_ptr() == stack.codes[2].data_ptr()
    with pytest.raises(BadQuantized, match="one matrix cannot be indexed"):
        one[0]


def test_integer_scales_are_sixteenths_of_the_largest_of_their_channel() -> None:
    scale = torch.tensor([[1.0, 5 / 16], [2.0**-122, 2.0**-126]])
    assert build("w4a8_g4_sym_iscale", CODES, scale).scale is scale


def test_scales_are_bf16_where_they_count() -> None:
    assert scale_dtype(Scheme.parse("w4a16_sym")) == torch.float32
    assert scale_dtype(Scheme.parse("w4a16_g128_sym")) == torch.bfloat16
    assert scale_dtype(Scheme.parse("w4a8_g128_sym_iscale")) == torch.float32
