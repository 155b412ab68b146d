"""
The experts of one scheme on native INT4 units: their weights, packed for those units, put in and read back.

`native.py` says which they are and launches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxmoe.backends.triton.int4_pack import (
    PackedInt4,
    allocate_int4,
    pack_channels,
    pack_int4,
    pack_int4_pair,
    pair,
    unpack_channels,
    unpack_int4,
    unpair,
)
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.ir import Scheme
from mxmoe.quant import Quantized


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
