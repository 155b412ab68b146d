"""The linear in a scheme: the definition that every backend is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from mxmoe.errors import BadActivation, NotOneMatrix
from mxmoe.ir import Scheme
from mxmoe.quant.activation import largest_act_code, quantize_activation
from mxmoe.quant.formats import FORMATS
from mxmoe.quant.quantized import Quantized
from mxmoe.quant.rtn import dequantize
from mxmoe.quant.scales import LARGEST_MULTIPLIER, join_groups, split_groups, split_scales

# every integer up to here is a float32, so a float32 product of integers that stays below is exact in any order
EXACT_FLOAT32 = 2**24


def matmul(x: Tensor, q: Quantized) -> Tensor:
    """
    Multiply activations [..., k] by a quantized weight [n, k]: float32 [..., n].

    16-bit activations (weight-only and float schemes): x is cast to bf16 or fp16, the weight is decoded to float32, and
    float32 operands are multiplied and summed in float32.

    Quantized activations: with activation codes a (`quantize_activation`) and weight codes c, zero point z,

        y = sum over groups g of  float32(sum over k in g of  a[k] * (c[k] - z[g])) * (s_a[g] * s_w[g])

    The inner sum is exact: an int32 for integers (they fit up to 66,000 channels), and for e4m3 the rounded value of
    the exact sum. The product of the scales, the product with it and the sum over groups, first group first, are
    float32 operations. Groups are those of the weight; s_a is the same for all groups where a token has one scale.

    Integer scales, s_w[g] = m[g] s with the channel's s (`split_scales`): the multipliers go into the exact sum, which
    runs over the whole row, is rounded once and scaled once. It is an int32 up to 131,072 channels.

        y = float32(sum over k of  a[k] * m[g of k] * (c[k] - z)) * (s_a * s)

    Finite whenever max|x| * max|w| * k is a float32.

    Raises:
        BadActivation: not a float tensor [..., k].
        NotOneMatrix: a stack of weights.
    """
    if q.codes.dim() != 2:
        raise NotOneMatrix(shape=list(q.codes.shape))
    if x.dim() < 1 or x.shape[-1] != q.k:
        raise BadActivation(found=f"{x.dtype} {list(x.shape)}", channels=q.k)
    codes, scale = quantize_activation(x, q.scheme)
    if q.scheme.act_bits == 16:
        return codes.float() @ dequantize(q).T
    rows = codes.reshape(-1, q.k)
    return _scaled_sums(rows, scale.reshape(-1, scale.shape[-1]), q).reshape(*x.shape[:-1], q.n)


def _scaled_sums(codes: Tensor, act_scale: Tensor, q: Quantized) -> Tensor:
    """Sum the exact products of each group [m, n], scaled; codes are [m, k], activation scales [m, groups or 1]."""
    assert q.scale is not None, f"{q.scheme} needs a scale"
    values, scales, size = _summands(q, q.scale)
    dtype = _exact_dtype(q.scheme, size)
    left, right = codes.to(dtype), values.to(dtype)
    act_scales = act_scale.expand(-1, scales.shape[-1])
    total = torch.zeros((len(codes), q.n), dtype=torch.float32, device=codes.device)
    for group, start in enumerate(range(0, q.k, size)):
        part = slice(start, start + size)
        exact = (left[:, part] @ right[:, part].T).to(torch.float32)
        total += exact * (act_scales[:, group, None] * scales[:, group].float())
    return total


def _summands(q: Quantized, scale: Tensor) -> tuple[Tensor, Tensor, int]:
    """Whole numbers [n, k] that are summed, scales [n, sums], and how many channels go into one sum."""
    values = FORMATS[q.scheme.weight_format].values(q.codes, q.scheme, q.zero)
    if not q.scheme.integer_scales:
        return values, scale, q.scheme.group_size or q.k
    channel, multipliers = split_scales(scale)
    groups = split_groups(values, q.scheme.group_size) * multipliers.unsqueeze(-1)
    return join_groups(groups, q.k), channel, q.k


def _exact_dtype(scheme: Scheme, channels: int) -> torch.dtype:
    """
    Float type in which the sum over so many channels is exact, whatever the order of summation.

    Integers: float32 up to 2^24. Beyond, and for e4m3, whose products are multiples of 2^-18 below 2^18, float64: its
    53 bits hold sums over 2^17 channels.
    """
    if scheme.act_format != "int":
        return torch.float64
    weight = LARGEST_MULTIPLIER * 2 ** (scheme.weight_bits - 1) if scheme.integer_scales else 2**scheme.weight_bits - 1
    largest = largest_act_code(scheme) * weight * channels
    return torch.float32 if largest <= EXACT_FLOAT32 else torch.float64
