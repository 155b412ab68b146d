"""Half-quadratic quantization: scales and zero points that minimise a sparse norm of the weight's own error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mxmoe.errors import BadOption
from mxmoe.ir import Scheme
from mxmoe.quant.formats import FORMATS
from mxmoe.quant.multiples import with_multiples
from mxmoe.quant.options import WithOptions
from mxmoe.quant.quantized import Quantized, scale_dtype
from mxmoe.quant.rtn import checked_weight, quantize
from mxmoe.quant.scales import LARGEST, SMALLEST, join_groups, round_down, split_groups

ELEMENTS_AT_ONCE = 1 << 24
"""Weights that are worked on together: bounds the memory of temporaries to a few hundred megabytes."""


@dataclass(frozen=True)
class Hqq(WithOptions):
    """
    The quantizer "hqq": round to nearest under scales and zero points found by half-quadratic splitting, without data.

    Minimises, in each group, `sum |w - s (c - z)|^p` (Badri and Shaji, Half-Quadratic Quantization, 2023, eq. 1), which
    for p < 1 lets a few large weights go in favour of all others. With r = w / s - (c - z), the error in steps:

        e = sign(r) max(0, |r| - |r|^(p - 1) / beta)     the error that is let go (eq. 4)
        z = mean(c - (w / s - e))                        the best zero point for the rest (eq. 5)

    in turns, beta growing by kappa. Errors are counted in steps and not in units of the weight as there, so that a
    weight and its multiple get the same codes; and with `refine_scale` the scale moves as well, to the least-squares
    line through codes and `w - s e`, which is what makes 1 to 3 bits usable. Scale and zero point are rounded to the
    type that stores them before codes are chosen. The best of all rounds is kept for each group, and round to nearest
    is one of them: no group is worse than with "rtn" in the norm above.

    Zero points are fractions in asymmetric weight-only schemes, and whole numbers where activations are quantized too.
    Symmetric schemes have none, so that their scale alone is refined. Integer scales are those of the same scheme
    without, rounded up to multiples; a channel that would get worse than with "rtn" by it keeps those of "rtn". e4m3
    weights, whose codes are no line, and 16-bit weights are quantized as by "rtn". `hessian` is not used. A stack gives
    what its matrices give one by one.

    Raises:
        BadOption: a field out of its range.
    """

    name: ClassVar[str] = "hqq"

    p: float = 0.7
    """Exponent of the norm, above 0 and at most 2."""
    beta: float = 10.0
    """How much of an error counts at first, above 0; larger ones let go less."""
    kappa: float = 1.01
    """What beta is multiplied with in each round, at least 1."""
    iterations: int = 20
    """Rounds, at least 0; it ends sooner where nothing moves any more."""
    refine_scale: bool = True
    """Move the scale of asymmetric weights too; without, it spans the range of its group as in the paper."""

    def __post_init__(self) -> None:
        wrong = {
            "p": not 0 < self.p <= 2,
            "beta": not self.beta > 0,
            "kappa": not self.kappa >= 1,
            "iterations": self.iterations < 0,
        }
        ranges = {"p": "above 0 and at most 2", "beta": "above 0", "kappa": "at least 1", "iterations": "at least 0"}
        for field, is_wrong in wrong.items():
            if is_wrong:
                option = f"{field}={getattr(self, field)}"
                raise BadOption(name="hqq", option=option, reason=f"it must be {ranges[field]}")

    def __call__(
        self, weight: Tensor, scheme: Scheme, *, name: str = "weight", hessian: Tensor | None = None
    ) -> Quantized:
        """
        Quantize a weight [..., n, k].

        Raises:
            BadWeight, NonFiniteWeights, WeightsBeyondFormat: as round to nearest.
        """
        del hessian
        dense = checked_weight(weight, scheme, name)
        if scheme.integer_scales:
            free = self(dense, dataclasses.replace(scheme, integer_scales=False), name=name)
            assert free.scale is not None, f"{scheme} has scales"
            return with_multiples(dense, scheme, free.scale, self.p)
        nearest = quantize(dense, scheme, name=name)
        if scheme.weight_format != "int" or not dense.numel():
            return nearest
        assert nearest.scale is not None, f"{scheme} has a scale"
        rows = dense.reshape(-1, dense.shape[-1])
        scale = nearest.scale.reshape(len(rows), -1)
        zero = None if nearest.zero is None else nearest.zero.reshape(len(rows), -1)
        step = max(1, ELEMENTS_AT_ONCE // rows.shape[1])
        parts = [
            self._fit(
                rows[at : at + step], scheme, scale[at : at + step], None if zero is None else zero[at : at + step]
            )
            for at in range(0, len(rows), step)
        ]
        best_scale = torch.cat([part[0] for part in parts]).reshape(nearest.scale.shape)
        best_zero = None
        if nearest.zero is not None:
            best_zero = torch.cat([part[1] for part in parts if part[1] is not None]).reshape(nearest.zero.shape)
        codes = FORMATS["int"].encode(dense, scheme, best_scale, best_zero)
        return Quantized(scheme, codes, best_scale, best_zero)

    def _fit(self, rows: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Find scales and zero points [rows, groups] for rows [rows, k], starting from those of round to nearest."""
        groups = _Groups.of(rows, scheme, scale)
        best, best_zero = scale, zero
        best_error = groups.residual(groups.codes(scale, zero)[1], scale).abs().pow(self.p).sum(-1)
        now, now_zero = (scale, None) if zero is None else groups.tightest()
        beta = self.beta
        settled = torch.zeros_like(best_error, dtype=torch.bool)
        for _ in range(self.iterations):
            codes, values = groups.codes(now, now_zero)
            residual = groups.residual(values, now)
            powers = residual.abs().pow(self.p)
            error = powers.sum(-1)
            better = error < best_error  # NaN is never better
            best, best_error = torch.where(better, now, best), torch.where(better, error, best_error)
            if best_zero is not None and now_zero is not None:
                best_zero = torch.where(better, now_zero, best_zero)
            kept = groups.kept(residual, powers, now, beta, self.p)
            moved, moved_zero = groups.refit(codes, values, kept, now, now_zero, with_scale=self.refine_scale)
            # a group that settled stays, so that it does not matter which other groups are worked on with it
            settled |= (moved == now) if moved_zero is None else (moved == now) & (moved_zero == now_zero)
            if bool(settled.all()):
                break
            now = torch.where(settled, now, moved)
            if now_zero is not None and moved_zero is not None:
                now_zero = torch.where(settled, now_zero, moved_zero)
            beta *= self.kappa
        return best, best_zero


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Rows cut in groups, counted in steps of round to nearest so that no magnitude of weights leaves float32."""

    scheme: Scheme
    k: int
    """Weights in a row."""
    weight: Tensor
    """Float32 [rows, groups, size], zeros behind a short group."""
    mask: Tensor
    """[groups, size], 1 for weights and 0 behind them."""
    unit: Tensor
    """Float32 [rows, groups, 1]: one step of round to nearest."""

    @classmethod
    def of(cls, rows: Tensor, scheme: Scheme, scale: Tensor) -> _Groups:
        unit = scale.float().unsqueeze(-1)
        mask = split_groups(torch.ones_like(rows[:1]), scheme.group_size)[0]
        return cls(scheme, rows.shape[1], split_groups(rows, scheme.group_size), mask, torch.where(unit > 0, unit, 1.0))

    def tightest(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point that span exactly the range of each group, which need not include zero."""
        high = torch.where(self.mask > 0, self.weight, -torch.inf).amax(-1).double()
        low = torch.where(self.mask > 0, self.weight, torch.inf).amin(-1).double()
        wide = (high - low) / (2**self.scheme.weight_bits - 1)
        scale = self.storable(torch.where(wide > 0, wide, self.unit.squeeze(-1).double()))
        return scale, self.storable_zero(-low / scale.double())

    def codes(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """The nearest codes [rows, groups, size] and the numbers that they stand for, `code - zero`, in float32."""
        fmt = FORMATS["int"]
        codes = fmt.encode(join_groups(self.weight, self.k), self.scheme, scale, zero)
        values = split_groups(fmt.values(codes, self.scheme, zero), self.scheme.group_size)
        return split_groups(codes, self.scheme.group_size).float(), values

    def residual(self, values: Tensor, scale: Tensor) -> Tensor:
        """
        What is left of each weight, in units; 0 behind a short group.

        In float64: the last bits of float32 powers depend on where in memory a number lies.
        """
        # decoded in float32, as `dequantize` does: what it rounds is part of the error
        error = self.weight - values * scale.float().unsqueeze(-1)
        return error.double() / self.unit * self.mask

    def kept(self, residual: Tensor, powers: Tensor, scale: Tensor, beta: float, p: float) -> Tensor:
        """What the codes should stand for, in units: the weight without the part of its error that is let go."""
        size = residual.abs()
        # |r|^(p - 1) / beta with r in steps of this scale, times the step
        shrunk = powers / size * (scale.double().unsqueeze(-1) / self.unit).pow(2 - p) / beta
        gone = torch.where(size > 0, residual.sign() * (size - shrunk).clamp(min=0), 0.0)
        return self.weight.double() / self.unit - gone

    def refit(
        self, codes: Tensor, values: Tensor, kept: Tensor, scale: Tensor, zero: Tensor | None, *, with_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point that bring `scale * (code - zero)` closest to `kept`, as they can be stored."""
        unit, count = self.unit.squeeze(-1).double(), self.mask.sum(-1).double()
        target = kept * self.mask
        if zero is None:
            squares = (values.double().square() * self.mask).sum(-1)
            slope = (target * values).sum(-1) / squares
            return self.storable(_positive(slope, scale.double() / unit) * unit), None
        x = codes.double() * self.mask
        mean_x, mean_y = x.sum(-1) / count, target.sum(-1) / count
        step = scale.double()
        if with_scale:
            apart = (x - mean_x.unsqueeze(-1)) * self.mask
            slope = (apart * target).sum(-1) / apart.square().sum(-1)
            step = self.storable(_positive(slope, step / unit) * unit).double()
        return step.to(scale.dtype), self.storable_zero(mean_x - mean_y * unit / step)

    def storable(self, scale: Tensor) -> Tensor:
        """Round positive float64 scales to the nearest number of their type that keeps every decoded weight finite."""
        dtype = scale_dtype(self.scheme)
        steps = 2**self.scheme.weight_bits - 1
        highest = round_down(torch.tensor(LARGEST / steps, dtype=torch.float64), dtype).item()
        return scale.clamp(SMALLEST, highest).to(torch.float32).to(dtype)

    def storable_zero(self, zero: Tensor) -> Tensor:
        """Round float64 zero points to their type, and to a code where an integer accumulator subtracts them."""
        if not self.scheme.is_weight_only:
            zero = zero.round().clamp(0, 2**self.scheme.weight_bits - 1)
        return zero.to(torch.float32).to(scale_dtype(self.scheme))


def _positive(slope: Tensor, otherwise: Tensor) -> Tensor:
    """Take a slope where there is one: a group of one code has none, and codes never run against their weights."""
    return torch.where(slope.isfinite() & (slope > 0), slope, otherwise)


hqq = Hqq()
"""The quantizer with its default options."""
