"""Launches of INT4 experts to try: their arguments, and what they should write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxmoe.backends.triton import int4
from mxmoe.backends.triton.dispatch import Dispatch, TileClass, Tiling
from mxmoe.backends.triton.int4 import Int4Bands, Int4Options, int4_group_gemm_torch
from mxmoe.backends.triton.int4_pack import (
    PackedInt4,
    pack_channels,
    pack_int4,
    pack_int4_pair,
    pair,
    quantize_rows_torch,
)
from mxmoe.backends.triton.schedule import allocate, build, build_reference
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized, quantize

GROUPED, CHANNEL = Scheme.parse("w4a4_g128_sym"), Scheme.parse("w4a4_sym")


def weight(n: int, k: int, scheme: Scheme, seed: int = 0) -> Quantized:
    return quantize(torch.randn((n, k), generator=torch.Generator().manual_seed(seed)), scheme)


def scenario(
    scheme: Scheme, *, n: int, k: int, counts: Sequence[int], heights: Sequence[int], gather: bool, act: bool,
    bias: bool, device: str = "cpu", dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments of `int4_group_gemm`: experts 1 and 3 of four are INT4; expert e has counts[e] rows of top-1 tokens."""
    generator = torch.Generator().manual_seed(len(counts) + n + k)
    tokens = sum(counts)
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    index = index[torch.randperm(tokens, generator=generator)].unsqueeze(1).to(device)
    width = -(-(2 * n if act else n) // int4.WIDTH)
    classes = (*(TileClass(1, height, width) for height in heights), TileClass(0, 64, 1))
    tables = allocate(Dispatch(4, 1, tokens, (Tiling(classes, (0, 1, 0, 1)),)), device)
    (build_reference if device == "cpu" else build)(tables, index)
    slot = torch.tensor([9, 0, 9, 1], dtype=torch.int32, device=device)
    gates, ups = ([weight(n, k, scheme, seed + e) for e in (0, 1)] for seed in (0, 10))
    packed = pack_int4_pair(gates, ups) if act else pack_int4(gates)
    packed = PackedInt4(scheme, packed.n, packed.k, packed.words.to(device), packed.scale.to(device))
    x = torch.randn((tokens, k), generator=generator)
    words, x_scale = quantize_rows_torch(x, scheme)
    both = pair(*torch.randn((2, 2, n), generator=generator)) if act else torch.randn((2, n), generator=generator)
    out = torch.full((tokens, n), -7.0, dtype=dtype, device=device)
    named: dict[str, Any] = {"bias": None, "options": Int4Options(gather, "silu" if act else None)}
    if bias:
        named["bias"] = pack_channels(both).to(device)
    return (words.to(device), x_scale.to(device), packed, Int4Bands.of(tables, 0, 1, slot), out), named


def expected(positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    out = torch.full_like(positional[4], -7.0)
    int4_group_gemm_torch(*positional[:4], out, **named)
    return out


CASES = [
    # (scheme, n, k, rows of experts 0 to 3, heights, gather, act, bias)
    (GROUPED, 128, 512, (3, 40, 0, 21), (32, 16), False, False, False),
    (GROUPED, 144, 384, (0, 70, 5, 1), (64, 16), True, False, True),
    (CHANNEL, 128, 256, (1, 16, 1, 0), (16,), True, False, False),
    (CHANNEL, 80, 200, (2, 33, 0, 130), (128, 32), False, False, True),
    (GROUPED, 96, 128, (2, 9, 0, 9), (16,), True, True, True),
    (CHANNEL, 64, 640, (4, 20, 4, 3), (64, 32, 16), False, True, False),
]
NAMES = ("scheme", "n", "k", "counts", "heights", "gather", "act", "bias")
