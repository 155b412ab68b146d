"""Codes as a bit stream without gaps, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mxmoe.quant.quantized import CODE_DTYPES, Packed, Quantized
from mxmoe.quant.scales import join_scales, split_scales

# after 8 codes of b bits the stream is back at a byte border, b bytes further: packing repeats with this period
PERIOD = 8


def pack(q: Quantized) -> Packed:
    """
    Pack codes along the input channels, each row on its own. Undone by `unpack`.

    Scales and zero points stay, but integer scales, which are split.
    """
    if q.codes.dtype != torch.uint8:  # a float is its own bits
        return Packed(q.scheme, q.n, q.k, q.codes.contiguous().view(torch.uint8), q.scale, q.zero)
    scale, multipliers = q.scale, None
    if q.scheme.integer_scales and scale is not None:
        scale, multipliers = split_scales(scale)
    return Packed(q.scheme, q.n, q.k, pack_codes(q.codes, q.scheme.weight_bits), scale, q.zero, multipliers)


def unpack(packed: Packed) -> Quantized:
    """Undo `pack`, bit for bit."""
    dtype = CODE_DTYPES[packed.scheme.weight_format]
    if dtype != torch.uint8:
        codes = packed.payload.contiguous().view(dtype)
    else:
        codes = unpack_codes(packed.payload, packed.scheme.weight_bits, packed.k)
    scale = packed.scale
    if packed.multipliers is not None and scale is not None:
        scale = join_scales(scale, packed.multipliers)
    return Quantized(packed.scheme, codes, scale, packed.zero)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., k] below 2^bits into uint8 bytes [..., ceil(k * bits / 8)]; unused bits are 0."""
    k = codes.shape[-1]
    periods = functional.pad(codes, (0, -k % PERIOD)).unflatten(-1, (-1, PERIOD))
    word = encode_word([periods[..., i].to(torch.int64) for i in range(PERIOD)], bits)
    stream = torch.stack([((word >> (8 * j)) & 0xFF).to(torch.uint8) for j in range(bits)], dim=-1)
    return stream.flatten(-2)[..., : -(-k * bits // 8)].contiguous()


def unpack_codes(payload: Tensor, bits: int, k: int) -> Tensor:
    """Undo `pack_codes`: uint8 bytes [..., ceil(k * bits / 8)] to uint8 codes [..., k]."""
    padded = functional.pad(payload, (0, -payload.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int32)
    codes = torch.empty((*padded.shape[:-1], PERIOD), dtype=torch.uint8, device=payload.device)
    for i in range(PERIOD):
        byte, shift = code_position(i, bits)
        # where the last code ends with the period its high byte is never used: any byte will do
        codes[..., i] = decode_code(padded[..., byte], padded[..., min(byte + 1, bits - 1)], shift, bits)
    return codes.flatten(-2)[..., :k].contiguous()


def encode_word(codes: Sequence[Any], bits: int) -> Any:  # noqa: ANN401  # int, Tensor or symbolic word: all have | and <<
    """Join 8 codes to the word whose `bits` low bytes are one period of the stream, first code lowest."""
    word = codes[0]
    for i in range(1, PERIOD):
        word = word | (codes[i] << (i * bits))
    return word


def code_position(index: int, bits: int) -> tuple[int, int]:
    """Byte and bit where code `index` of a row starts: code 3 at 3 bits -> byte 1, bit 1."""
    start = index * bits
    return start >> 3, start & 7


def decode_code(low: Any, high: Any, shift: Any, bits: Any) -> Any:  # noqa: ANN401  # int, Tensor or symbolic word alike
    """
    Read one code that starts at bit `shift` of byte `low` and may go on in the next byte, `high`.

    The one decode formula of the bit stream, for ints, arrays and symbolic words of at least 16 bits alike; a compiled
    backend may inline it. `high` does not matter when `shift + bits <= 8`, so nothing need be read past a row's end.
    low=0b11_010_001, high=0b0, shift=6, bits=3 -> 0b011.
    """
    return ((low | (high << 8)) >> shift) & ((1 << bits) - 1)
