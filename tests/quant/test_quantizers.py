"""Every registered quantizer keeps the promises of the protocol."""

import inspect

import pytest
import torch

from mxmoe.errors import BadWeight, NonFiniteWeights
from mxmoe.ir import Scheme
from mxmoe.quant import QUANTIZERS, Quantizer, dequantize, find_quantizer, quantize_each

SCHEMES = [
    Scheme.parse(text)
    for text in (
        *("w4a16_g8_asym", "w3a16_sym", "w8a8_sym", "w4a4_g8_sym"),
        *("w4a8_g8_sym_iscale", "w8a8_e4m3", "bf16"),
    )
]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_quantizer_gives_codes_close_to_the_weight(name: str, scheme: Scheme) -> None:
    quantizer: Quantizer = QUANTIZERS[name]
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 20, generator=generator), torch.randn(50, 20, generator=generator)
    for hessian in (None, x.T @ x):
        q = quantizer(weight, scheme, name="up", hessian=hessian)
        assert (q.scheme, q.codes.shape) == (scheme, weight.shape)
        assert (dequantize(q) - weight).norm() < 0.5 * weight.norm()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_refuses_bad_weights_by_name(name: str) -> None:
    with pytest.raises(NonFiniteWeights, match="up holds 3 values"):
        QUANTIZERS[name](torch.full((1, 3), torch.nan), SCHEMES[0], name="up")
    with pytest.raises(BadWeight, match=r"up is torch\.int32"):
        QUANTIZERS[name](torch.ones(1, 3, dtype=torch.int32), SCHEMES[0], name="up")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_has_the_signature_of_the_protocol(name: str) -> None:
    wanted = list(inspect.signature(Quantizer.__call__).parameters)[1:]
    assert list(inspect.signature(QUANTIZERS[name]).parameters)[: len(wanted)] == wanted


@pytest.mark.parametrize("text", [*QUANTIZERS, "gptq{static-groups=false}", "gptq{act-order=false max-gb=0.0001}"])
def test_several_schemes_at_once_are_what_they_are_one_by_one(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 5, 20, generator=generator), torch.randn(3, 50, 20, generator=generator)
    quantizer, hessian = find_quantizer(text), x.mT @ x
    assert quantize_each(quantizer, weight, [], hessian=hessian) == []
    found = quantize_each(quantizer, weight, SCHEMES, hessian=hessian)
    for scheme, q in zip(SCHEMES, found, strict=True):
        wanted = quantizer(weight, scheme, hessian=hessian)
        assert q.scheme == scheme
        assert torch.equal(dequantize(q), dequantize(wanted))
