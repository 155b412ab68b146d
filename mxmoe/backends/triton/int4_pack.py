"""
Where the 4-bit numbers of a product lie in memory, so that a lane of a warp reads its registers with 16-byte loads.

The instruction is mma.m16n8k64 on s4 (PTX ISA, matrix fragments for mma.m16n8k64): with lane = 4 g + t, register
`rh + 2 q` of the left operand holds row g + 8 rh and channels 32 q + 8 t to 32 q + 8 t + 7, lowest bits first; register
q of the right operand holds column g and the same channels. Two instructions make a step of 128 channels, h = 0 and 1.

    weights       int32 [experts, n / 16, steps, h, g, t, q, rh]    left operand: rows are output channels
    activations   int32 [rows, steps, t, h, q]                      right operand: any 8 rows, sorted or gathered
    weight scale  [experts, groups, n / 16, g, rh]
    row scale     float32 [rows, groups]

Output channels are padded to 16 with scale 0 and input channels to 128 with code 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from mxmoe.errors import BadInt4
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, quantize_activation

STEP = 128
"""Input channels of a step, and of a group."""
ZERO_CODE = 8
"""Weight code of the value 0 (symmetric 4 bits): the signed number is code - 8."""
NIBBLES = 8
"""4-bit numbers of a word."""


def runs_on_int4(scheme: Scheme) -> bool:
    """Whether a scheme's products are INT4 x INT4 with scales per channel or per 128 channels: w4a4, symmetric."""
    bits = (scheme.weight_bits, scheme.act_bits, scheme.act_format)
    return bits == (4, 4, "int") and scheme.symmetric and scheme.group_size in (None, STEP)


@dataclass(frozen=True, slots=True, eq=False)
class PackedInt4:
    """
    The weights of some experts, packed for the INT4 kernel; made by `pack_int4`, undone by `unpack_int4`.

    512 x 1024 in w4a4_g128_sym, two experts: words [2, 32, 8, 2, 32, 4], scale [2, 8, 512] bfloat16.
    """

    scheme: Scheme
    n: int
    """Output channels, without padding."""
    k: int
    """Input channels, without padding."""
    words: Tensor
    """int32 [experts, fragments, steps, 2, 32, 4]; a fragment is 16 output channels."""
    scale: Tensor
    """[experts, groups, fragments * 16]; bfloat16 in groups, float32 per channel."""

    @property
    def steps(self) -> int:
        """Steps of 128 input channels."""
        return self.words.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales, padding included."""
        return self.words.nbytes + self.scale.nbytes


def pack_int4(weights: Sequence[Quantized]) -> PackedInt4:
    """
    Pack weights [n, k] of equal shape and scheme, one for each expert.

    Raises:
        BadInt4: no weight, a scheme that INT4 units cannot run, or shapes or schemes that differ.
    """
    if not weights:
        raise BadInt4(reason="there is no weight to pack")
    first = weights[0]
    kinds = {(str(q.scheme), q.n, q.k) for q in weights}
    if len(kinds) > 1 or not runs_on_int4(first.scheme) or first.codes.dim() != 2:
        raise BadInt4(reason=f"weights are {sorted(kinds)}; all are [n, k] alike, in w4a4_sym or w4a4_g128_sym")
    codes = torch.stack([q.codes for q in weights]).to(torch.int8) - ZERO_CODE
    padded = functional.pad(codes, (0, -first.k % STEP, 0, -first.n % 16))
    fields = _words(padded.unflatten(-2, (-1, 2, 8)).unflatten(-1, (-1, 2, 2, 4, NIBBLES)))  # e f rh g s h q t
    words = fields.permute(0, 1, 4, 5, 3, 7, 6, 2).flatten(-2).flatten(-3, -2).contiguous()
    scale = torch.stack([q.scale for q in weights if q.scale is not None]).transpose(-1, -2)
    return PackedInt4(first.scheme, first.n, first.k, words, pack_channels(scale))


def allocate_int4(scheme: Scheme, n: int, k: int, experts: int, device: torch.device | str) -> PackedInt4:
    """Make room for the weights [n, k] of some experts; what lies in it is undefined."""
    fragments, steps = -(-n // 16), -(-k // STEP)
    groups, dtype = (1, torch.float32) if scheme.group_size is None else (steps, torch.bfloat16)
    words = torch.empty((experts, fragments, steps, 2, 32, 4), dtype=torch.int32, device=device)
    return PackedInt4(scheme, n, k, words, torch.empty((experts, groups, fragments * 16), dtype=dtype, device=device))


def unpack_int4(packed: PackedInt4) -> list[Quantized]:
    """Undo `pack_int4`, bit for bit."""
    fields = packed.words.unflatten(-1, (2, 2)).unflatten(-3, (8, 4))  # e f s h g t q rh
    values = _nibbles(fields.permute(0, 1, 7, 4, 2, 3, 6, 5))
    codes = (values.flatten(-5).flatten(1, 3) + ZERO_CODE).to(torch.uint8)[:, : packed.n, : packed.k].contiguous()
    scale = unpack_channels(packed.scale, packed.n).transpose(-1, -2).contiguous()
    return [Quantized(packed.scheme, c, s) for c, s in zip(codes, scale, strict=True)]


def pack_channels(values: Tensor) -> Tensor:
    """Order scales or biases [..., n] of output channels as lanes read them: [..., fragments * 16], padded with 0."""
    padded = functional.pad(values, (0, -values.shape[-1] % 16))
    return padded.unflatten(-1, (-1, 2, 8)).transpose(-1, -2).flatten(-3).contiguous()


def unpack_channels(values: Tensor, n: int) -> Tensor:
    """Undo `pack_channels`: [..., n]."""
    return values.unflatten(-1, (-1, 8, 2)).transpose(-1, -2).flatten(-3)[..., :n].contiguous()


def pair(gate: Tensor, up: Tensor, dim: int = -1) -> Tensor:
    """
    Put 16 channels of gate and 16 of up in turn, along an axis of n channels, so that a lane holds both of a channel.

    For weights (codes and scales along their axis -2) and biases alike; `pack_int4_pair` does it for weights. Undone by
    `unpair`.

    Raises:
        BadInt4: n is no multiple of 16.
    """
    if gate.shape[dim] % 16:
        raise BadInt4(reason=f"gate and up have {gate.shape[dim]} channels, in turn they go in sixteens")
    halves = [one.unflatten(dim, (-1, 16)) for one in (gate, up)]
    at = dim % gate.dim()
    return torch.stack(halves, dim=at + 1).flatten(at, at + 2)


def unpair(values: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pair` along the last axis."""
    turns = values.unflatten(-1, (-1, 2, 16))
    return turns[..., 0, :].flatten(-2), turns[..., 1, :].flatten(-2)


def pack_int4_pair(gates: Sequence[Quantized], ups: Sequence[Quantized]) -> PackedInt4:
    """
    Pack gate and up of each expert as one weight of twice the channels, for a fused activation; see `pair`.

    Raises:
        BadInt4: as `pack_int4`, or an odd number of channels.
    """
    both: list[Quantized] = []
    for gate, up in zip(gates, ups, strict=True):
        if gate.scale is None or up.scale is None or gate.scheme != up.scheme:
            raise BadInt4(reason=f"gate is in {gate.scheme} and up in {up.scheme}; packed together, they are alike")
        both.append(Quantized(gate.scheme, pair(gate.codes, up.codes, -2), pair(gate.scale, up.scale, -2)))
    return pack_int4(both)


def pack_rows(codes: Tensor) -> Tensor:
    """
    Pack activation codes, int8 [rows, k] from -8 to 7, into int32 [rows, steps * 16] in one launch.

    Undone by `unpack_rows`. A row that is quantized elsewhere (after a rotation, say) comes in here.
    """
    rows, k = codes.shape
    steps = -(-k // STEP)
    words = torch.empty((rows, steps * STEP // NIBBLES), dtype=torch.int32, device=codes.device)
    if rows:
        blocks = -(-steps // QUANTIZE_STEPS)
        _launch(_pack_kernel, (rows, blocks), codes.contiguous(), words, k, steps, QUANTIZE_STEPS)
    return words


def pack_rows_torch(codes: Tensor) -> Tensor:
    """`pack_rows`, by the definition of the fragments."""
    padded = functional.pad(codes, (0, -codes.shape[-1] % STEP))
    fields = _words(padded.unflatten(-1, (-1, 2, 2, 4, NIBBLES)))  # rows s h q t
    return fields.permute(0, 1, 4, 2, 3).flatten(1).contiguous()


def unpack_rows(words: Tensor, k: int) -> Tensor:
    """Undo `pack_rows`: int8 [rows, k]."""
    fields = words.unflatten(-1, (-1, 4, 2, 2)).permute(0, 1, 3, 4, 2)
    return _nibbles(fields).flatten(1)[:, :k].to(torch.int8).contiguous()


def quantize_rows(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """
    Quantize activations [rows, k] to INT4 and pack them, in one launch; the numbers are those of `quantize_activation`.

    Returns:
        int32 [rows, steps * 16], and float32 scales [rows, groups], one group where the scheme has one scale per token.

    Raises:
        BadInt4: a scheme that INT4 units cannot run.
    """
    if not runs_on_int4(scheme):
        raise BadInt4(reason=f"{scheme} has no INT4 activations with one scale per token or 128 channels")
    rows, k = x.shape
    steps, grouped = -(-k // STEP), scheme.group_size is not None
    words = torch.empty((rows, steps * STEP // NIBBLES), dtype=torch.int32, device=x.device)
    scale = torch.empty((rows, steps if grouped else 1), dtype=torch.float32, device=x.device)
    blocks = -(-steps // QUANTIZE_STEPS)
    if rows:
        sizes = (k, steps, blocks, grouped, QUANTIZE_STEPS)
        _launch(_quantize_kernel, (rows, blocks if grouped else 1), x.contiguous(), words, scale, *sizes)
    return words, scale


def quantize_rows_torch(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """`quantize_rows`, by the definition."""
    codes, scale = quantize_activation(x, scheme)
    return pack_rows_torch(codes), scale


QUANTIZE_STEPS = 8
"""Steps that a program of the quantizing kernel holds at once."""
# a float32 below 2^22 plus this has no bits left for a fraction: the sum is rounded, halves to even
_ROUNDER = tl.constexpr(12582912.0)
_SMALLEST_SCALE = tl.constexpr(2.0**-126)
_LARGEST_CODE = tl.constexpr(7.0)
_FINITE = tl.constexpr(3.4028234663852886e38)
# the largest float32 that seven times is one
_LARGEST_SCALE = tl.constexpr(float.fromhex("0x1.249248p+125"))


@triton.jit
def _load_steps(
    x_ptr: tl.tensor, row: tl.tensor, first: tl.tensor, k: tl.tensor, STEPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Channels of some steps of one row, float32 [STEPS, 16, 8]: word 4 t + 2 h + q, then its eight channels."""
    step = first + tl.arange(0, STEPS)[:, None, None]
    word = tl.arange(0, 16)[None, :, None]
    channel = step * 128 + (word // 2 % 2) * 64 + (word % 2) * 32 + (word // 4) * 8 + tl.arange(0, 8)[None, None, :]
    return tl.load(x_ptr + row.to(tl.int64) * k + channel, mask=channel < k, other=0.0).to(tl.float32)


@triton.jit
def _store_words(
    words_ptr: tl.tensor, row: tl.tensor, step: tl.tensor, steps: tl.tensor, values: tl.tensor,
) -> None:  # fmt: skip
    """Write int32 values [STEPS, 16, 8] as words; eight numbers of four bits are disjoint, so that a sum joins them."""
    word = tl.sum((values & 15) << (4 * tl.arange(0, 8)[None, None, :]), 2)
    to = words_ptr + (row.to(tl.int64) * steps + step[:, None]) * 16 + tl.arange(0, 16)[None, :]
    tl.store(to, word, mask=(step < steps)[:, None])


@triton.jit
def _pack_kernel(
    codes_ptr: tl.tensor, words_ptr: tl.tensor, k: tl.tensor, steps: tl.tensor, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """STEPS steps of one row of int8 codes."""
    row = tl.program_id(0)
    first = tl.program_id(1) * STEPS
    # whole numbers of one byte: through float32 and back they stay what they are
    values = _load_steps(codes_ptr, row, first, k, STEPS).to(tl.int32)
    _store_words(words_ptr, row, first + tl.arange(0, STEPS), steps, values)


@triton.jit
def _row_scale(
    largest: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Scale that brings the largest magnitude to 7; 1 for zeros, NaN where it is not finite."""
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, _LARGEST_CODE, tl.float32)), _SMALLEST_SCALE)
    scale = tl.where(largest > 0, tl.minimum(scale, _LARGEST_SCALE), 1.0)
    return tl.where(largest <= _FINITE, scale, float("nan"))


@triton.jit
def _quantize_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scale_ptr: tl.tensor, k: tl.tensor, steps: tl.tensor, blocks: tl.tensor,
    GROUPED: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """One row, STEPS steps of it where every step has a scale, all of it where the row has one."""
    row = tl.program_id(0)
    if GROUPED:
        first_block = tl.program_id(1)
        last_block = first_block + 1
        scale = tl.full([STEPS], 1.0, tl.float32)
    else:
        first_block = 0
        last_block = blocks
        largest = tl.zeros([STEPS], tl.float32)
        for block in range(0, blocks):
            largest = _max_steps(largest, _load_steps(x_ptr, row, block * STEPS, k, STEPS))
        whole = tl.max(tl.where(largest <= _FINITE, largest, float("inf")), 0)
        scale = _row_scale(tl.zeros([STEPS], tl.float32) + whole)
        tl.store(scale_ptr + row + tl.arange(0, STEPS), scale, mask=tl.arange(0, STEPS) == 0)
    for block in range(first_block, last_block):
        x = _load_steps(x_ptr, row, block * STEPS, k, STEPS)
        step = block * STEPS + tl.arange(0, STEPS)
        if GROUPED:
            scale = _row_scale(_max_steps(tl.zeros([STEPS], tl.float32), x))
            tl.store(scale_ptr + row * steps + step, scale, mask=step < steps)
        ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None, None], [STEPS, 16, 8]))
        ratio = tl.where(ratio == ratio, ratio, 0.0)
        rounded = tl.minimum(tl.maximum(ratio, -_LARGEST_CODE), _LARGEST_CODE) + _ROUNDER - _ROUNDER
        _store_words(words_ptr, row, step, steps, rounded.to(tl.int32))


@triton.jit
def _max_steps(
    largest: tl.tensor, x: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Largest magnitude of each step, with those found before; inf where one is NaN, which a maximum may lose."""
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))
    return tl.maximum(largest, tl.max(tl.max(magnitude, 2), 1))


def _launch(kernel: Any, grid: tuple[int, int], *arguments: object) -> None:  # noqa: ANN401  # Triton's are untyped
    kernel[grid](*arguments)


def _words(values: Tensor) -> Tensor:
    """Join the last axis, eight numbers from -8 to 7, to int32 words, the first lowest."""
    shifts = torch.arange(0, 4 * NIBBLES, 4, dtype=torch.int64, device=values.device)
    word = ((values.to(torch.int64) & 15) << shifts).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def _nibbles(words: Tensor) -> Tensor:
    """Undo `_words`: int32 [...] to int32 [..., 8] from -8 to 7."""
    shifts = torch.arange(0, 4 * NIBBLES, 4, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts & 15) ^ 8) - 8
