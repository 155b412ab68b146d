"""GPTQ: every weight is rounded where it makes up for the errors that were made before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mxmoe.errors import BadOption
from mxmoe.ir import Scheme
from mxmoe.quant.formats import FORMATS
from mxmoe.quant.hessian import activation_order, checked_hessian, feedback
from mxmoe.quant.options import WithOptions
from mxmoe.quant.quantized import CODE_DTYPES, Quantized, scale_dtype
from mxmoe.quant.quantizers import Quantizer, find_quantizer, needs_hessian
from mxmoe.quant.rtn import checked_weight

# channels whose errors are fed forward one by one, before a product takes them to the rest of their block
_SMALL = 16


@dataclass(frozen=True)
class Gptq(WithOptions):
    """
    GPTQ (Frantar et al., ICLR 2023, algorithm 1); the quantizer "gptq".

    Minimises tr((W - Q) H (W - Q)^T) greedily, input channel by input channel: what rounding one channel breaks is
    given to the channels after it (`mxmoe.quant.hessian.feedback` has the formula). Codes, scales and zero points mean
    what they mean in "rtn". Every matrix of a stack [..., n, k] has its own Hessian; all are quantized together.

    Defined for every Hessian: one that is None or zero gives what the quantizer of the scales gives, "rtn" by default;
    a channel without input is rounded to nearest; a rank-deficient one is damped; one that still has no factor is
    treated as zero.
    Results of CPU and GPU agree up to codes whose weight lies near a rounding border.

    Memory: beside weight and result 4 k (k + 5 n) bytes for each matrix at work and 40 k^2 once; matrices are taken in
    parts of at most `max_gb`.

    Raises:
        BadOption: a damping, block or `max_gb` that is out of range, or scales of a quantizer that needs Hessians.
        UnknownName: scales of a quantizer that is not registered.
    """

    name: ClassVar[str] = "gptq"
    needs_hessian: ClassVar[bool] = True
    damping: float = 0.01
    """Added to the diagonal of H, in parts of its mean."""
    act_order: bool = True
    """Round channels with large inputs first. Codes stay in place, so that kernels see no difference."""
    static_groups: bool = True
    """Scales are of the original weight; else each group's are fitted when its turn comes, and with `act_order` groups
    are ordered as wholes. Integer scales are always of the original weight."""
    block: int = 128
    """Channels between two products with all that follows; with dynamic groups a block is a group."""
    scales: str = "rtn"
    """The quantizer that scales and zero points are taken from; "rtn_mse" and "hqq" pay at few bits."""
    max_gb: float = 8.0
    """10^9 bytes that the matrices at work may take; one matrix may exceed it."""

    def __post_init__(self) -> None:
        for option, fits, reason in (
            ("damping", 0 <= self.damping < math.inf, "it is at least 0"),
            ("block", self.block >= 1, "it is at least 1"),
            ("scales", not needs_hessian(self.scales), "it names a quantizer that works without Hessians"),
            ("max_gb", self.max_gb > 0, "it is positive"),
        ):
            if not fits:
                option_text = f"{option.replace('_', '-')}={getattr(self, option)}"
                raise BadOption(name=self.name, option=option_text, reason=reason)

    def __call__(
        self, weight: Tensor, scheme: Scheme, *, name: str = "weight", hessian: Tensor | None = None
    ) -> Quantized:
        """
        Quantize a weight [..., n, k] under Hessians [..., k, k], or one [k, k] for all, on any device.

        Raises:
            BadWeight, NonFiniteWeights, WeightsBeyondFormat: as `quantize`.
            BadHessian: a Hessian of another shape or dtype, or with NaN or infinity.
        """
        return self.each(weight, [scheme], name=name, hessian=hessian)[0]

    def each(
        self, weight: Tensor, schemes: Sequence[Scheme], *, name: str = "weight", hessian: Tensor | None = None
    ) -> list[Quantized]:
        """
        Quantize to several schemes, with what one call for each gives; Hessians are ordered and factored once.

        Takes k x k float32 more for each matrix at work where schemes have groups that are not static.
        """
        checked = [checked_weight(weight, scheme, name) for scheme in schemes]
        if not checked:
            return []
        dense = checked[0]
        hessians = None if hessian is None else checked_hessian(hessian, dense, name)
        parts: dict[Scheme, list[list[Tensor]]] = {}
        if hessians is not None and dense.numel():
            parts = {scheme: [] for scheme in schemes if not scheme.is_float}
            stack = dense.reshape(-1, *dense.shape[-2:])
            size = self._at_once(*dense.shape[-2:])
            for part, own in zip(stack.split(size), hessians.split(size), strict=True):
                factors = _Factors(self, part, own)
                for scheme, done in parts.items():
                    done.append(_Work(self, part, factors, scheme).run())
        plain = find_quantizer(self.scales)
        return [
            _joined(parts[scheme], scheme, dense.shape[:-1]) if scheme in parts else plain(dense, scheme, name=name)
            for scheme in schemes
        ]

    def _at_once(self, n: int, k: int) -> int:
        """Count the matrices [n, k] that `max_gb` has room for."""
        return max(1, int((self.max_gb * 1e9 - 40 * k * k) / (4 * k * (k + 5 * n))))


def _joined(parts: Sequence[Sequence[Tensor]], scheme: Scheme, shape: torch.Size) -> Quantized:
    """Put codes, scales and zero points of the parts of a stack [*shape, k] together."""
    codes, scale, *zero = (torch.cat(each).reshape(*shape, -1) for each in zip(*parts, strict=True))
    return Quantized(scheme, codes.view(CODE_DTYPES[scheme.weight_format]), scale, *zero)


class _Factors:
    """Orders of the channels of some matrices, and factors of their Hessians in these; each is found when asked for."""

    def __init__(self, options: Gptq, weight: Tensor, hessian: Tensor) -> None:
        """Take weight float32 [batch, n, k], hessian [batch, k, k]."""
        self.options, self.weight, self.hessian = options, weight, hessian
        self.found: dict[int | None, tuple[Tensor, Tensor]] = {}

    def of(self, group_size: int | None) -> tuple[Tensor, Tensor]:
        """Give order [batch, k] and feedback [batch, k, k]; a number orders groups of so many channels as wholes."""
        if not self.options.act_order:
            group_size = None
        if group_size not in self.found:
            batch, _, k = self.weight.shape
            device = self.weight.device
            order = torch.arange(k, device=device).expand(batch, k)
            if self.options.act_order:
                diagonal = self.hessian.diagonal(dim1=-2, dim2=-1).to(device)
                order = activation_order(diagonal, group_size)
            self.found[group_size] = order, feedback(self.hessian, order, self.options.damping, self.weight)
        return self.found[group_size]


class _Work:
    """Some matrices while they are rounded, channel by channel; everything is [batch, channel, n] here."""

    def __init__(self, options: Gptq, weight: Tensor, factors: _Factors, scheme: Scheme) -> None:
        """Order the weight, float32 [batch, n, k], and choose scales."""
        self.options = options
        self.scheme = scheme
        self.format = FORMATS[scheme.weight_format]
        self.plain: Quantizer = find_quantizer(options.scales)
        # one column is a weight of one channel with a scale of its own
        self.column = dataclasses.replace(scheme, group_size=None, integer_scales=False)
        batch, n, k = weight.shape
        # integer scales are multiples of the largest of their channel, which is not known before its last group
        self.is_dynamic = not (options.static_groups or scheme.group_size is None or scheme.integer_scales)
        self.order, self.feedback = factors.of(scheme.group_size if self.is_dynamic else None)
        self.group = self.order // (scheme.group_size or k)
        self.matrices = torch.arange(batch, device=weight.device)[:, None]
        self.weight = weight.mT[self.matrices, self.order].contiguous()
        self.codes = torch.empty(self.weight.shape, dtype=torch.uint8, device=weight.device)
        if self.is_dynamic:
            shape = (batch, scheme.n_groups(k), n)
            self.scale = torch.empty(shape, dtype=scale_dtype(scheme), device=weight.device)
            self.zero = None if scheme.symmetric else torch.empty_like(self.scale)
        else:
            scale, zero = self._fit(weight)
            self.scale, self.zero = scale.mT, None if zero is None else zero.mT

    def run(self) -> list[Tensor]:
        """Give codes [batch, n, k], as bytes, scale [batch, n, groups], and the zero point where there is one."""
        # errors take the place of the weights that they were made at
        errors = self.weight
        for start, end in self._blocks():
            target = errors[:, start:end]
            if start:
                target = torch.baddbmm(target, self.feedback[:, :start, start:end].mT, errors[:, :start])
            else:
                target = target.clone()
            self._block(start, end, target, *self._scales(start, end, target))
        codes = torch.empty_like(self.codes)
        codes[self.matrices, self.order] = self.codes
        return [part.mT.contiguous() for part in (codes, self.scale, self.zero) if part is not None]

    def _blocks(self) -> Iterator[tuple[int, int]]:
        k = self.weight.shape[1]
        size = self.scheme.group_size or k if self.is_dynamic else self.options.block
        return ((start, min(start + size, k)) for start in range(0, k, size))

    def _scales(self, start: int, end: int, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give scale and zero point of each channel of a block, float32 [batch, end - start, n]."""
        if self.is_dynamic:
            scale, zero = self._fit(self._moved(start, end, target).mT)
            group = self.group[:, start]
            self.scale[self.matrices[:, 0], group] = scale.squeeze(-1)
            if self.zero is not None and zero is not None:
                self.zero[self.matrices[:, 0], group] = zero.squeeze(-1)
        group = self.group[:, start:end]
        zero = None if self.zero is None else self.zero[self.matrices, group].float()
        return self.scale[self.matrices, group].float(), zero

    def _fit(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose scale and zero point [batch, n, groups] of weights [batch, n, k]."""
        plain = self.plain(weight, self.scheme)
        assert plain.scale is not None, f"{self.scheme} has scales"
        return plain.scale, plain.zero

    def _moved(self, start: int, end: int, target: Tensor) -> Tensor:
        """
        Give the weights of a block as the algorithm has moved them when it begins, [batch, end - start, n].

        They make up best for all errors so far. A target alone is not that: it counts on the errors of the channels
        before it within the block, which are then minus what these move by. Solved for all channels at once.
        """
        before = self.weight[:, start:end]
        inner = self.feedback[:, start:end, start:end].mT
        moves = torch.linalg.solve_triangular(inner, target - before, upper=False, unitriangular=True)
        return torch.where(moves.isfinite(), before + moves, target)

    def _block(self, start: int, end: int, target: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Round the channels of a block at their `target` [batch, end - start, n], which is used up."""
        inner = self.feedback[:, start:end, start:end]
        errors = self.weight[:, start:end]
        width = end - start
        for first in range(0, width, _SMALL):
            last = min(first + _SMALL, width)
            for i in range(first, last):
                shift = None if zero is None else zero[:, i, :, None]
                codes = self.format.encode(target[:, i, :, None], self.column, scale[:, i, :, None], shift)
                values = self.format.values(codes, self.column, shift).squeeze(-1)
                error = errors[:, i].addcmul_(values, scale[:, i], value=-1)
                self.codes[:, start + i] = codes.view(torch.uint8).squeeze(-1)
                if i + 1 < last:
                    target[:, i + 1 : last].addcmul_(inner[:, i, i + 1 : last, None], error[:, None])
            if last < width:
                target[:, last:].baddbmm_(inner[:, first:last, last:].mT, errors[:, first:last])


gptq = Gptq()
