"""Tiles by rule: what a launch of so many rows wants where nobody has tuned it."""

from __future__ import annotations

from functools import lru_cache

import torch

from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.tiles import Config, Gemm, Shape
from mxmoe.ir import Scheme


def choose_configs(gemm: Gemm, tokens: int, top_k: int, device: torch.device) -> Config:
    """Tiles for a call of `tokens` tokens."""
    del device
    experts = len(gemm.schemes)
    rows = tokens * top_k / max(1, min(experts, tokens * top_k))
    return by_rule(gemm, rows)


@lru_cache(maxsize=4096)
def by_rule(gemm: Gemm, rows: float) -> Config:
    """
    Choose by the rows of a mean active expert.

    Few rows: the weights' bytes decide, so small tiles of which several run on an SM. Many rows: the operations
    decide, so the largest tile whose sums stay in registers.
    """
    warps = 4 if rows <= 8 else 8
    return Config(warps, tuple((str(scheme), _shape(scheme, gemm, rows)) for scheme in gemm.distinct))


def _shape(scheme: Scheme, gemm: Gemm, rows: float) -> Shape:
    wide = scheme.act_bits == 16
    depth = 64 if wide else 128
    packed = body_of(scheme) != "dense"
    if rows <= 8:
        return Shape((16,), 64 if gemm.gated else 128, depth, 4)
    if rows <= 24:
        return Shape((16, 32), 128, depth, 4)
    if rows <= 96:
        return Shape((16, 32, 64), 128, depth, 4)
    tallest = 64 if packed and gemm.gated else 128
    heights = (32, 64) if tallest == 64 else (32, 128)
    return Shape(heights, 128, depth, 3)
