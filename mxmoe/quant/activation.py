"""What a scheme does to activations: per token, at run time, symmetric, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from mxmoe.errors import BadActivation
from mxmoe.ir import Scheme
from mxmoe.quant.formats import E4M3_MAX, to_e4m3
from mxmoe.quant.rtn import FLOATS
from mxmoe.quant.scales import LARGEST, SMALLEST, join_groups, round_down, saturate, split_groups


def quantize_activation(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """
    Quantize activations [..., k] for a linear in `scheme`; returns codes [..., k] and float32 scales [..., groups].

    One scale per token, or per token and group where `scheme.act_group_size` is set: `s = max|x| / largest code`
    (127 for 8 bits, 7 for 4, 448 for e4m3), at least 2^-126, and 1 for a row of zeros; `code = round(x / s)`, a float32
    division and halves to even. Integer codes are int8, e4m3 codes float8_e4m3fn. 16-bit activations are cast
    (finite values saturate) and have the scale 1, so `codes * scale` is the value in every scheme. A row or group with
    NaN or inf gets the scale NaN (16 bits: keeps them): it spoils its own token visibly and no other.
    [2.0, -1.0] at 8 bits -> codes 127, -64, scale 0.015748.

    Raises:
        BadActivation: not a float tensor, or without channels.
    """
    if x.dtype not in FLOATS or x.dim() < 1 or x.shape[-1] < 1:
        raise BadActivation(found=f"{x.dtype} {list(x.shape)}", channels="channels")
    x = x.to(torch.float32)
    if scheme.act_bits == 16:
        dtype = torch.float16 if scheme.act_format == "fp16" else torch.bfloat16
        return saturate(x, dtype), torch.ones((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    steps = E4M3_MAX if scheme.act_format == "e4m3" else float(largest_act_code(scheme))
    groups = split_groups(x, scheme.act_group_size)
    scale = _scales(groups.abs().amax(-1), steps)
    ratio = (groups / scale.unsqueeze(-1)).nan_to_num_(nan=0.0)
    codes = to_e4m3(ratio) if scheme.act_format == "e4m3" else ratio.round_().clamp_(-steps, steps).to(torch.int8)
    return join_groups(codes, x.shape[-1]), scale


def fake_quantize_activation(x: Tensor, scheme: Scheme) -> Tensor:
    """Return the float32 values [..., k] that quantized activations stand for: `codes * scale`."""
    codes, scale = quantize_activation(x, scheme)
    return join_groups(split_groups(codes.float(), scheme.act_group_size) * scale.unsqueeze(-1), x.shape[-1])


def largest_act_code(scheme: Scheme) -> int:
    """Largest magnitude of an integer activation code: 127 for 8 bits, 7 for 4."""
    return 2 ** (scheme.act_bits - 1) - 1


def _scales(largest: Tensor, steps: float) -> Tensor:
    """Float32 scales for the largest magnitudes, such that `steps` times a scale never overflows."""
    highest = round_down(torch.tensor(LARGEST / steps, dtype=torch.float64), torch.float32).item()
    # by a number, CUDA multiplies with its inverse, and scales would differ in the last bit from those of the CPU
    ratio = largest / torch.full((), steps, dtype=torch.float32, device=largest.device)
    scale = torch.where(largest > 0, ratio.clamp(SMALLEST, highest), 1.0)
    return torch.where(largest.isfinite(), scale, torch.nan)
