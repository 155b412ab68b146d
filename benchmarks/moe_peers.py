"""
Other people's kernels, measured in the same run as ours: torch's grouped products, triton_kernels, vLLM's fused_moe.

What a time contains: torch reads rows that were permuted before and includes the kernel that sets up its pointers;
triton_kernels gathers rows in its kernel, behind a small index kernel; vLLM's kernel reads blocks that were sorted
before. Quantized activations are made before. A block contains all of it, routing metadata made by torch. Tiles: torch
and triton_kernels choose their own; vLLM's kernel runs with the best one that was published for the cell
(`results/peers_h200.csv`), or by a rule where there is none. triton_kernels and vLLM's kernel are taken from a folder
that `fetch_peers.py` fills.
"""

from __future__ import annotations

import csv
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moe_contender import Contender, Prepared, Unsupported, check_block, check_rows, silu_mul
from moe_operands import metadata, quantize_rows, sorted_rows, stored, tokens_of, widened
from moe_workloads import PARTS, Cell, Rotation, copies_needed, rotations
from peer_triton_kernels import forget_mxfp4, triton_kernels
from torch import Tensor

PUBLISHED = Path(__file__).parent / "results" / "peers_h200.csv"


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_bf16(cell: Cell, device: str) -> Prepared:
    """`torch._grouped_mm`; its block permutes, activates and combines with torch's own kernels."""
    model, copies = cell.model, copies_needed(cell, 16)
    turns = rotations(cell, 16, copies=copies, device=device)
    sets = [stored("bf16", n, k, model.experts, copies, device) for n, k in cell.gemms]
    x = tokens_of(cell, device)

    def product(rows: Tensor, which: int, turn: Rotation, ends: Tensor) -> Tensor:
        return torch._grouped_mm(rows, sets[which][turn.copy][0].transpose(1, 2), offs=ends)

    def block(turn: Rotation) -> Tensor:
        order, ends = metadata(turn, model.experts)
        inner = silu_mul(product(x[order // model.top_k], 0, turn, ends))
        rows = product(inner, 1, turn, ends) * turn.weights.flatten()[order, None].to(x.dtype)
        flat = torch.empty_like(rows)
        flat[order] = rows
        return flat.view(cell.tokens, model.top_k, -1).sum(1)

    if cell.part == "block":
        launches = [functools.partial(block, turn) for turn in turns]
        first, parts = turns[0], [widened(own[turns[0].copy]) for own in sets]

        def check() -> float:
            return check_block(block(first), first.ids, first.weights, x, parts[0], parts[1], silu_mul)

        return Prepared(launches, check, first.counts)
    rows = [sorted_rows(cell, x, turn) for turn in turns]
    launches = [functools.partial(product, own, 0, turn, turn.ends) for own, turn in zip(rows, turns, strict=True)]
    weight = widened(sets[0][turns[0].copy])
    return Prepared(launches, lambda: check_rows(launches[0](), turns[0], rows[0], weight), turns[0].counts)


def torch_fp8(cell: Cell, device: str) -> Prepared:
    """`torch._scaled_grouped_mm`, fp8 with a scale for each row and each channel."""
    model, copies = cell.model, copies_needed(cell, 8)
    turns = rotations(cell, 8, copies=copies, device=device)
    n, k = cell.gemms[0]
    weights = stored("fp8", n, k, model.experts, copies, device)
    quantized = [quantize_rows(sorted_rows(cell, tokens_of(cell, device), turn), "fp8") for turn in turns]

    def product(rows: tuple[Tensor, Tensor], turn: Rotation) -> Tensor:
        weight, scale = weights[turn.copy]
        options = {"offs": turn.ends, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        return torch._scaled_grouped_mm(rows[0], weight.transpose(1, 2), rows[1].flatten(), scale, **options)

    launches = [functools.partial(product, own, turn) for own, turn in zip(quantized, turns, strict=True)]
    inputs = quantized[0][0].float() * quantized[0][1]
    weight = widened(weights[turns[0].copy])
    return Prepared(launches, lambda: check_rows(launches[0](), turns[0], inputs, weight), turns[0].counts)


# --- vLLM's fused_moe -------------------------------------------------------------------------------------------------


def aligned(turn: Rotation, height: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Row ids in the order of experts, each padded to whole blocks; the expert of each block; both lengths."""
    rows, device = turn.order.numel(), turn.order.device
    padded = -(-turn.counts // height) * height
    starts, firsts = np.cumsum(padded) - padded, np.cumsum(turn.counts) - turn.counts
    experts = np.repeat(np.arange(turn.counts.size), turn.counts)
    ids = np.full(int(padded.sum()), rows, np.int32)
    ids[starts[experts] + np.arange(rows) - firsts[experts]] = turn.order.cpu().numpy()
    blocks = np.repeat(np.arange(turn.counts.size), padded // height).astype(np.int32)
    total = torch.tensor([ids.size], dtype=torch.int32, device=device)
    return torch.from_numpy(ids).to(device), torch.from_numpy(blocks).to(device), total, ids.size


@functools.cache
def _published_tiles() -> dict[tuple[str, str, int, str], str]:
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tiles"]]
    return {(row["contender"], row["model"], int(row["tokens"]), row["part"]): row["tiles"] for row in rows}


def fused_tiles(kind: str, cell: Cell) -> str:
    """m/n/k/group/warps/stages: the best that was published for the cell, or by the mean rows of an active expert."""
    known = _published_tiles().get((f"vllm_triton_{kind}", cell.model.name, cell.tokens, cell.part))
    if known is not None:
        return known
    mean = cell.rows / min(cell.model.experts, cell.rows)
    rule = {16: "16/64/128/1/4/5", 64: "64/128/128/1/4/3"}
    return next((tiles for most, tiles in rule.items() if mean <= most), "128/256/64/16/8/4")


def vllm_fused(kind: str, cell: Cell, device: str) -> Prepared:
    """vLLM's Triton kernel: bf16, or fp8 / int8 with a scale for each token and each channel."""
    try:
        kernel: Any = importlib.import_module("vllm_fused_moe").fused_moe_kernel
    except ImportError as error:
        raise Unsupported(f"no vllm_fused_moe: {error}") from error
    tl = importlib.import_module("triton.language")
    model, bits = cell.model, 16 if kind == "bf16" else 8
    copies = copies_needed(cell, bits)
    turns = rotations(cell, bits, copies=copies, device=device)
    n, k = cell.gemms[0]
    weights = stored(kind, n, k, model.experts, copies, device)
    tiles = fused_tiles(kind, cell)
    m_block, n_block, k_block, group, warps, stages = map(int, tiles.split("/"))
    x = tokens_of(cell, device)
    a, scale = (x, None) if kind == "bf16" else quantize_rows(x, kind)
    slots = 1 if cell.part == "down" else model.top_k

    def launch(turn: Rotation, plan: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
        out = torch.empty((cell.rows, n), dtype=torch.bfloat16, device=device)
        weight, channel = weights[turn.copy]
        of_tokens = (0, 0) if scale is None else scale.stride()
        of_channels = (0, 0, 0) if scale is None else (channel.stride(0), 0, channel.stride(1))
        grid = (plan[3] // m_block * -(-n // n_block),)
        kernel[grid](
            a, weight, out, None, scale, None if scale is None else channel, None, *plan[:3],
            n, k, plan[3], cell.rows, *a.stride(), weight.stride(0), weight.stride(2), weight.stride(1), *out.stride(),
            *of_tokens, *of_channels, 0, 0, 0, 0,
            naive_block_assignment=False, MUL_ROUTED_WEIGHT=False, top_k=slots, compute_type=tl.bfloat16,
            use_fp8_w8a8=kind == "fp8", use_int8_w8a8=kind == "int8", use_int8_w8a16=False,
            per_channel_quant=kind != "bf16", HAS_BIAS=False, SPLIT_K=1, BLOCK_SIZE_M=m_block, BLOCK_SIZE_N=n_block,
            BLOCK_SIZE_K=k_block, GROUP_SIZE_M=group, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out

    launches = [functools.partial(launch, turn, aligned(turn, m_block)) for turn in turns]
    inputs = sorted_rows(cell, x if scale is None else a.float() * scale, turns[0])
    weight = widened(weights[turns[0].copy])
    first = turns[0]
    return Prepared(
        launches, lambda: check_rows(launches[0]()[first.order], first, inputs, weight), first.counts, tiles
    )


def forget() -> None:
    """Drop weights that are kept between cells."""
    stored.cache_clear()
    forget_mxfp4()


def _ogs(kind: str) -> Callable[[Cell, str], Prepared]:
    return functools.partial(triton_kernels, kind)


def _fused(kind: str) -> Callable[[Cell, str], Prepared]:
    return functools.partial(vllm_fused, kind)


GEMMS = PARTS[:2]
_ROWS: tuple[tuple[str, str, str, float, float, str, Callable[[Cell, str], Prepared], tuple[str, ...]], ...] = (
    # name, class, format, bits with scales, bytes of an activation, unit, make, parts
    ("torch_bf16", "bf16", "bf16", 16, 2, "bf16", torch_bf16, PARTS),
    ("torch_fp8", "8bit", "fp8", 8, 1, "fp8", torch_fp8, GEMMS),
    ("tk_bf16", "bf16", "bf16", 16, 2, "bf16", _ogs("bf16"), PARTS),
    ("tk_fp8", "8bit", "fp8", 8, 1, "fp8", _ogs("fp8"), PARTS),
    ("tk_mxfp4", "4bit", "mxfp4a16", 4.25, 2, "bf16", _ogs("mxfp4"), PARTS),
    ("tk_mxfp4_4w", "4bit", "mxfp4a16", 4.25, 2, "bf16", _ogs("mxfp4_4w"), PARTS),
    ("vllm_bf16", "bf16", "bf16", 16, 2, "bf16", _fused("bf16"), GEMMS),
    ("vllm_fp8", "8bit", "fp8", 8, 1, "fp8", _fused("fp8"), GEMMS),
    ("vllm_int8", "8bit", "int8", 8, 1, "int8", _fused("int8"), GEMMS),
)


def peers() -> list[Contender]:
    """Every peer, whether its package is there or not."""
    return [
        Contender(name, kind, form, lambda _, bits=bits: bits, act_bytes, unit, make, parts, reset=forget)
        for name, kind, form, bits, act_bytes, unit, make, parts in _ROWS
    ]
