"""
Tiles for sm_80 to sm_89, by rule: shared memory of 99 KiB, sums and decoded weights in the registers of mma.sync.

Nobody has timed these. What is known without the card is kept by `tests/backends/triton/test_machine_code.py`, which
compiles every scheme with them: nothing is spilled, a program fits, and `RESIDENT_WARPS` are at work at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from triton import knobs

from mxmoe.backends.triton import int4
from mxmoe.backends.triton.choose import by_rule, mean_rows
from mxmoe.backends.triton.layout import body_of, unit_channels
from mxmoe.backends.triton.mode import HOPPER, arch_of
from mxmoe.backends.triton.tiles import Config, Gemm, Shape
from mxmoe.backends.triton.tuned import DIVIDED, Tuned, tuned_config, tuned_for
from mxmoe.ir import Scheme

REGIMES = (16, 32, 96)
"""Rows of a mean active expert up to which tiles stay low; beyond the last they are as tall as they get."""
HEIGHTS = ((16,), (16, 32), (16, 32, 64), (32, 64, 128))
WIDTH = 64
"""Output channels, of each matrix: two with a gate leave no registers for more."""
REGISTERS = 255
"""
Most registers of a thread, where a launch asks for them all.

Left to itself the assembler gives 128, for two programs of eight warps, and spills a few; asked for more than it needs
it takes them too, so that only launches which would spill ask.
"""
RESIDENT_WARPS = 8
"""Warps of a multiprocessor that are at work at once, at least: two for each of its partitions to take turns."""


def config_for(gemm: Gemm, tokens: int, top_k: int, device: torch.device, *, is_plain: bool = False) -> Config:
    """
    Choose the tiles of a GEMM for a call of `tokens` tokens on a device: measured, or by the rule for its kind.

    On sm_90 that may be tiles of the divided kernel, but for launches that want another end than its own (`is_plain`).
    """
    arch = arch_of(device)
    divides = not is_plain and arch == HOPPER and _divides(device)
    # what a device was measured with says nothing of the kernels that it is told to take for another
    tuned = None if knobs.runtime.override_arch else tuned_for(device)
    return choose(gemm, tokens, top_k, arch, tuned, divides=divides)


def _divides(device: torch.device) -> bool:
    """Whether launches on a device may take the divided kernel."""
    if device.type != "cuda":
        return False
    from mxmoe.backends.triton import hopper  # its kernels are no Python that the interpreter runs

    return hopper.runs_on(device)


@lru_cache(maxsize=4096)
def choose(gemm: Gemm, tokens: int, top_k: int, arch: int, tuned: Tuned | None, *, divides: bool) -> Config:
    """
    Choose the fastest measured tiles, or those of a rule where nothing near was measured.

    The rule gives all but launches of very few rows to the divided kernel, where that multiplies the schemes.

    Args:
        gemm: the GEMM.
        tokens, top_k: of the call.
        arch: compute capability times ten.
        tuned: what was measured, if anything.
        divides: whether the divided kernel may run.
    """
    rule, divided, divided_rule = config_for_arch(gemm, tokens, top_k, arch), None, None
    if divides:
        from mxmoe.backends.triton import hopper  # as above

        divided, divided_rule = hopper.config_for(gemm), hopper.by_rule(gemm, mean_rows(gemm, tokens, top_k))
    unmeasured = divided_rule or rule
    if tuned is None or (divided_rule is not None and DIVIDED not in tuned.kernels):
        return unmeasured
    return tuned_config(tuned, gemm, tokens, top_k, rule, divided) or unmeasured


def config_for_arch(gemm: Gemm, tokens: int, top_k: int, arch: int) -> Config:
    """Choose as `config_for` does, by the compute capability times ten."""
    return ada_config(gemm, mean_rows(gemm, tokens, top_k)) if arch < HOPPER else by_rule(gemm, tokens, top_k)


@lru_cache(maxsize=4096)
def ada_config(gemm: Gemm, rows: float) -> Config:
    """
    Choose by the rows of a mean active expert, one of four regimes.

    Up to 32 rows, programs of four warps, of which two or more run at once, hide the latency of memory; from there on
    operations decide, and eight warps share a tile.
    """
    regime = sum(rows > most for most in REGIMES)
    together = [scheme for scheme in gemm.distinct if scheme not in gemm.apart]
    longest = max(map(_unit, together), default=128)
    warps = 4 if regime < 2 and longest <= 256 else 8
    shapes = tuple((str(scheme), _shape(scheme, gemm, regime)) for scheme in gemm.distinct)
    wants_all = longest > 128 or (regime > 2 and any(map(_has_partial_sums, together)))
    return Config(warps, shapes, registers=REGISTERS if wants_all else None)


def _shape(scheme: Scheme, gemm: Gemm, regime: int) -> Shape:
    """
    Tiles of one scheme.

    2 and 3-bit weights go by 256 and 512 channels, whose rows fill the memory and whose codes the registers; quantized
    activations in groups have two sums for each output, and twice as many with a gate; small groups have many scales:
    none of these holds 128 rows. Sums of INT4 units lie as `kernels_int4` has them, and all heights fit.
    """
    if scheme in gemm.apart:
        return Shape(HEIGHTS[regime], int4.WIDTH // (1 + gemm.gated), int4.STEP, int4.STAGES)
    unit = _unit(scheme)
    has_many_scales = scheme.group_size is not None and scheme.group_size < 128
    is_low = unit > 128 or has_many_scales or (gemm.gated and _has_partial_sums(scheme))
    heights = HEIGHTS[min(regime, 2) if is_low else regime]
    return Shape(heights, WIDTH, 64 if scheme.act_bits == 16 else 128, 2 if unit > 256 else 3)


def _has_partial_sums(scheme: Scheme) -> bool:
    """Whether a group's sum is scaled before it is added: a second sum for every output."""
    return scheme.act_bits < 16 and scheme.group_size is not None


def _unit(scheme: Scheme) -> int:
    """Channels that a step of packed weights multiplies."""
    return unit_channels(scheme) if body_of(scheme) == "wide" else 128
