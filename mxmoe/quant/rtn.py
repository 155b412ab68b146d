"""Round to nearest: every weight takes the closest code under scales fitted to its own group. And back."""

from __future__ import annotations

import torch
from torch import Tensor

from mxmoe.errors import BadScheme, BadWeight, NonFiniteWeights, WeightsBeyondFormat
from mxmoe.ir import Scheme
from mxmoe.quant.formats import FORMATS
from mxmoe.quant.quantized import Quantized
from mxmoe.quant.scales import join_groups, split_groups

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize(weight: Tensor, scheme: Scheme, *, name: str = "weight", hessian: Tensor | None = None) -> Quantized:
    """
    Quantize a weight [..., n, k] by rounding to the nearest code; the quantizer "rtn".

    The error of every weight is at most half a step of its group (`docs/schemes.md` has the exact bounds), and finite
    weights never become NaN or inf. A stack gives what its matrices give one by one. `hessian` is accepted because the
    protocol has it, and not used. [0.0, 1.5, -3.0] in w3a16_sym -> scale 1, codes 4, 6, 1 (1.5 goes to the even 2).

    Raises:
        BadWeight: not a float tensor of at least two axes and one input channel.
        NonFiniteWeights: NaN or inf in the weight, or a float64 beyond float32.
        WeightsBeyondFormat: fp16 weights beyond 65504.
    """
    del hessian
    dense = checked_weight(weight, scheme, name)
    fmt = FORMATS[scheme.weight_format]
    scale, zero = fmt.fit(dense, scheme)
    return Quantized(scheme, fmt.encode(dense, scheme, scale, zero), scale, zero)


def dequantize(q: Quantized) -> Tensor:
    """Return the float32 weight [..., n, k] of the codes: `scale * (code - zero)`, two float32 operations."""
    values = FORMATS[q.scheme.weight_format].values(q.codes, q.scheme, q.zero)
    if q.scale is None:
        return values
    return join_groups(split_groups(values, q.scheme.group_size) * q.scale.float().unsqueeze(-1), q.k)


def checked_weight(weight: Tensor, scheme: Scheme, name: str) -> Tensor:
    """Return the weight in float32, or raise what every quantizer refuses before any work (see `quantize`)."""
    if scheme.is_dropped:
        raise BadScheme(text=str(scheme), reason=f"a dropped expert has no codes, and {name} is to be quantized")
    if weight.dtype not in FLOATS or weight.dim() < 2 or weight.shape[-1] < 1:
        raise BadWeight(name=name, found=f"{weight.dtype} {list(weight.shape)}")
    dense = weight.detach().to(torch.float32)
    finite = dense.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()
        raise NonFiniteWeights(name=name, count=len(bad), index=bad[0].tolist())
    limit = FORMATS[scheme.weight_format].limit
    if limit < float("inf") and dense.numel() and (largest := float(dense.abs().max())) >= limit:
        raise WeightsBeyondFormat(name=name, value=largest, limit=torch.finfo(torch.float16).max, scheme=scheme)
    return dense
