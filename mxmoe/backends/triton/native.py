"""
Experts on native INT4 units: which of a GEMM's they are, their weights, and their launch beside the common one.

GPUs of sm_80 to sm_89 multiply 4-bit integers, and plain Triton cannot: such experts (w4a4, one scale per channel or
per 128) leave the common launch, have their classes last in its schedule, and get a launch for each of their schemes
(`int4.py`). Everywhere else, the interpreter included, the common launch widens their codes to 8 bits: the same sums,
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxmoe.backends.triton.dispatch import Tables
from mxmoe.backends.triton.int4 import Int4Bands, Int4Options, int4_group_gemm
from mxmoe.backends.triton.int4_pack import (
    PackedInt4,
    allocate_int4,
    pack_channels,
    pack_int4,
    pack_int4_pair,
    pack_rows,
    pair,
    quantize_rows,
    runs_on_int4,
    unpack_channels,
    unpack_int4,
    unpair,
)
from mxmoe.backends.triton.launch import make_rows, run_gemm
from mxmoe.backends.triton.mode import HOPPER, arch_of, interpreting
from mxmoe.backends.triton.operands import Epilogue, Matrices, Rows
from mxmoe.backends.triton.rows import RowKind
from mxmoe.backends.triton.tiles import Config, Gemm
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized


def has_int4_units(device: torch.device) -> bool:
    """Say whether launches on a device multiply 4-bit integers: on sm_80 to sm_89, or what is told to decide so."""
    return not interpreting() and arch_of(device) < HOPPER


def native_schemes(gemm: Gemm, act: str) -> tuple[Scheme, ...]:
    """
    Name the schemes of a GEMM that INT4 units run, on a device that has them.

    The launch ends with the nonlinearity `act` of a gate and an up, whole sixteens of channels, or with sums ("none").
    """
    fits = gemm.n % 16 == 0 and act != "none" if gemm.gated else act == "none"
    return tuple(scheme for scheme in gemm.distinct if fits and gemm.always is None and runs_on_int4(scheme))


@dataclass(frozen=True, eq=False)
class Int4Experts:
    """The experts of one scheme that run on INT4 units."""

    group: int
    """Their group in the tilings of the GEMM."""
    weights: PackedInt4
    """Gate and up of an expert in turn, where the GEMM is gated (`int4_pack.pair`)."""
    slot: Tensor
    """int32 [lanes], expert -> its place among the weights; 0 for those of other schemes."""
    bias: Tensor | None
    """float32 [slots, channels] as `pack_channels` orders them."""
    is_paired: bool

    @classmethod
    def allocate(cls, gemm: Gemm, scheme: Scheme, bias: Tensor | None, device: torch.device) -> Int4Experts:
        """Make room for the weights, and take the biases float32 [matrices, lanes, n]."""
        lanes = [lane for lane, one in enumerate(gemm.schemes) if one == scheme]
        slot = torch.zeros(len(gemm.schemes), dtype=torch.int32)
        slot[lanes] = torch.arange(len(lanes), dtype=torch.int32)
        if bias is not None:
            mine = bias[:, lanes]
            bias = pack_channels(pair(mine[0], mine[1]) if gemm.gated else mine[0])
        weights = allocate_int4(scheme, gemm.n * (1 + gemm.gated), gemm.k, len(lanes), device)
        return cls(gemm.distinct.index(scheme), weights, slot.to(device), bias, gemm.gated)

    def put(self, lane: int, matrices: Sequence[Quantized]) -> None:
        """Pack the matrices of one expert: gate and up, or one."""
        one = pack_int4_pair(matrices[:1], matrices[1:]) if self.is_paired else pack_int4(matrices)
        at = int(self.slot[lane])
        self.weights.words[at], self.weights.scale[at] = one.words[0], one.scale[0]

    def read(self, matrix: int, lane: int) -> Quantized:
        """Give one matrix of an expert back as it was put in."""
        at = int(self.slot[lane])
        words, scale = self.weights.words[at : at + 1], self.weights.scale[at : at + 1]
        found = unpack_int4(replace(self.weights, words=words, scale=scale))[0]
        if not self.is_paired:
            return found
        assert found.scale is not None, f"{found.scheme} has scales"
        codes, scales = (unpair(values.T)[matrix].T.contiguous() for values in (found.codes, found.scale))
        return Quantized(found.scheme, codes, scales)

    def alone(self, matrix: int) -> Int4Experts:
        """Give one of gate and up, by itself."""
        if not self.is_paired:
            return self
        lanes = [int((self.slot == at).nonzero()[-1]) for at in range(len(self.weights.words))]
        weights, bias = pack_int4([self.read(matrix, lane) for lane in lanes]), self.bias
        if bias is not None:
            bias = pack_channels(unpair(unpack_channels(bias, self.weights.n))[matrix])
        return replace(self, weights=weights, bias=bias, is_paired=False)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales, padding included."""
        return self.weights.nbytes

    def run(
        self, x: Tensor, tables: Tables, which: int, out: Tensor, epilogue: Epilogue, *, gather: bool, turn: int
    ) -> None:
        """Quantize rows [rows, k], turned first by blocks of `turn` channels if that is not 0, and multiply them."""
        scheme = self.weights.scheme
        if turn:
            made = make_rows(x, (RowKind.of(scheme),), turn)
            words, scale = pack_rows(made.codes[0]), made.scales[0]
        else:
            words, scale = quantize_rows(x, scheme)
        options = Int4Options(gather, epilogue.act if self.is_paired else None, epilogue.pair)
        bands = Int4Bands.of(tables, which, self.group, self.slot)
        int4_group_gemm(words, scale, self.weights, bands, out, bias=self.bias, options=options)


def multiply(
    matrices: Matrices, config: Config, rows: Rows, tables: Tables, which: int, out: Tensor, epilogue: Epilogue,
    *, gather: bool, x: Tensor, turn: int = 0, few_next: bool = False,
) -> None:  # fmt: skip
    """
    Multiply every scheduled row by its expert's weights: the common launch, and one for each scheme on INT4 units.

    Args:
        matrices, config, tables, which, out, epilogue, gather, few_next: as for `launch.run_gemm`.
        rows: `x` in the kinds of rows of the common launch.
        x: [rows, k], which experts on INT4 units quantize for themselves, turned by blocks of `turn` channels.
    """
    if matrices.gemm.row_kinds:
        run_gemm(matrices, config, rows, tables, which, out, epilogue, gather=gather, few_next=few_next)
    for experts in matrices.int4 if len(x) else ():
        experts.run(x, tables, which, out[0], epilogue, gather=gather, turn=turn)
