"""Triton's own `triton_kernels`: matmul_ogs in bf16, fp8 (a scale per tensor) and bf16 x mxfp4, and blocks of it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from moe_contender import Prepared, Unsupported, check_block, check_rows
from moe_operands import FP8, metadata, sorted_rows, stored, tokens_of, widened
from moe_workloads import Cell, Rotation, copies_needed, random_bytes, rotations
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP, EXPERTS_AT_ONCE = 32, 8
SCALES = (118, 123)
"""Biased exponents of the random mxfp4 scales, from - up to."""


class Operand(NamedTuple):
    """A product's weights as matmul_ogs takes them."""

    weight: Any
    precision: Any
    dequantized: Callable[[int], Tensor]
    """Expert -> [n, k] float32."""


def _modules() -> Any:  # noqa: ANN401  # a namespace of a package that is not installed here
    try:
        names = ("matmul_ogs", "tensor", "numerics", "specialize", "swiglu", "tensor_details.layout")
        return [importlib.import_module(f"triton_kernels.{name}") for name in names]
    except ImportError as error:
        raise Unsupported(f"no triton_kernels: {error}") from error


@functools.lru_cache(maxsize=2)
def _mxfp4(n: int, k: int, experts: int, copies: int, device: str, warps: int) -> tuple[Operand, ...]:
    return tuple(_random_mxfp4(n, k, experts, device, warps, copy) for copy in range(copies))


def forget_mxfp4() -> None:
    """Drop weights that are kept between cells."""
    _mxfp4.cache_clear()


def _random_mxfp4(n: int, k: int, experts: int, device: str, warps: int, seed: int) -> Operand:
    """Random codes and scales, laid out for Hopper a few experts at a time: laying out takes many times their size."""
    ogs, tensor, _, _, _, layout = _modules()
    codes = random_bytes((experts, n, k // 2), 0, 256, device, seed)
    scales = random_bytes((experts, n, k // GROUP), *SCALES, device, seed + 100)
    value_class, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_class, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=warps)
    weight, scale = (
        _laid_out(tensor, whole.transpose(1, 2), own, options, dtype)
        for whole, own, options, dtype in (
            (codes, value_class, value_options, tensor.FP4),
            (scales, scale_class, scale_options, torch.uint8),
        )
    )
    precision = ogs.PrecisionConfig(weight_scale=scale, out_dtype=torch.bfloat16)
    return Operand(weight, precision, lambda expert: dequantize_mxfp4(codes[expert], scales[expert]))


def _laid_out(tensor: Any, whole: Tensor, own: Any, options: dict[str, Any], dtype: Any) -> Any:  # noqa: ANN401
    parts = []
    for part in whole.split(EXPERTS_AT_ONCE):
        parts.append(tensor.convert_layout(tensor.wrap_torch_tensor(part, dtype=dtype), own, **options).storage.data)
    # a transposed view of contiguous memory, as the layouts give it
    data = torch.cat([part.mT for part in parts]).mT
    shape = list(tensor.wrap_torch_tensor(whole, dtype=dtype).shape)
    return tensor.Tensor(tensor.Storage(data, own(list(whole.shape), **options)), dtype=dtype, shape=shape)


def dequantize_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """[n, k / 2] bytes of two e2m1 values, low half first, and [n, k / 32] biased exponents -> [n, k] float32."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], dim=-1).flatten(-2)
    return values * torch.exp2(scales.float() - 127).repeat_interleave(GROUP, dim=-1)


def _operands(kind: str, cell: Cell, copies: int, device: str) -> list[tuple[Operand, ...]]:
    """For each product of the cell, one operand for each copy."""
    experts = cell.model.experts
    if kind.startswith("mxfp4"):
        return [_mxfp4(n, k, experts, copies, device, 4 if kind.endswith("4w") else 8) for n, k in cell.gemms]
    ogs, _, numerics, *_ = _modules()
    found: list[tuple[Operand, ...]] = []
    for n, k in cell.gemms:
        row: list[Operand] = []
        for weight, scale in stored(kind, n, k, experts, copies, device):
            flex = ogs.FlexCtx()
            exact = widened((weight, scale))
            if kind == "fp8":  # one scale for all experts: the kernel takes no channel scales
                one = scale.mean().reshape(1)
                flex = ogs.FlexCtx(rhs_data=numerics.InFlexData(scale=one))
                exact = functools.partial(_times, weight, one)
            row.append(
                Operand(weight.transpose(1, 2), ogs.PrecisionConfig(flex_ctx=flex, out_dtype=torch.bfloat16), exact)
            )
        found.append(tuple(row))
    return found


def _times(weight: Tensor, scale: Tensor, expert: int) -> Tensor:
    return weight[expert].float() * scale


def _routing(turn: Rotation, cell: Cell, order: Tensor, ends: Tensor) -> tuple[Any, Any, Any]:
    """Routing data, gather and scatter indices from the order of rows; captured as part of a block."""
    ogs, tensor, *_ = _modules()
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.int32)
    order32 = order.to(torch.int32)
    inverse = torch.empty_like(order32)
    inverse[order] = torch.arange(order.numel(), device=order.device, dtype=torch.int32)
    ragged = tensor.make_ragged_tensor_metadata(counts, order.numel())
    shares = turn.weights.flatten()[order]
    data = ogs.RoutingData(shares, counts, cell.model.experts, cell.model.top_k, ragged)
    return data, ogs.GatherIndx(order32, inverse), ogs.ScatterIndx(inverse, order32)


def _swiglu_pairs(rows: Tensor) -> Tensor:
    """What the package fuses: gate and up interleaved, silu(gate) * (up + 1)."""
    return torch.nn.functional.silu(rows[..., ::2]) * (rows[..., 1::2] + 1)


def triton_kernels(kind: str, cell: Cell, device: str) -> Prepared:
    """bf16, fp8, mxfp4 or mxfp4_4w (scales laid out for four warps)."""
    ogs, _, _, specialize, swiglu, _ = _modules()
    bits = {"bf16": 16.0, "fp8": 8.0}.get(kind, 4.25)
    copies = copies_needed(cell, bits)
    turns = rotations(cell, bits, copies=copies, device=device)
    operands = _operands(kind, cell, copies, device)
    x = tokens_of(cell, device)

    def narrow(values: Tensor) -> Tensor:
        return values.to(FP8) if kind == "fp8" else values

    def product(rows: Tensor, which: int, turn: Rotation, data: Any, **options: Any) -> Tensor:  # noqa: ANN401
        own = operands[which][turn.copy]
        return ogs.matmul_ogs(rows, own.weight, None, data, precision_config=own.precision, **options)

    fused = ogs.FusedActivation(
        specialize.FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.0, None)
    )

    def block(turn: Rotation) -> Tensor:
        data, gather, scatter = _routing(turn, cell, *metadata(turn, cell.model.experts))
        inner = product(narrow(x), 0, turn, data, gather_indx=gather, fused_activation=fused)
        return product(narrow(inner), 1, turn, data, scatter_indx=scatter, gammas=data.gate_scal)

    first = turns[0]
    exact = [own[first.copy].dequantized for own in operands]
    if cell.part == "block":
        launches = [functools.partial(block, turn) for turn in turns]
        return Prepared(
            launches,
            lambda: check_block(block(first), first.ids, first.weights, x, exact[0], exact[1], _swiglu_pairs),
            first.counts,
        )
    ready = [_routing(turn, cell, turn.order, turn.ends) for turn in turns]
    down = cell.part == "down"
    rows = [narrow(sorted_rows(cell, x, turn)) for turn in turns] if down else [narrow(x)] * len(turns)
    launches = [
        functools.partial(product, own, 0, turn, data, **({} if down else {"gather_indx": gather}))
        for own, turn, (data, gather, _) in zip(rows, turns, ready, strict=True)
    ]
    inputs = sorted_rows(cell, narrow(x), first)
    return Prepared(launches, lambda: check_rows(launches[0](), first, inputs, exact[0]), first.counts)
