"""
Groups of input channels, and the scale of each: rounded up to its storage type, never denormal, never infinite.

Integer scales are whole multiples of one number of their channel: `split_scales` and `join_scales`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# the smallest normal number of float32 and bfloat16: with no denormal scale, no backend's treatment of them matters
SMALLEST = 2.0**-126
LARGEST = torch.finfo(torch.float32).max
# 16 times the largest magnitude of a 4-bit code, 8, still is an int8
LARGEST_MULTIPLIER = 16
# bits of a float32 that are left free, so that products with 1 to 16 are exact
_FREE_BITS = 4


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


def split_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """
    Split integer scales, float32 [..., n, groups], into channel scales and multipliers; undone by `join_scales`.

    The channel scale, float32 [..., n, 1], is a sixteenth of the channel's largest scale, and a multiplier, uint8
    [..., n, groups], how often a scale holds it: 1 to 16, 16 for the largest. All of it is exact. [2.0, 0.5, 1.25] ->
    [0.125] and [16, 4, 10]. Of scales that are no such multiples it makes no sense: see `are_multiples`.
    """
    channel = scale.amax(-1, keepdim=True) / LARGEST_MULTIPLIER
    return channel, (scale / channel).to(torch.uint8)


def join_scales(channel: Tensor, multipliers: Tensor) -> Tensor:
    """Undo `split_scales`: channel scales [..., n, 1] times multipliers [..., n, groups], float32 and exact."""
    return channel * multipliers


def are_multiples(scale: Tensor) -> bool:
    """Say whether scales are exactly 1 to 16 times a normal float32, a sixteenth of the largest of their channel."""
    channel = scale.amax(-1, keepdim=True) / LARGEST_MULTIPLIER
    times = scale / channel
    is_whole = (times >= 1) & (times == times.round()) & (times.double() * channel.double() == scale.double())
    return bool((is_whole & (channel >= SMALLEST)).all())


def multiples_above(own: Tensor, steps: float) -> Tensor:
    """
    Round scales of groups, float64 [..., n, groups] and at least 0, up to integer scales, float32.

    With S the largest of a channel, rounded up to 20 significant bits (so that m S / 16 is exact), a scale becomes
    `ceil(16 own / S)` sixteenths of S: at most S / 16 above its own, by which small ones lose most. S is 1 for a
    channel of zeros, else at least 2^-122, and `steps` times S is finite.
    [1.0, 0.4, 0.0] -> 1.0, 7/16, 1/16.
    """
    largest = own.amax(-1, keepdim=True)
    highest = _shorten(round_down(torch.tensor(LARGEST / steps, dtype=torch.float64), torch.float32), _FREE_BITS)
    single = round_up(largest.clamp(min=SMALLEST * LARGEST_MULTIPLIER), torch.float32)
    channel = _lengthen(single, _FREE_BITS).clamp(max=highest.item())
    channel = torch.where(largest > 0, channel, 1.0) / LARGEST_MULTIPLIER
    times = (own / channel.double()).ceil().clamp(1, LARGEST_MULTIPLIER)
    # the largest takes 16 though S may be far above it, where it is tiny or nothing
    times = torch.where(own == largest, LARGEST_MULTIPLIER, times)
    return join_scales(channel, times.to(torch.float32))


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive float64 values up to the next float32 or bfloat16; beyond the largest one lies inf."""
    single = x.to(torch.float32)
    single = torch.where(single.double() < x, torch.nextafter(single, torch.full_like(single, torch.inf)), single)
    if dtype == torch.float32:
        return single
    # bfloat16 is the upper half of float32
    return _lengthen(single, 16).to(dtype)


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive finite float64 values down to the previous float32 or bfloat16."""
    single = x.clamp(max=LARGEST).to(torch.float32)
    single = torch.where(single.double() > x, torch.nextafter(single, torch.zeros_like(single)), single)
    if dtype == torch.float32:
        return single
    return _shorten(single, 16).to(dtype)


def _lengthen(single: Tensor, bits: int) -> Tensor:
    """Round positive float32 values up to the next one whose last `bits` bits are zero."""
    word = single.view(torch.int32)  # positive floats are ordered like their bits
    return ((torch.where(single.isinf(), word, word + (1 << bits) - 1) >> bits) << bits).view(torch.float32)


def _shorten(single: Tensor, bits: int) -> Tensor:
    """Round positive float32 values down to the previous one whose last `bits` bits are zero."""
    return ((single.view(torch.int32) >> bits) << bits).view(torch.float32)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a 16-bit float; finite values stay finite, infinities and NaN stay. 1e6 in float16 -> 65504."""
    largest = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest)).to(dtype)
