"""One tolerance per scheme, ordered as their reasons are."""

import pytest

from mxmoe.ir import Scheme
from mxmoe.quant import block_tolerance, tolerance


def of(text: str) -> float:
    return tolerance(Scheme.parse(text))


def test_what_is_exact_is_held_closer_than_what_is_rounded() -> None:
    assert of("w8a8_sym") == of("w4a4_g128_sym") < of("fp16") < of("w8a8_e4m3") < of("w4a16_g128_asym") == of("bf16")
    assert of("w4a16_g128_asym_fp16") == of("fp16")
    assert of("w4a8_sym_e4m3") == of("w8a8_e4m3")


@pytest.mark.parametrize("text", ["w8a8_sym", "w4a4_g128_sym", "w8a8_e4m3", "bf16", "w4a16_sym_fp16"])
def test_a_block_is_allowed_more_than_a_linear_and_a_mix_what_its_worst_scheme_is(text: str) -> None:
    scheme, exact = Scheme.parse(text), Scheme.parse("w8a8_sym")
    alone = block_tolerance([scheme])
    assert tolerance(scheme) < alone < 0.1
    assert block_tolerance([scheme, exact]) >= max(alone, block_tolerance([exact]))


def test_coarser_activations_have_larger_flips() -> None:
    assert block_tolerance([Scheme.parse("w4a4_sym")]) > block_tolerance([Scheme.parse("w4a8_sym")])
