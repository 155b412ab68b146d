"""One row per number format of a weight: how scales are fitted, codes are chosen, and which numbers codes stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mxmoe.ir import Scheme
from mxmoe.quant.quantized import scale_dtype
from mxmoe.quant.scales import join_groups, multiples_above, saturate, split_groups, storable_scale

E4M3_MAX = 448.0


class Format(Protocol):
    """A number format. `values(encode(w)) * scale` is the decoded weight; all three work on stacks [..., n, k]."""

    @property
    def limit(self) -> float:
        """Magnitude from which a weight cannot be stored: reaching it is an error; inf where a scale prevents it."""
        ...

    def fit(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor | None, Tensor | None]:
        """Choose scale and zero point [..., n, groups] for a float32 weight, in their storage type."""
        ...

    def encode(self, weight: Tensor, scheme: Scheme, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """Choose the code [..., n, k] of every float32 weight under given scales: the nearest one."""
        ...

    def values(self, codes: Tensor, scheme: Scheme, zero: Tensor | None) -> Tensor:
        """Numbers [..., n, k] in float32 that the codes stand for before scaling: what a matrix unit multiplies."""
        ...


@dataclass(frozen=True, slots=True)
class Affine:
    """
    Integers of 1 to 8 bits, `w = s * (code - z)`.

    Symmetric: `s = max|w| / (2^(b-1) - 1)`, z = 2^(b-1), and code 0 is unused. Symmetric 1 bit has the values -s and s
    with s = mean|w|, as in XNOR-Net (Rastegari et al. 2016, eq. 6). Asymmetric: the range [min(0, w), max(0, w)] is cut
    in 2^b - 1 steps, z is the code of zero (Jacob et al. 2018, section 2.1). A group of zeros has s = 1 and codes of
    value 0; in symmetric 1 bit, which has no such code, s = 0. Integer scales are rounded up by `multiples_above`, and
    a group of zeros among others has the smallest there is.
    """

    limit: float = math.inf

    def fit(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """As in `Format`."""
        groups, dtype = split_groups(weight, scheme.group_size), scale_dtype(scheme)
        if not scheme.symmetric:
            low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
            steps = 2**scheme.weight_bits - 1
            wide = (high.double() - low.double()) / steps
            scale = torch.where(wide > 0, storable_scale(wide, steps, dtype), 1.0).to(dtype)
            return scale, (low.abs() / scale.float()).round().clamp(max=steps).to(dtype)
        if scheme.weight_bits == 1:
            mean = groups.abs().sum(-1, dtype=torch.float64) / _lengths(weight, scheme)
            return torch.where(mean > 0, storable_scale(mean, 1, dtype), 0.0).to(dtype), None
        steps = 2 ** (scheme.weight_bits - 1) - 1
        if scheme.integer_scales:
            return multiples_above(_own_scales(groups, steps), steps), None
        return _fit_largest(groups, steps, dtype), None

    def encode(self, weight: Tensor, scheme: Scheme, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """As in `Format`; halves go to the even code."""
        assert scale is not None, f"{scheme} needs a scale"
        if scheme.symmetric and scheme.weight_bits == 1:
            return (weight >= 0).to(torch.uint8)
        half = 2 ** (scheme.weight_bits - 1)
        middle, lowest = (zero.float().unsqueeze(-1), 0) if zero is not None else (half, 1)
        steps = split_groups(weight, scheme.group_size) / scale.float().unsqueeze(-1)
        codes = steps.add_(middle).round_().clamp_(lowest, 2 * half - 1).to(torch.uint8)
        return join_groups(codes, weight.shape[-1])

    def values(self, codes: Tensor, scheme: Scheme, zero: Tensor | None) -> Tensor:
        """As in `Format`; whole numbers of magnitude 255 at most, unless the zero point is a fraction."""
        if zero is not None:
            groups = split_groups(codes, scheme.group_size).float()
            return join_groups(groups.sub_(zero.float().unsqueeze(-1)), codes.shape[-1])
        if scheme.weight_bits == 1:
            return codes.float().mul_(2).sub_(1)
        return codes.float().sub_(2 ** (scheme.weight_bits - 1))


@dataclass(frozen=True, slots=True)
class E4m3:
    """8-bit floats, 4 bits of exponent and 3 of mantissa (Micikevicius et al.), `w = s * code`; s = max|w| / 448."""

    limit: float = math.inf

    def fit(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, None]:
        """As in `Format`."""
        return _fit_largest(split_groups(weight, scheme.group_size), E4M3_MAX, scale_dtype(scheme)), None

    def encode(self, weight: Tensor, scheme: Scheme, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """As in `Format`; halves go to the even mantissa."""
        assert scale is not None, f"{scheme} needs a scale"
        groups = split_groups(weight, scheme.group_size) / scale.float().unsqueeze(-1)
        return join_groups(to_e4m3(groups), weight.shape[-1])

    def values(self, codes: Tensor, scheme: Scheme, zero: Tensor | None) -> Tensor:
        """As in `Format`; multiples of 2^-9 of magnitude 448 at most."""
        return codes.float()


@dataclass(frozen=True, slots=True)
class Plain:
    """Weights kept as 16-bit floats, without a scale."""

    dtype: torch.dtype
    """torch.bfloat16 or torch.float16."""
    limit: float = math.inf

    def fit(self, weight: Tensor, scheme: Scheme) -> tuple[None, None]:
        """As in `Format`."""
        return None, None

    def encode(self, weight: Tensor, scheme: Scheme, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """As in `Format`; a bfloat16 at the very top of float32 becomes the largest one, not inf."""
        return saturate(weight, self.dtype)

    def values(self, codes: Tensor, scheme: Scheme, zero: Tensor | None) -> Tensor:
        """As in `Format`."""
        return codes.float()


FORMATS: Mapping[str, Format] = {
    "int": Affine(),
    "e4m3": E4m3(),
    "bf16": Plain(torch.bfloat16),
    # 65520 is the first number that rounds to inf; a weight that large is not what a 16-bit row promises to keep
    "fp16": Plain(torch.float16, limit=65520.0),
}


def to_e4m3(x: Tensor) -> Tensor:
    """Cast float32 to float8_e4m3fn; magnitudes above 448 become 448, on which releases of torch differ."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _fit_largest(groups: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    """Scale [..., groups] that brings the largest magnitude of each group to `steps`; 1 for a group of zeros."""
    own = _own_scales(groups, steps)
    return torch.where(own > 0, storable_scale(own, steps, dtype), 1.0).to(dtype)


def _own_scales(groups: Tensor, steps: float) -> Tensor:
    """Scale [..., groups], float64, that brings the largest magnitude of each group to `steps`; 0 for zeros."""
    largest = groups.abs().amax(-1).double()
    # by a number, CUDA multiplies with its inverse, and scales would differ in the last bit from those of the CPU
    return largest / torch.full((), steps, dtype=torch.float64, device=largest.device)


def _lengths(weight: Tensor, scheme: Scheme) -> Tensor:
    """Channels in each group, float64 [groups]: k=5 in groups of 2 -> 2, 2, 1."""
    k = weight.shape[-1]
    size = scheme.group_size or k
    starts = torch.arange(0, k, size, dtype=torch.float64, device=weight.device)
    return (k - starts).clamp(max=size)
