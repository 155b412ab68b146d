"""
Our kernels over random packed weights: one product, or a bank of experts, made on the device without quantizing.

Payloads are random bits in the layout that the kernels read, scales and zero points are such that weights have the
spread of real ones. A product's launch is the grouped kernel alone: the tile schedule and rows as the kernel reads them
(by token, or sorted by expert where it wants them so) are made before, as they are for the peers; gate_up ends with the
activation function, and where k is split the sum of its parts is in the launch. A bank's launch is everything from the
indices to the combined output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from moe_contender import check_block, sample, silu_mul
from moe_workloads import Cell, relative_error
from torch import Tensor

from mxmoe.backends.triton.bank import Bank
from mxmoe.backends.triton.choose_ada import config_for
from mxmoe.backends.triton.dispatch import Dispatch
from mxmoe.backends.triton.launch import Epilogue, Matrices, make_rows, reads_sorted, run_gemm, sort_rows
from mxmoe.backends.triton.layout import Arena, allocate_arena, meta_bytes, payload_bytes
from mxmoe.backends.triton.schedule import allocate, build
from mxmoe.backends.triton.tiles import Config, Gemm, classes_of
from mxmoe.ir import Scheme
from mxmoe.quant import dequantize, quantize_activation

EPILOGUE = Epilogue("silu")


@dataclass(frozen=True)
class Bound:
    """A launch over fixed inputs."""

    launch: Callable[[], Tensor]
    """May be captured in a CUDA graph."""
    check: Callable[[], float]
    """Launches, and compares a sample of rows with float32."""
    config: str = ""


def random_matrices(gemm: Gemm, device: str, seed: int) -> Matrices:
    """Weights for every expert in its scheme."""
    generator = torch.Generator(device).manual_seed(seed)
    arena = allocate_arena(gemm.n, gemm.k, gemm.schemes, 1 + gemm.gated, device)
    whole = arena.data[: len(arena.data) // 8 * 8].view(torch.int64)
    for part in whole.split(1 << 27):
        part.random_(generator=generator)
    for at, (payload, scale, zero) in enumerate(arena.starts):
        scheme = gemm.schemes[at % len(gemm.schemes)]
        held, (scales, zeros) = payload_bytes(scheme, gemm.n, gemm.k), meta_bytes(scheme, gemm.n, gemm.k)
        _fill(arena.data[payload : payload + held], scheme, gemm.k, generator)
        _fill_scales(arena.data[scale : scale + scales], scheme, gemm.k, generator)
        second = arena.data[zero : zero + zeros]
        if scheme.integer_scales:
            # the largest multiplier of a channel is 16: here the first
            second.random_(1, 17, generator=generator)
            second[: zeros // 64 * 64].view(-1, 64)[:: -(-gemm.k // 128)] = 16
        else:
            second.view(_scale_type(scheme)).fill_(2.0 ** (scheme.weight_bits - 1))
    return Matrices(gemm, arena, None)


def _scale_type(scheme: Scheme) -> torch.dtype:
    """How scales lie in an arena."""
    return torch.float32 if scheme.group_size is None or scheme.integer_scales else torch.bfloat16


def _fill(payload: Tensor, scheme: Scheme, k: int, generator: torch.Generator) -> None:
    """Floats are drawn; integers keep their random bits."""
    if scheme.weight_format == "int":
        return
    dtype = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}[scheme.weight_format]
    values = payload.view(dtype)
    spread = 32.0 if scheme.weight_format == "e4m3" else k**-0.5
    drawn = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    values.copy_(drawn.normal_(0, spread, generator=generator))


def _fill_scales(scales: Tensor, scheme: Scheme, k: int, generator: torch.Generator) -> None:
    if not len(scales):
        return
    spread = 32.0 if scheme.weight_format == "e4m3" else 2.0**scheme.weight_bits / 12**0.5
    spread *= 9.0 if scheme.integer_scales else 1.0  # what multipliers add
    values = scales.view(_scale_type(scheme))
    drawn = (0.5 + torch.rand(values.shape, generator=generator, device=values.device)) * k**-0.5 / spread
    values.copy_(drawn.to(torch.bfloat16))  # times an integer it is still exact


def seen_rows(rows: Tensor, scheme: Scheme) -> Tensor:
    """Activations [rows, k] as a linear in this scheme sees them, float32."""
    codes, scale = quantize_activation(rows, scheme)
    return codes.float() * scale.repeat_interleave(codes.shape[-1] // scale.shape[-1], dim=-1)


def dense(arena: Arena, expert: int) -> Tensor:
    """One expert's weights, float32 [matrices x n, k]."""
    return torch.cat([dequantize(arena.read(matrix, expert)) for matrix in range(arena.matrices)])


@dataclass(frozen=True, eq=False)
class Product:
    """gate_up or down, alone."""

    cell: Cell
    matrices: Matrices

    def bind(self, x: Tensor, ids: Tensor, weights: Tensor) -> Bound:
        """
        Make schedule and rows; `x` is by token for gate_up, by token and slot for down.

        Rows are made before, as for the peers, in the order in which the kernel reads them.
        """
        del weights
        gemm, is_entry = self.matrices.gemm, self.cell.part == "gate_up"
        config = config_for(gemm, self.cell.tokens, ids.shape[1], x.device)
        dispatch = Dispatch(len(gemm.schemes), ids.shape[1], len(ids), (classes_of(gemm, config)[0],))
        tables = allocate(dispatch, ids.device)
        build(tables, ids)
        order = tables.table("row_of").long()
        inputs = x if is_entry else x[order]
        is_spread = is_entry and reads_sorted(config)
        read = sort_rows(tables, x, gemm.row_kinds) if is_spread else make_rows(inputs, gemm.row_kinds)
        parts = max(config.shape(scheme).parts for scheme in gemm.distinct)
        dtype = torch.float32 if parts > 1 else x.dtype
        out = torch.empty((parts, dispatch.rows, gemm.n), dtype=dtype, device=x.device)
        epilogue = EPILOGUE if is_entry else Epilogue()

        def launch() -> Tensor:
            run_gemm(self.matrices, config, read, tables, 0, out, epilogue, gather=is_entry and not is_spread)
            return out

        return Bound(launch, partial(self._check, launch, inputs, order, ids), say(config))

    def _check(self, launch: Callable[[], Tensor], inputs: Tensor, order: Tensor, ids: Tensor) -> float:
        gemm, found = self.matrices.gemm, launch().sum(0)
        valid = int((ids < len(gemm.schemes)).sum())
        picked = torch.from_numpy(sample(valid, 32)).to(found.device) if valid else order[:0]
        flat = order[picked]
        experts = ids.flatten()[flat]
        exact = torch.empty((len(picked), gemm.n), dtype=torch.float32, device=found.device)
        for expert in experts.unique().tolist():
            mine = experts == expert
            rows = inputs[flat[mine] // ids.shape[1]] if gemm.gated else inputs[picked[mine]]
            sums = seen_rows(rows, gemm.schemes[expert]) @ dense(self.matrices.arena, expert).T
            exact[mine] = silu_mul(sums) if gemm.gated else sums
        return relative_error(found[picked], exact) if valid else 0.0


@dataclass(frozen=True, eq=False)
class Experts:
    """A bank of routed experts."""

    cell: Cell
    bank: Bank

    def bind(self, x: Tensor, ids: Tensor, weights: Tensor) -> Bound:
        """Everything is part of the launch."""
        configs = self.bank.configs(*ids.shape)
        first, second = self.bank.entries[0].arena, self.bank.down.arena

        def launch() -> Tensor:
            return self.bank.run(x, ids, weights, configs)["out"]

        def check() -> float:
            return check_block(launch(), ids, weights, x, partial(dense, first), partial(dense, second), silu_mul)

        return Bound(launch, check, " | ".join(map(say, configs)))


def say(config: Config) -> str:
    """Tiles of a launch, for the result file."""
    shapes = " ".join(f"{name}:{shape}" for name, shape in config.shapes)
    extra = f"p{config.per_sm}" if config.per_sm else ""
    return f"w{config.warps}{extra} {shapes}"


def prepare(cell: Cell, plan: Sequence[Sequence[str]], device: str, seed: int) -> Product | Experts:
    """Random weights for a cell; `plan` has a scheme for each expert of each product."""
    model = cell.model
    schemes = [tuple(Scheme.parse(name) for name in product) for product in plan]
    gate_up = partial(Gemm, model.intermediate, model.hidden, gated=True)
    down = partial(Gemm, model.hidden, model.intermediate)
    if cell.part != "block":
        gemm = (gate_up if cell.part == "gate_up" else down)(schemes[0])
        return Product(cell, random_matrices(gemm, device, seed))
    entry = random_matrices(gate_up(schemes[0]), device, seed)
    last = random_matrices(down(schemes[1]), device, seed + 1)
    names = (("gate", "up"), ("down",))
    return Experts(cell, Bank(model.experts, (entry,), names, ((), ()), "silu", {}, last))
