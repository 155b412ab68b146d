"""
Weights as the kernels read them: every packing function with its inverse beside it.

All matrices of a GEMM lie in one arena of bytes, each at three addresses, for payload, scales and zero points. What the
bodies read (`bodies.py`): dense matrices row-major; packed ones in blocks of 64 output channels, and within a block in
units of 64 bytes a row, so that what a program loads together lies together. Where scales are integers, scales of
channels lie at the second address and multipliers of groups at the third.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mxmoe.errors import BadQuantized
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, join_scales, split_scales

ROWS = 64
"""Output channels of a block."""
PART = 64
"""Bytes of a row of a unit, and channels of a part of it."""
ALIGN = 256
"""Bytes; a tile's loads are then whole lines."""
AHEAD = ROWS
"""Scales behind the last group's: a body loads those of one unit ahead."""

KINDS = ("dense", "nibbles", "wide", "scaled")
"""Names of the bodies, in the order of their numbers in the kernel."""


def body_of(scheme: Scheme) -> str | None:
    """Name the body that runs a scheme, or None where none does."""
    if scheme.is_float:
        return "dense"
    wide_act = scheme.act_bits == 16
    if wide_act:
        fits = scheme.weight_bits in (2, 3, 4, 8) and scheme.group_size in (None, 32, 64, 128)
        return "wide" if fits else None
    if not scheme.symmetric:
        return None
    if scheme.weight_bits == 8 and scheme.act_bits == 8:
        return "dense" if scheme.group_size is None else None
    if scheme.integer_scales:
        fits = (scheme.weight_bits, scheme.act_bits, scheme.group_size) == (4, 8, 128)
        return "scaled" if fits else None
    if scheme.weight_bits == 4 and scheme.act_bits in (4, 8):
        return "nibbles" if scheme.group_size in (None, 128) else None
    return None


def unit_channels(scheme: Scheme) -> int:
    """Input channels of a unit: 128 at 4 bits; 3-bit codes go by 512, two units of low bits and one of high ones."""
    return 512 if scheme.weight_bits == 3 else 512 // scheme.weight_bits


def pack_payload(q: Quantized) -> Tensor:
    """
    Codes [n, k] as the body of their scheme reads them: uint8, flat.

    Raises:
        BadQuantized: a 4-bit code of -8 where e4m3 multiplies, whose sign and magnitude hold -7 to 7.
    """
    body = body_of(q.scheme)
    if body == "dense":
        codes = q.codes ^ 0x80 if q.scheme.weight_format == "int" else q.codes  # offset 128 -> two's complement
        return codes.contiguous().view(torch.uint8).flatten()
    blocks = -(-q.n // ROWS)
    channels = unit_channels(q.scheme)
    middle = 0 if body == "wide" else 8
    padded = functional.pad(q.codes, (0, -q.k % channels, 0, blocks * ROWS - q.n), value=middle)
    if body == "nibbles" and q.scheme.act_format == "e4m3":
        padded = _sign_magnitude(padded, q.scheme)
    # block, unit, row, channel
    units = padded.unflatten(1, (-1, channels)).unflatten(0, (blocks, ROWS)).transpose(1, 2)
    parts = units.unflatten(3, (-1, PART))
    if q.scheme.weight_bits == 3:
        high = _bits(parts >> 2, 1)
        low = [_bits(parts[..., half : half + 4, :] & 3, 2) for half in (0, 4)]
        return torch.stack([high, *low], dim=2).flatten().contiguous()
    if body == "nibbles" and q.scheme.act_format == "e4m3":
        low, high = parts[..., 0, :], parts[..., 1, :]
        mixed = ((low & 8) << 4) | (low & 7) | ((high & 8) << 3) | ((high & 7) << 3)
        return mixed.flatten().contiguous()
    return _bits(parts, q.scheme.weight_bits).flatten().contiguous()


def unpack_payload(payload: Tensor, scheme: Scheme, n: int, k: int) -> Tensor:
    """Undo `pack_payload`: codes [n, k] in the type of `Quantized.codes`."""
    body = body_of(scheme)
    if body == "dense":
        dtype = {"int": torch.uint8, "e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}
        codes = payload.view(dtype[scheme.weight_format]).view(n, k)
        return codes ^ 0x80 if scheme.weight_format == "int" else codes
    blocks, channels = -(-n // ROWS), unit_channels(scheme)
    units = -(-k // channels)
    if scheme.weight_bits == 3:
        words = payload.view(blocks, units, 3, ROWS, PART)
        low = torch.cat([_fields(words[:, :, 1 + half], 2) for half in range(2)], dim=-2)
        parts = low | (_fields(words[:, :, 0], 1) << 2)
    elif body == "nibbles" and scheme.act_format == "e4m3":
        b = payload.view(blocks, units, ROWS, PART)
        signed = torch.stack([((b >> 4) & 8) | (b & 7), ((b >> 3) & 8) | ((b >> 3) & 7)], dim=-2)
        parts = torch.where(signed & 8 != 0, 8 - (signed & 7), 8 + (signed & 7))
    else:
        parts = _fields(payload.view(blocks, units, ROWS, PART), scheme.weight_bits)
    rows = parts.flatten(3).transpose(1, 2).reshape(blocks * ROWS, units * channels)
    return rows[:n, :k].contiguous()


def pack_metas(q: Quantized) -> tuple[Tensor, Tensor]:
    """
    Pack what lies at a matrix's second and third address: scales, and zero points or multipliers; flat bytes.

    Of groups it is [n block, group, 64], of channels [n block, 64]; empty where there is nothing.
    """
    none = torch.empty(0, dtype=torch.uint8)
    if q.scale is None:
        return none, none
    if q.scheme.integer_scales:
        channel, multipliers = split_scales(q.scale)
        return _by_group(channel, None, q.k), _by_group(multipliers, q.scheme, q.k)
    scheme = None if q.scheme.group_size is None else q.scheme
    return _by_group(q.scale, scheme, q.k), none if q.zero is None else _by_group(q.zero, scheme, q.k)


def unpack_metas(first: Tensor, second: Tensor, scheme: Scheme, n: int, k: int) -> tuple[Tensor, ...]:
    """Undo `pack_metas`: the scale [n, groups], and the zero point if there is one; nothing for a float scheme."""
    if scheme.is_float:
        return ()
    groups = _groups(scheme, k)
    if scheme.integer_scales:
        multipliers = _from_groups(second, n, groups)[:, : scheme.n_groups(k)]
        return (join_scales(_from_groups(first.view(torch.float32), n, 1), multipliers.contiguous()),)
    dtype = torch.float32 if scheme.group_size is None else torch.bfloat16
    held = (first,) if scheme.symmetric else (first, second)
    return tuple(_from_groups(one.view(dtype), n, groups)[:, : scheme.n_groups(k)].contiguous() for one in held)


def _by_group(meta: Tensor, scheme: Scheme | None, k: int) -> Tensor:
    """[n, groups] -> bytes of [n block, group, 64] and what is `AHEAD`; without a scheme one number a channel."""
    groups, ahead = (_groups(scheme, k), AHEAD) if scheme is not None else (1, 0)
    padded = functional.pad(meta, (0, groups - meta.shape[1], 0, -len(meta) % ROWS))
    tiled = padded.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
    return functional.pad(tiled.flatten(), (0, ahead)).view(torch.uint8)


def _from_groups(tiled: Tensor, n: int, groups: int) -> Tensor:
    """Undo `_by_group`: [n, groups]."""
    blocks = -(-n // ROWS)
    return tiled[: blocks * groups * ROWS].view(blocks, groups, ROWS).transpose(1, 2).reshape(-1, groups)[:n]


def meta_bytes(scheme: Scheme, n: int, k: int) -> tuple[int, int]:
    """Bytes at a matrix's second and third address in an arena: scales, and zero points or multipliers."""
    if scheme.is_float:
        return 0, 0
    channels = -(-n // ROWS) * ROWS
    grouped = channels * _groups(scheme, k) + AHEAD
    if scheme.integer_scales:
        return 4 * channels, grouped
    held = 4 * channels if scheme.group_size is None else 2 * grouped
    return held, 0 if scheme.symmetric else held


def payload_bytes(scheme: Scheme, n: int, k: int) -> int:
    """Bytes of the codes of a matrix in an arena."""
    if body_of(scheme) == "dense":
        return n * k * scheme.weight_bits // 8
    blocks, units = -(-n // ROWS), -(-k // unit_channels(scheme))
    return blocks * units * ROWS * PART * (3 if scheme.weight_bits == 3 else 1)


def _groups(scheme: Scheme, k: int) -> int:
    """Scales of a row once k is padded to whole units."""
    if scheme.group_size is None:
        return 1
    channels = unit_channels(scheme)
    return max(-(-k // channels) * channels // scheme.group_size, scheme.n_groups(k))


def _bits(parts: Tensor, bits: int) -> Tensor:
    """Join parts [..., part, 64] of codes below 2^bits, the first lowest, to bytes [..., 64]."""
    word = parts[..., 0, :]
    for i in range(1, 8 // bits):
        word = word | (parts[..., i, :] << (bits * i))
    return word


def _fields(words: Tensor, bits: int) -> Tensor:
    """Undo `_bits`."""
    return torch.stack([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)], dim=-2)


def _sign_magnitude(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes 1 to 15, offset 8 -> bit 3 the sign, bits 2..0 the magnitude."""
    if bool((codes == 0).any()):
        raise BadQuantized(scheme=scheme, reason="a code is -8, and e4m3 operands are made of -7 to 7")
    return torch.where(codes < 8, 8 | (8 - codes), codes - 8)


@dataclass(frozen=True, eq=False)
class Arena:
    """All matrices of one GEMM, as bytes."""

    n: int
    k: int
    schemes: tuple[Scheme, ...]
    """[lane]; every matrix of a lane has its scheme."""
    matrices: int
    """Matrices that share the rows: 2 for gate and up together."""
    data: Tensor
    """uint8."""
    base: Tensor
    """
    int64 [matrices, lanes, 3], on the device of `data`: bytes at which payload, scales, and zero points or multipliers
    begin.
    """
    starts: tuple[tuple[int, int, int], ...]
    """The same on the host, by matrix and lane."""

    def read(self, matrix: int, lane: int) -> Quantized:
        """Give one matrix back as it was put in."""
        scheme = self.schemes[lane]
        payload, scale, zero = self.starts[matrix * len(self.schemes) + lane]
        codes = self.data[payload : payload + payload_bytes(scheme, self.n, self.k)]
        held = zip((scale, zero), meta_bytes(scheme, self.n, self.k), strict=True)
        first, second = (self.data[at : at + size].clone() for at, size in held)
        metas = unpack_metas(first, second, scheme, self.n, self.k)
        return Quantized(scheme, unpack_payload(codes.clone(), scheme, self.n, self.k), *metas)


def allocate_arena(
    n: int,
    k: int,
    schemes: Sequence[Scheme],
    matrices: int,
    room: torch.device | str | Tensor,
    apart: Collection[Scheme] = (),
) -> Arena:
    """
    Make room for every matrix, on a device or in `arena_bytes` of a larger room; `put` fills it.

    Matrices whose scheme is `apart` lie elsewhere, and take none.
    """
    starts, size = _starts(n, k, schemes, matrices, apart)
    data = room if isinstance(room, Tensor) else torch.zeros(size, dtype=torch.uint8, device=room)
    base = torch.tensor(starts, dtype=torch.int64).view(matrices, len(schemes), 3)
    return Arena(n, k, tuple(schemes), matrices, data, base.to(data.device), tuple(starts))


def arena_bytes(n: int, k: int, schemes: Sequence[Scheme], matrices: int) -> int:
    """Bytes of an arena; a multiple of ALIGN."""
    return _starts(n, k, schemes, matrices, ())[1]


def _starts(
    n: int, k: int, schemes: Sequence[Scheme], matrices: int, apart: Collection[Scheme]
) -> tuple[list[tuple[int, int, int]], int]:
    """Bytes at which payload, scales and zero points of every matrix begin, and where all end."""
    starts: list[tuple[int, int, int]] = []
    end = 0
    for _ in range(matrices):
        for scheme in schemes:
            sizes = (payload_bytes(scheme, n, k), *meta_bytes(scheme, n, k))
            sizes = (0, 0, 0) if scheme in apart else sizes
            at: list[int] = []
            for size in sizes:
                at.append(end)
                end += -(-size // ALIGN) * ALIGN
            starts.append((at[0], at[1], at[2]))
    return starts, end + ALIGN


def put(arena: Arena, matrix: int, lane: int, q: Quantized) -> None:
    """Write one matrix into its place."""
    pieces = (pack_payload(q), *pack_metas(q))
    for at, piece in zip(arena.starts[matrix * len(arena.schemes) + lane], pieces, strict=True):
        arena.data[at : at + len(piece)] = piece
