"""From a lowered module and weights to matrices on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from xdsl.ir import SSAValue

from mxmoe.backends.triton.executable import Bank, TritonExecutable
from mxmoe.backends.triton.launch import Matrices
from mxmoe.backends.triton.layout import allocate_arena, put
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.errors import BadWeightShape
from mxmoe.ir import Bank as BankOps
from mxmoe.ir import GroupGemmOp, MoeOp, banks
from mxmoe.target import WeightSource


@dataclass(frozen=True)
class Builder:
    """Packs the banks of one block for one device."""

    moe: MoeOp
    weights: WeightSource
    device: torch.device

    def block(self) -> TritonExecutable:
        """Pack every bank."""
        made = {name: self.bank(bank) for name, bank in banks(self.moe).items()}
        return TritonExecutable(self.moe.block, self.moe.hidden, made)

    def bank(self, bank: BankOps) -> Bank:
        """Pack the GEMMs of a bank, gate before up."""
        down = next(gemm for gemm in bank.gemms if gemm.role == "down")
        made_by: dict[SSAValue, GroupGemmOp] = {out: gemm for gemm in bank.gemms for out in gemm.outs}
        entries = list(dict.fromkeys(made_by[value] for value in bank.act.inputs))
        gemms = (*entries, down)
        packed = [self.matrices(gemm) for gemm in gemms]
        return Bank(
            experts=bank.experts,
            entries=tuple(packed[:-1]),
            names=tuple(gemm.weights for gemm in gemms),
            bias_names=tuple(gemm.biases for gemm in gemms),
            act=bank.act.kind,
            act_params=bank.act.params,
            down=packed[-1],
            turn=bank.act.hadamard,
        )

    def matrices(self, op: GroupGemmOp) -> Matrices:
        """
        Quantize and pack the weights of one GEMM.

        Raises:
            BadWeightShape: a weight is not what the module says.
        """
        assert op.choice is not None, f"{op.role} of {self.moe.block} is lowered"
        schemes = tuple(self.moe.candidates[int(index)] for index in op.choice.array)
        arena = allocate_arena(op.n, op.k, schemes, len(op.weights), self.device)
        for number, name in enumerate(op.weights):
            for expert, scheme in enumerate(schemes):
                q = self.weights.quantized(name, expert, scheme)
                if (q.n, q.k) != (op.n, op.k):
                    raise BadWeightShape(name=f"{name}[{expert}]", found=[q.n, q.k], wanted=[op.n, op.k])
                put(arena, number, expert, q)
        gemm = Gemm(op.n, op.k, schemes, gated=len(op.weights) == 2)
        return Matrices(gemm, arena, self.bias(op))

    def bias(self, op: GroupGemmOp) -> Tensor | None:
        """Biases of all weights, float32 [matrices, experts, n], or None."""
        if not op.biases:
            return None
        stacked: list[Tensor] = []
        for name in op.biases:
            bias = self.weights[name]
            if tuple(bias.shape) != (op.experts, op.n):
                raise BadWeightShape(name=name, found=list(bias.shape), wanted=[op.experts, op.n])
            stacked.append(bias.detach().to(self.device, torch.float32))
        return torch.stack(stacked)


def compile_blocks(blocks: list[MoeOp], weights: WeightSource, device: torch.device) -> Mapping[str, TritonExecutable]:
    """Pack every block: block name -> executable."""
    return {moe.block: Builder(moe, weights, device).block() for moe in blocks}
