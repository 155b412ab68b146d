"""The roofline: max(bytes / bandwidth, operations / rate) + decode, from nothing but a device row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from mxmoe.device import Device, unit_of
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme, Tile

REACHED: Mapping[str, float] = MappingProxyType(
    {"dram": 0.9, "fp16": 0.8, "bf16": 0.8, "int8": 0.75, "fp8": 0.75, "int4": 0.6}
)
"""
Share of the published peak that good kernels reach.

Dense bf16, fp8 and int8 products on an H200 reach 0.80, 0.75 and 0.80; the published RTX 4090 table has about 0.9 of
memory, 0.75 of int8 and 0.6 of int4 (Duanmu et al., "MxMoE", ICML 2025, performance table).
"""
L2_BYTES_PER_CLOCK = 64
"""Bytes per clock that one SM can draw from the level-two cache: the width of its port. All SMs at once reach less."""
LANES = 64
"""32-bit integer operations per clock and SM on compute capability 8.0 to 9.0 (CUDA C++ Programming Guide)."""
STAGES = 3
"""Tiles of both operands that a pipelined kernel holds in shared memory at once."""
MAX_ACCUMULATORS = 256 * 128
"""Elements of one output tile that the registers of one SM can accumulate."""


@dataclass(frozen=True)
class Roofline:
    """
    A lower bound of the tile time that no measurement backs, the same law for every device and scheme.

    For a tile m x n over k input channels on one of `sms` busy SMs:

        memory    n k effective_bits / 8 bytes, once per expert, at the SM's share of memory bandwidth
        cache     both operands' bytes at `L2_BYTES_PER_CLOCK`
        multiply  2 m n k operations at the SM's share of the matrix unit's rate
        decode    integer instructions that widen narrow weights and scale the partial sums of groups
        time      max(memory, cache, multiply) + decode

    Activations are taken to stay in the cache. The law ignores the launch itself and the quantization of activations.
    """

    device: Device
    name: ClassVar[str] = "roofline"

    def tiles(self, scheme: Scheme) -> tuple[Tile, ...]:
        """Powers of two whose operands fit the shared memory, 128 columns first."""
        if not self.device.runs(scheme):
            return ()
        depth = 64 if scheme.act_bits == 16 else 128
        grid = [Tile(m, n, depth) for n in (128, 64, 256) for m in (16, 32, 64, 128, 256)]
        return tuple(tile for tile in grid if self._fits(scheme, tile))

    def tile_us(self, scheme: Scheme, tile: Tile, k: int, rows: float | None = None) -> float:
        """See `CostModel.tile_us`."""
        check_depth(k, rows)
        if not self.device.runs(scheme):
            return math.inf
        memory, multiply = self.peak_us(scheme, tile, k, rows)
        operand_bits = tile.n * scheme.effective_bits(k) + tile.m * scheme.act_bits
        cache = k * operand_bits / 8 / (L2_BYTES_PER_CLOCK * self.device.boost_ghz * 1e3)
        decode = decode_operations(scheme, tile, k) / (LANES * self.device.boost_ghz * 1e3)
        return max(memory / REACHED["dram"], cache, multiply / REACHED[unit_of(scheme)]) + decode

    def peak_us(self, scheme: Scheme, tile: Tile, k: int, rows: float | None = None) -> tuple[float, float]:
        """Microseconds (memory, multiply) of a tile at the full published peaks, which no kernel can beat."""
        row_tiles = 1 if rows is None else max(1, math.ceil(rows / tile.m))
        weight_bytes = tile.n * k * scheme.effective_bits(k) / 8
        memory = weight_bytes / row_tiles / (self.device.dram_gb_s * 1e3 / self.device.sms)
        multiply = 2 * tile.m * tile.n * k / (self.device.peak_tops(unit_of(scheme)) * 1e6 / self.device.sms)
        return memory, multiply

    def provenance(self, scheme: Scheme, k: int | None = None) -> str:
        """Always "roofline"."""
        return "roofline"

    def _fits(self, scheme: Scheme, tile: Tile) -> bool:
        bits = tile.k * (tile.m * scheme.act_bits + tile.n * scheme.weight_bits)
        return STAGES * bits / 8 <= self.device.smem_kb_per_sm * 1024 and tile.m * tile.n <= MAX_ACCUMULATORS


def decode_operations(scheme: Scheme, tile: Tile, k: int) -> float:
    """
    Integer operations of one tile that are no multiply-adds: widening of weights, scaling of partial sums.

    Two weights are widened at a time: a shift and a logic operation each (1 per weight); a scale per group is one
    more fused multiply-add (0.5). Integer products in groups leave one partial sum per output element and group, but
    with integer scales there is one sum, and a multiplication for two weights (0.5) instead.
    """
    grouped = scheme.n_groups(k) > 1
    total = 0.0
    if scheme.weight_bits < min(scheme.act_bits, 16):
        total += tile.n * k * (1.5 if grouped and (scheme.act_bits == 16 or scheme.integer_scales) else 1.0)
    if grouped and scheme.act_bits < 16 and not scheme.integer_scales:
        total += tile.m * tile.n * scheme.n_groups(k)
    return total


def check_depth(k: int, rows: float | None) -> None:
    """Raise BadWorkload unless `k` is at least 1 and `rows` is None or a finite number that is not negative."""
    if k < 1:
        raise BadWorkload(reason=f"a product over {k} input channels; there must be at least one")
    if rows is not None and not (math.isfinite(rows) and rows >= 0):
        raise BadWorkload(reason=f"an expert with {rows} rows; rows are a finite number, zero or more")
