"""From a lowered module and weights to packed banks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from xdsl.ir import SSAValue

from mxmoe.backends.numba import kernels
from mxmoe.backends.numba.executable import Bank, GroupGemm, NumbaExecutable
from mxmoe.backends.numba.layout import ArenaBuilder
from mxmoe.errors import BadWeightShape, NotLowered
from mxmoe.ir import Bank as BankOps
from mxmoe.ir import GroupGemmOp, ModuleOp, MoeOp, Scheme, Tile, banks, moe_ops
from mxmoe.quant import pack
from mxmoe.target import WeightSource

DEFAULT_TILE = Tile(64, 64, 64)
"""For modules that went without choose-tiles: the decoded chunk, 16 KiB, leaves the first-level cache room for rows."""

_LONGEST_CHUNK = 512
_MISSING = {
    "lifted": "apply-plan, lower-to-group-gemm",
    "annotated": "allocate-bits, lower-to-group-gemm",
    "allocated": "lower-to-group-gemm",
}


@dataclass(frozen=True)
class NumbaBackend:
    """
    Runs lowered blocks on the CPU from packed weights: integers by integers, weight-only schemes decoded tile by tile.

    Every scheme of the grammar runs. Weights are held once, packed; a tile's decoded weights live in the first-level
    cache and nowhere else.
    """

    name = "numba"

    def ready(self) -> None:
        """See `mxmoe.target.Backend`: runs wherever numba does."""

    def supports(self, scheme: Scheme) -> bool:
        """Say whether a linear can run in this scheme: all can."""
        del scheme
        return True

    def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, NumbaExecutable]:
        """
        Pack every block's weights: block name -> executable.

        Raises:
            NotLowered: a block still has linears; nothing has been packed then.
            BadWeightShape: a weight is not what the module says.
        """
        blocks = moe_ops(module)
        for moe in blocks:
            if moe.stage != "lowered":
                raise NotLowered(backend=self.name, block=moe.block, stage=moe.stage, missing=_MISSING[moe.stage])
        for moe in blocks:
            for op in moe.body.block.ops:
                if isinstance(op, GroupGemmOp):
                    _bias(op, weights)  # refuse a wrong one before packing, which takes long
        return {moe.block: _compile_block(moe, weights) for moe in blocks}


def _compile_block(moe: MoeOp, weights: WeightSource) -> NumbaExecutable:
    compiled = {name: _compile_bank(bank, moe, weights) for name, bank in banks(moe).items()}
    return NumbaExecutable(moe.block, moe.hidden, compiled)


def _compile_bank(bank: BankOps, moe: MoeOp, weights: WeightSource) -> Bank:
    entries = [gemm for gemm in bank.gemms if gemm.role != "down"]
    down = next(gemm for gemm in bank.gemms if gemm.role == "down")
    made_by: dict[SSAValue, tuple[int, int]] = {
        result: (i, j) for i, gemm in enumerate(entries) for j, result in enumerate(gemm.outs)
    }
    return Bank(
        experts=bank.experts,
        entries=tuple(_compile_gemm(gemm, moe, weights) for gemm in entries),
        act_inputs=tuple(made_by[value] for value in bank.act.inputs),
        act=bank.act.kind,
        act_params=bank.act.params,
        hadamard=bank.act.hadamard,
        down=_compile_gemm(down, moe, weights),
    )


def _compile_gemm(gemm: GroupGemmOp, moe: MoeOp, weights: WeightSource) -> GroupGemm:
    assert gemm.choice is not None, f"{gemm.role} of {moe.block} is lowered"
    schemes = [moe.candidates[int(index)] for index in gemm.choice.array]
    tiles = _tiles(gemm)
    builder = ArenaBuilder(gemm.n, gemm.k, schemes, len(gemm.weights), _bias(gemm, weights))
    for number, name in enumerate(gemm.weights):
        for expert, scheme in enumerate(schemes):
            packed = pack(weights.quantized(name, expert, scheme))
            if (packed.n, packed.k) != (gemm.n, gemm.k):
                found, wanted = [packed.n, packed.k], [gemm.n, gemm.k]
                raise BadWeightShape(name=f"{name}[{expert}]", found=found, wanted=wanted)
            builder.put(number, expert, packed)
    arena = builder.build()
    chunks = [min(max(tile.k // 8, 1) * 8, _LONGEST_CHUNK) for tile in tiles]
    arena.matrices[:, kernels.CHUNK] = chunks * len(gemm.weights)
    return GroupGemm(arena, gemm.n, tiles, gemm.weights, gemm.biases)


def _tiles(gemm: GroupGemmOp) -> tuple[Tile, ...]:
    if gemm.tile is None:
        return (DEFAULT_TILE,) * gemm.experts
    return tuple(gemm.tiles[int(index)] for index in gemm.tile.array)


def _bias(gemm: GroupGemmOp, weights: WeightSource) -> np.ndarray | None:
    """Biases of all weights [weights, experts, n] in float32, or None."""
    if not gemm.biases:
        return None
    stacked: list[torch.Tensor] = []
    for name in gemm.biases:
        bias = weights[name]
        if tuple(bias.shape) != (gemm.experts, gemm.n):
            raise BadWeightShape(name=name, found=list(bias.shape), wanted=[gemm.experts, gemm.n])
        stacked.append(bias.detach().to(torch.float32))
    return torch.stack(stacked).numpy()
