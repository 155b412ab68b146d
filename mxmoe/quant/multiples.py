"""Group scales that were found one by one, made integer scales: all of a channel at once, and only where that pays."""

from __future__ import annotations

import torch
from torch import Tensor

from mxmoe.ir import Scheme
from mxmoe.quant.formats import FORMATS
from mxmoe.quant.quantized import Quantized
from mxmoe.quant.rtn import dequantize, quantize
from mxmoe.quant.scales import SMALLEST, multiples_above

# weights that are compared at a time: bounds the memory of temporaries to a few of these in float64
_AT_ONCE = 1 << 24


def with_multiples(weight: Tensor, scheme: Scheme, scale: Tensor, exponent: float) -> Quantized:
    """
    Quantize a float32 weight [..., n, k] with the integer scales above given ones, or with those of "rtn".

    Rounding up to multiples can undo what a search for `scale` [..., n, groups] has gained. So each channel takes of
    both the ones with the smaller sum of |w - decoded|^exponent: none is worse than by round to nearest.
    """
    if not weight.numel():
        return quantize(weight, scheme)
    rows = weight.reshape(-1, weight.shape[-1])
    at_once = max(1, _AT_ONCE // rows.shape[1])
    scales = scale.reshape(len(rows), -1).split(at_once)
    parts = [_better(own, scheme, s, exponent) for own, s in zip(rows.split(at_once), scales, strict=True)]
    codes, chosen = (torch.cat(each).reshape(*weight.shape[:-1], -1) for each in zip(*parts, strict=True))
    return Quantized(scheme, codes, chosen)


def _better(rows: Tensor, scheme: Scheme, scale: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """Choose codes and scales of rows [rows, k]."""
    nearest = quantize(rows, scheme)
    assert nearest.scale is not None, f"{scheme} has scales"
    whole = multiples_above(scale.double(), 2 ** (scheme.weight_bits - 1) - 1)
    found = Quantized(scheme, FORMATS["int"].encode(rows, scheme, whole, None), whole)
    is_better = _error(rows, found, exponent) < _error(rows, nearest, exponent)
    return torch.where(is_better, found.codes, nearest.codes), torch.where(is_better, whole, nearest.scale)


def _error(rows: Tensor, q: Quantized, exponent: float) -> Tensor:
    """Sum |w - decoded|^exponent over each row, float64 [rows, 1], in units of its largest magnitude."""
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=SMALLEST).double()
    change = rows.double() - dequantize(q).double()
    return (change / largest).abs_().pow_(exponent).sum(-1, keepdim=True)
