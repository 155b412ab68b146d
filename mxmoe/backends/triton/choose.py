"""Tiles by rule: what a launch of so many rows wants where nobody has tuned it, and what is worth trying to tune it."""

from __future__ import annotations

from functools import lru_cache

from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.tiles import Config, Gemm, Shape
from mxmoe.ir import Scheme

FEW, SOME, MANY = 12.0, 100.0, 600.0
"""Rows of a mean active expert up to which its weights' bytes decide, then both, then its operations."""
FILLING = 512
"""Tiles that keep an H200 busy to the end; with fewer, k is split."""
CODED_WIDTH = 64
"""Output channels of a tile of each of two matrices; a single matrix has twice as many."""


def mean_rows(gemm: Gemm, tokens: int, top_k: int) -> float:
    """Rows of a mean active expert if tokens spread evenly."""
    assignments = tokens * top_k
    return assignments / max(1, min(len(gemm.schemes), assignments))


@lru_cache(maxsize=4096)
def by_rule(gemm: Gemm, tokens: int, top_k: int) -> Config:
    """
    Choose by the rows of a mean active expert.

    Few rows: small tiles, of which many run on an SM, so that enough loads are in flight. Many rows: the largest tile
    whose sums stay in registers. The numbers were found on an H200 (`benchmarks/group_gemm.py`).
    """
    rows = mean_rows(gemm, tokens, top_k)
    bodies = {_kind_of(scheme) for scheme in gemm.distinct}
    coded = "dense" not in bodies
    if rows <= FEW:
        warps, registers = (4, 96) if bodies == {"nibbles"} else (4, None)
    elif rows <= SOME:
        # weights that are decoded to 16 bits spill where registers are bounded
        bounded = (4, 128) if "nibbles" in bodies else (4, 168)
        warps, registers = (8, None) if "wide" in bodies else bounded
    elif rows <= MANY:
        warps, registers = (8, 128) if bodies == {"nibbles"} else (8, None)
    else:
        warps, registers = (4, None) if bodies == {"nibbles"} else (8, None)
    parts = _parts(gemm, tokens, top_k)
    shapes = tuple((str(one), _shape(one, gemm, rows, warps, parts)) for one in gemm.distinct)
    grouping = 1 if rows <= SOME and coded else 2 if rows <= SOME else 4 if rows <= MANY else 8
    return Config(warps, shapes, grouping=grouping, registers=registers)


def _kind_of(scheme: Scheme) -> str | None:
    """Body of a scheme; what has integer scales is cut as other 4-bit codes are."""
    body = body_of(scheme)
    return "nibbles" if body == "scaled" else body


def _parts(gemm: Gemm, tokens: int, top_k: int) -> int:
    """Parts of k, a power of two: what follows a gate needs whole sums, and a part has some steps at least."""
    if gemm.gated or "wide" in {body_of(scheme) for scheme in gemm.distinct}:
        return 1
    active = min(len(gemm.schemes), tokens * top_k)
    bands = max(active, tokens * top_k // 64)
    tiles = bands * -(-gemm.n // (2 * CODED_WIDTH))
    parts = 1
    while parts < 8 and tiles * parts < FILLING and gemm.k // (2 * parts) >= 352 and _divides(gemm, 2 * parts):
        parts *= 2
    return parts


def _divides(gemm: Gemm, parts: int) -> bool:
    """Whether k falls into equal parts, each of whole lines: packed weights may have a short last part."""
    return parts == 1 or gemm.k % (16 * parts) == 0 or all(body_of(scheme) != "dense" for scheme in gemm.distinct)


def _shape(scheme: Scheme, gemm: Gemm, rows: float, warps: int, parts: int) -> Shape:
    body = _kind_of(scheme)
    width = CODED_WIDTH if gemm.gated else 2 * CODED_WIDTH
    depth = 64 if scheme.act_bits == 16 else 128
    stages = 2 if scheme.weight_bits == 3 else 4
    if rows <= FEW:
        return Shape((16, 32) if body == "nibbles" else (16,), width, depth, stages, parts)
    if rows <= SOME:
        only_dense = body == "dense" and warps == 4 and all(body_of(one) == "dense" for one in gemm.distinct)
        return Shape((16, 32, 64) if only_dense else (16, 32), width, depth, stages, parts)
    if body == "dense":
        return Shape((32, 64, 128), 2 * width, depth, 3, parts)
    if body == "nibbles":
        return Shape((16, 32, 64) if rows <= MANY else (32, 64), width, depth, stages, parts)
    return Shape((32, 64), width, depth, min(stages, 3), parts)


def candidates(gemm: Gemm, tokens: int, top_k: int) -> tuple[Config, ...]:
    """Configs worth measuring for a GEMM of one scheme, the rule's own first."""
    rule = by_rule(gemm, tokens, top_k)
    rows = mean_rows(gemm, tokens, top_k)
    scheme = gemm.distinct[0]
    depth = 64 if scheme.act_bits == 16 else 128
    width = CODED_WIDTH if gemm.gated else 2 * CODED_WIDTH
    parts = (1,) if gemm.gated or body_of(scheme) == "wide" else tuple(n for n in (1, 2, 4) if _divides(gemm, n))
    if rows <= FEW:
        heights, widths, stages = ((16,), (16, 32)), (64, width), (4, 5)
        runs = ((4, None), (4, 96), (8, None))
    elif rows <= SOME:
        heights, widths, stages = ((16, 32), (16, 32, 64), (32,)), (width,), (4,)
        runs = ((4, 128), (4, 168), (8, 80), (8, 120))
    else:
        heights, widths, stages = ((32, 64), (32, 64, 128), (16, 32, 64)), (width, 2 * width), (3, 4)
        runs = ((4, None), (8, None), (8, 128))
    if scheme.weight_bits == 3:
        stages = (2,)
    made = [
        Config(warps, ((str(scheme), Shape(tall, wide, depth, flight, split)),), 0, rule.grouping, registers)
        for tall in heights
        for wide in dict.fromkeys(widths)
        for flight in stages
        for split in parts
        for warps, registers in runs
        if wide * (2 if gemm.gated else 1) * max(tall) <= 128 * 256 and (split == 1 or rows <= SOME or split == 2)
    ]
    return (rule, *(config for config in dict.fromkeys(made) if config != rule))
