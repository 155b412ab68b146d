"""Groups of input channels, and the scale of each: rounded up to its storage type, never denormal, never infinite."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# the smallest normal number of float32 and bfloat16: with no denormal scale, no backend's treatment of them matters
SMALLEST = 2.0**-126
LARGEST = torch.finfo(torch.float32).max


def split_groups(x: Tensor, group_size: int | None) -> Tensor:
    """
    View [..., k] as [..., groups, group size]; a short last group is filled with zeros.

    k=5 in groups of 2 -> [..., 3, 2]. Zeros are harmless for the largest magnitude and for a range that
    includes zero, and these are all that is taken over groups.
    """
    k = x.shape[-1]
    size = group_size or k
    ragged = -k % size
    if ragged:
        x = functional.pad(x, (0, ragged))
    return x.unflatten(-1, (-1, size))


def join_groups(x: Tensor, k: int) -> Tensor:
    """Undo `split_groups`: [..., groups, group size] to [..., k]."""
    return x.flatten(-2)[..., :k]


def storable_scale(scale: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    """
    Round positive float64 scales up to `dtype`, so that the largest value of a group is not clipped.

    The result lies between 2^-126 and the largest number of `dtype` that `steps` times stays finite in float32: a group
    that reaches float32's last 0.8 % is clipped there rather than decoded to infinity. 1.001 -> 1.0078125 in bfloat16.
    """
    highest = round_down(torch.tensor(LARGEST / steps, dtype=torch.float64), dtype)
    return round_up(scale.clamp(min=SMALLEST), dtype).clamp(max=highest.item())


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive float64 values up to the next float32 or bfloat16; beyond the largest one lies inf."""
    single = x.to(torch.float32)
    single = torch.where(single.double() < x, torch.nextafter(single, torch.full_like(single, torch.inf)), single)
    if dtype == torch.float32:
        return single
    # bfloat16 is the upper half of float32, and positive floats are ordered like their bits
    bits = single.view(torch.int32)
    ceiling = (torch.where(single.isinf(), bits, bits + 0xFFFF) >> 16) << 16
    return ceiling.view(torch.float32).to(dtype)


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive finite float64 values down to the previous float32 or bfloat16."""
    single = x.clamp(max=LARGEST).to(torch.float32)
    single = torch.where(single.double() > x, torch.nextafter(single, torch.zeros_like(single)), single)
    if dtype == torch.float32:
        return single
    return ((single.view(torch.int32) >> 16) << 16).view(torch.float32).to(dtype)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a 16-bit float; finite values stay finite, infinities and NaN stay. 1e6 in float16 -> 65504."""
    largest = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest)).to(dtype)
