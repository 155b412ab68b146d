"""The two values of this package: a quantized weight with one code per element, and the same weight packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxmoe.errors import BadPacked, BadQuantized
from mxmoe.ir import Scheme
from mxmoe.quant.scales import LARGEST_MULTIPLIER, are_multiples

CODE_DTYPES = {"int": torch.uint8, "e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}


def scale_dtype(scheme: Scheme) -> torch.dtype:
    """Type of a scale and zero point: float32 per channel and where scales are integer, bfloat16 in other groups."""
    return torch.float32 if scheme.group_size is None or scheme.integer_scales else torch.bfloat16


def n_payload_bytes(k: int, scheme: Scheme) -> int:
    """Bytes of one packed row of `k` codes; k=5 at 3 bits -> 2."""
    return -(-k * scheme.weight_bits // 8)


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """
    A weight matrix, or a stack of them, as codes and scales; its value is `scale * (code - zero)`.

    Built and checked in one step, so that every `Quantized` that exists is well-formed. A 4 x 256 weight in
    w4a16_g128_asym has codes [4, 256], scale [4, 2] and zero [4, 2].

    Raises:
        BadQuantized: a shape or dtype that does not fit the scheme, a fractional zero point where activations are
            quantized too, or integer scales that are not 1 to 16 times a sixteenth of their channel's largest.
    """

    scheme: Scheme
    """What the codes mean."""
    codes: Tensor
    """[..., n, k]; uint8 for integers, float8_e4m3fn, or the bfloat16 / float16 weights themselves."""
    scale: Tensor | None = None
    """[..., n, groups], of `scale_dtype`, at least 0; None for a float scheme. `split_scales` has the whole numbers of
    integer scales."""
    zero: Tensor | None = None
    """Like `scale`; None unless asymmetric. Integers held as floats; a weight-only scheme takes fractions too."""

    def __post_init__(self) -> None:
        reason = _fault(self)
        if reason:
            raise BadQuantized(scheme=self.scheme, reason=reason)

    @property
    def n(self) -> int:
        """Output channels."""
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        """Input channels."""
        return self.codes.shape[-1]

    def __getitem__(self, index: int | slice) -> Quantized:
        """Select matrices along the first axis of a stack, without copying."""
        if self.codes.dim() < 3:
            raise BadQuantized(scheme=self.scheme, reason="one matrix cannot be indexed, only a stack")
        scale = None if self.scale is None else self.scale[index]
        zero = None if self.zero is None else self.zero[index]
        return Quantized(self.scheme, self.codes[index], scale, zero)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """
    A quantized weight as it lies in a file and in memory: no unused bit except at the end of a row.

    Each row of `payload` is a little-endian bit stream: code `i` takes bits `[i * bits, (i + 1) * bits)`, bit `b`
    being bit `b % 8` of byte `b // 8`. Codes 1, 2, 3 at 3 bits -> 0b011_010_001 -> bytes 209, 0.

    Raises:
        BadPacked: the payload does not have the bytes that scheme, n and k ask for, or has no multipliers where the
            scheme has some, or the other way round.
    """

    scheme: Scheme
    """What the codes mean."""
    n: int
    """Output channels."""
    k: int
    """Input channels."""
    payload: Tensor
    """uint8 [..., n, ceil(k * bits / 8)]."""
    scale: Tensor | None = None
    """As in `Quantized`; of integer scales the channel scales [..., n, 1], see `split_scales`."""
    zero: Tensor | None = None
    """As in `Quantized`."""
    multipliers: Tensor | None = None
    """uint8 [..., n, groups] of integer scales; None for other schemes."""

    def __post_init__(self) -> None:
        wanted = (self.n, n_payload_bytes(self.k, self.scheme))
        found = tuple(self.payload.shape[-2:])
        if found != wanted or self.payload.dtype != torch.uint8:
            reason = f"the payload is {self.payload.dtype} {list(found)}, not torch.uint8 {list(wanted)}"
            raise BadPacked(scheme=self.scheme, reason=reason)
        if (self.multipliers is not None) != self.scheme.integer_scales:
            raise BadPacked(scheme=self.scheme, reason=f"it {_has(self.multipliers)} multipliers")

    @property
    def nbytes(self) -> int:
        """Bytes of payload, scales, multipliers and zero points."""
        return sum(t.nbytes for t in (self.payload, self.scale, self.zero, self.multipliers) if t is not None)


def _has(tensor: Tensor | None) -> str:
    return "has no" if tensor is None else "takes no"


def _fault(q: Quantized) -> str | None:
    """Say what does not fit, or None."""
    scheme, codes = q.scheme, q.codes
    if codes.dim() < 2 or codes.shape[-1] < 1:
        return f"codes have shape {list(codes.shape)}, not [..., n, k]"
    if codes.dtype != CODE_DTYPES[scheme.weight_format]:
        return f"codes are {codes.dtype}, not {CODE_DTYPES[scheme.weight_format]}"
    for what, tensor, wanted in (("scale", q.scale, scheme.scale_bits > 0), ("zero", q.zero, not scheme.symmetric)):
        if (tensor is not None) != wanted:
            return f"it {_has(tensor)} {what}"
        shape = (*codes.shape[:-1], scheme.n_groups(codes.shape[-1]))
        if tensor is not None and (tensor.dtype != scale_dtype(scheme) or tensor.shape != shape):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            return f"its {what} is {found}, not {scale_dtype(scheme)} {list(shape)}"
    # an integer accumulator can only subtract an integer; decoding to floats first can subtract anything
    if q.zero is not None and not scheme.is_weight_only and bool((q.zero != q.zero.round()).any()):
        return "its zero points are fractions, which only weight-only schemes take"
    if scheme.integer_scales and q.scale is not None and not are_multiples(q.scale):
        return f"its scales are not 1 to {LARGEST_MULTIPLIER} times a sixteenth of the largest of their channel"
    return None
