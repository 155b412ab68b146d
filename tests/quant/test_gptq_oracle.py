"""GPTQ against a well-kept implementation of others; skipped where that package is not installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mxmoe.ir import Scheme
from mxmoe.quant import dequantize, find_quantizer, hessian_error, quantize


def oracle() -> Any:  # noqa: ANN401  # a module that may not be there
    """llmcompressor's GPTQ: pure torch on a CPU; what it warns of while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("llmcompressor", exc_type=ImportError)
        return pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize", exc_type=ImportError)


def case(seed: int, k: int = 256) -> tuple[Tensor, Tensor]:
    """Three weights [32, k] and Hessians of correlated inputs, some channels far louder than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn((3, k, k), generator=generator) * torch.logspace(0, 1.5, k)
    x = torch.randn((3, 4 * k, k), generator=generator) @ mix
    return torch.randn((3, 32, k), generator=generator), x.mT @ x


def theirs(weight: Tensor, hessian: Tensor, scheme: Scheme, *, act_order: bool) -> Tensor:
    """Their decoded weights, under the scales and zero points of "rtn"."""
    module = oracle()
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs  # pyright: ignore

    plain = quantize(weight, scheme)
    assert plain.scale is not None
    assert plain.zero is not None
    half = 2 ** (scheme.weight_bits - 1)
    args = QuantizationArgs(
        num_bits=scheme.weight_bits,
        symmetric=False,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
        actorder=ActivationOrdering.WEIGHT if act_order else None,
    )
    zero = (plain.zero.float() - half).to(torch.int8)
    decoded, _, fell_back = module.quantize_weight(
        weight.clone(), hessian.clone(), plain.scale.float(), zero, None, args, blocksize=128, percdamp=0.01
    )
    assert not fell_back.any()
    return decoded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("text", ["w4a16_g64_asym", "w3a16_g128_asym", "w2a16_g32_asym", "w4a16_asym"])
def test_codes_are_theirs(text: str, act_order: bool) -> None:
    scheme = Scheme.parse(text)
    quantizer = find_quantizer("gptq" if act_order else "gptq{act-order=false}")
    for seed in range(3):
        weight, hessian = case(seed)
        decoded = theirs(weight, hessian, scheme, act_order=act_order)
        found = quantizer(weight, scheme, hessian=hessian)
        # they sum in float32: where a weight lies on a rounding border, the rest of its row goes another way
        other = (dequantize(found) - decoded).abs() > 1e-6
        change = (weight - decoded).double()
        loss = ((change @ hessian.double()) * change).sum((-2, -1))
        ratio = hessian_error(weight, found, hessian) / loss
        assert other.double().mean() < 1e-3, f"seed {seed}: {int(other.sum())} of {other.numel()} codes differ"
        assert (ratio < 1.001).all(), f"seed {seed}: losses are {ratio.tolist()} of theirs"
