"""
Tiles for sm_80 to sm_89, by rule: shared memory of 99 KiB, sums and decoded weights in the registers of mma.sync.

Nobody has timed these. What is known without the card is kept by `tests/backends/triton/test_machine_code.py`, which
compiles every scheme with them: nothing is spilled, a program fits, and `RESIDENT_WARPS` are at work at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from triton import knobs

from mxmoe.backends.triton.choose import by_rule, mean_rows
from mxmoe.backends.triton.layout import body_of, unit_channels
from mxmoe.backends.triton.tiles import Config, Gemm, Shape
from mxmoe.ir import Scheme

REGIMES = (16, 32, 96)
"""Rows of a mean active expert up to which tiles stay low; beyond the last they are as tall as they get."""
HEIGHTS = ((16,), (16, 32), (16, 32, 64), (32, 64, 128))
WIDTH = 64
"""Output channels, of each matrix: two with a gate leave no registers for more."""
RESIDENT_WARPS = 8
"""Warps of a multiprocessor that are at work at once, at least: two for each of its partitions to take turns."""
REGISTERS = 255
"""Asked for, because the assembler spills a few to fit two programs of eight warps where it may choose."""


def config_for(gemm: Gemm, tokens: int, top_k: int, device: torch.device) -> Config:
    """Choose the tiles of a GEMM for a call of `tokens` tokens on a device, by the rule for its kind."""
    if arch_of(device) < 90:
        return ada_config(gemm, mean_rows(gemm, tokens, top_k))
    return by_rule(gemm, tokens, top_k)


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> int:
    """Compute capability that Triton decides for: what it is told, or the device's; of the interpreter, Hopper's."""
    told = knobs.runtime.override_arch
    if told:
        return int(told.removeprefix("sm"))
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=4096)
def ada_config(gemm: Gemm, rows: float) -> Config:
    """
    Choose by the rows of a mean active expert, one of four regimes.

    Up to 32 rows, programs of four warps, of which two or more run at once, hide the latency of memory; from there on
    operations decide, and eight warps share a tile.
    """
    regime = sum(rows > most for most in REGIMES)
    longest = max(_unit(scheme) for scheme in gemm.distinct)
    warps = 4 if regime < 2 and longest <= 256 else 8
    shapes = tuple((str(scheme), _shape(scheme, gemm, regime)) for scheme in gemm.distinct)
    return Config(warps, shapes, registers=REGISTERS)


def _shape(scheme: Scheme, gemm: Gemm, regime: int) -> Shape:
    """
    Tiles of one scheme.

    2 and 3-bit weights go by 256 and 512 channels, whose rows fill the memory and whose codes the registers; integers
    in groups have two sums for each output, and twice as many with a gate: neither holds 128 rows.
    """
    unit = _unit(scheme)
    has_two_sums = scheme.act_format == "int" and scheme.group_size is not None and gemm.gated
    heights = HEIGHTS[min(regime, 2) if unit > 128 or has_two_sums else regime]
    return Shape(heights, WIDTH, 64 if scheme.act_bits == 16 else 128, 2 if unit > 256 else 3)


def _unit(scheme: Scheme) -> int:
    """Channels that a step of packed weights multiplies."""
    return unit_channels(scheme) if body_of(scheme) == "wide" else 128
