"""Round to nearest with clipped ranges: each group takes the scale that its own weights are decoded best with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mxmoe.errors import BadOption
from mxmoe.ir import Scheme
from mxmoe.quant.formats import FORMATS
from mxmoe.quant.multiples import with_multiples
from mxmoe.quant.options import WithOptions
from mxmoe.quant.quantized import Quantized
from mxmoe.quant.rtn import checked_weight, dequantize
from mxmoe.quant.scales import SMALLEST, join_groups, split_groups

# weights that are searched at a time: bounds the memory of the search to a few of these in float32
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class RtnMse(WithOptions):
    """
    Round to nearest under clipped ranges; the quantizer "rtn_mse".

    For every group the range [lo, hi] is shrunk to p [lo, hi] with p = 1, 1 - 1/grid, ... down to `lowest`, and the p
    with the smallest sum of |w - decoded|^exponent is kept, the largest such p on a tie. p = 1 is "rtn", so the sum is
    never above its. This is the range search of GPTQ's reference (Frantar et al., ICLR 2023), whose exponent is 2.4.
    Weights beyond the range are clipped, so half a step no longer bounds their error. Needs no data.

    Integer scales are those of the same scheme without, rounded up to multiples; a channel whose sum would grow by it
    keeps the scales of "rtn".

    Raises:
        BadOption: an exponent that is not positive, a grid under 1, or `lowest` outside 0 to 1.
    """

    name: ClassVar[str] = "rtn_mse"
    exponent: float = 2.4
    """Of the error that is summed; 2 makes it the squared one."""
    grid: int = 100
    """Steps that 1 is cut into."""
    lowest: float = 0.2
    """The search stops above this part of the range."""

    def __post_init__(self) -> None:
        for option, fits, reason in (
            ("exponent", 0 < self.exponent < math.inf, "it is positive"),
            ("grid", self.grid >= 1, "it is at least 1"),
            ("lowest", 0 <= self.lowest <= 1, "it lies between 0 and 1"),
        ):
            if not fits:
                raise BadOption(name=self.name, option=f"{option}={getattr(self, option)}", reason=reason)

    def __call__(
        self, weight: Tensor, scheme: Scheme, *, name: str = "weight", hessian: Tensor | None = None
    ) -> Quantized:
        """
        Quantize a weight [..., n, k]; raises what `quantize` raises.

        The search decodes the weight (1 - lowest) * grid times.
        """
        del hessian
        dense = checked_weight(weight, scheme, name)
        scale, zero = self.fit(dense, scheme)
        return Quantized(scheme, FORMATS[scheme.weight_format].encode(dense, scheme, scale, zero), scale, zero)

    def fit(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor | None, Tensor | None]:
        """Choose scale and zero point [..., n, groups] of a float32 weight, in their storage type; a `Format.fit`."""
        if scheme.is_float or not weight.numel():
            return FORMATS[scheme.weight_format].fit(weight, scheme)
        if scheme.integer_scales:
            free, _ = self.fit(weight, dataclasses.replace(scheme, integer_scales=False))
            assert free is not None, f"{scheme} has scales"
            return with_multiples(weight, scheme, free, self.exponent).scale, None
        rows = weight.reshape(-1, weight.shape[-1])
        fitted = [self._search(part, scheme) for part in rows.split(max(1, _AT_ONCE // rows.shape[-1]))]
        scale = torch.cat([scale for scale, _ in fitted]).unflatten(0, weight.shape[:-1])
        zeros = [zero for _, zero in fitted if zero is not None]
        return scale, torch.cat(zeros).unflatten(0, weight.shape[:-1]) if zeros else None

    def _search(self, rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        fmt = FORMATS[scheme.weight_format]
        scale, zero = fmt.fit(rows, scheme)
        assert scale is not None, f"{scheme} has scales"
        groups = split_groups(rows, scheme.group_size)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        least = self._error(rows, scheme, scale, zero)
        for step in range(1, self.grid + 1):
            part = 1 - step / self.grid
            if part <= self.lowest:
                break
            # the format fits the clipped weights: what a scale is, and how it is rounded, stays in one place
            clipped = join_groups(torch.clamp(groups, low * part, high * part), rows.shape[-1])
            narrow, shifted = fmt.fit(clipped, scheme)
            assert narrow is not None, f"{scheme} has scales"
            error = self._error(rows, scheme, narrow, shifted)
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, narrow, scale)
            if zero is not None and shifted is not None:
                zero = torch.where(better, shifted, zero)
        return scale, zero

    def _error(self, rows: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Sum |w - decoded|^exponent over each group, float64 [rows, groups], in units of its largest magnitude."""
        codes = FORMATS[scheme.weight_format].encode(rows, scheme, scale, zero)
        change = split_groups(rows - dequantize(Quantized(scheme, codes, scale, zero)), scheme.group_size)
        largest = split_groups(rows, scheme.group_size).abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
        return (change / largest).abs_().pow_(self.exponent).sum(-1, dtype=torch.float64)


rtn_mse = RtnMse()
