"""What a launch is given: weights on the device, rows as the bodies read them, and what becomes of the sums."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mxmoe.backends.triton.int4_experts import Int4Experts
from mxmoe.backends.triton.layout import Arena
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.quant import Quantized


@dataclass(frozen=True, eq=False)
class Matrices:
    """The weights of one GEMM on the device."""

    gemm: Gemm
    arena: Arena
    bias: Tensor | None
    """float32 [matrices, experts, n]."""
    int4: tuple[Int4Experts, ...] = ()
    """Experts of the schemes that are `apart`, whose weights are not in the arena."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales, zero points and biases."""
        held = self.arena.data.nbytes + sum(one.nbytes for one in self.int4)
        return held + (0 if self.bias is None else self.bias.nbytes)

    def read(self, matrix: int, lane: int) -> Quantized:
        """Give the weights of one expert back as they were put in."""
        scheme = self.gemm.schemes[lane]
        for experts in self.int4:
            if experts.weights.scheme == scheme:
                return experts.read(matrix, lane)
        return self.arena.read(matrix, lane)

    def alone(self, matrix: int) -> Matrices:
        """Give one of the matrices that share the rows, by itself."""
        lanes = len(self.gemm.schemes)
        starts = self.arena.starts[matrix * lanes : (matrix + 1) * lanes]
        arena = replace(self.arena, matrices=1, base=self.arena.base[matrix : matrix + 1], starts=starts)
        bias = None if self.bias is None else self.bias[matrix : matrix + 1]
        return Matrices(replace(self.gemm, gated=False), arena, bias, tuple(one.alone(matrix) for one in self.int4))


@dataclass(frozen=True)
class Rows:
    """Activations as the bodies read them, one entry for each kind of rows."""

    codes: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums: `none` leaves them."""

    act: str = "none"
    params: tuple[float, ...] = ()

    @property
    def pair(self) -> tuple[float, float]:
        """Two numbers, whatever the kind takes."""
        filled = (*self.params, 0.0, 0.0)
        return filled[0], filled[1]
