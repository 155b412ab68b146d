"""From a lowered module and weights to matrices on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from xdsl.ir import SSAValue

from mxmoe.backends.triton.executable import Bank, TritonExecutable
from mxmoe.backends.triton.joint import JOINED, Joint
from mxmoe.backends.triton.launch import FUSED, TURNS, Matrices
from mxmoe.backends.triton.layout import allocate_arena, arena_bytes, put
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.errors import BadWeightShape
from mxmoe.ir import Bank as BankOps
from mxmoe.ir import GroupGemmOp, MoeOp, Scheme, banks
from mxmoe.target import WeightSource


@dataclass(frozen=True)
class Builder:
    """Packs the banks of one block for one device."""

    moe: MoeOp
    weights: WeightSource
    device: torch.device

    def block(self) -> TritonExecutable:
        """Pack every bank."""
        found = banks(self.moe)
        if not can_join(found):
            made = {name: self.bank(bank, [self.device] * len(bank.gemms)) for name, bank in found.items()}
            return TritonExecutable(self.moe.block, self.moe.hidden, made)
        # matrices that one launch reads lie in one room
        pairs = list(zip(*(gemms_of(found[name]) for name in JOINED), strict=True))
        sizes = [[arena_bytes(op.n, op.k, self.schemes(op), len(op.weights)) for op in pair] for pair in pairs]
        rooms = [torch.zeros(sum(size), dtype=torch.uint8, device=self.device) for size in sizes]
        parts = zip(*(room.split(size) for room, size in zip(rooms, sizes, strict=True)), strict=True)
        made = {name: self.bank(found[name], part) for name, part in zip(JOINED, parts, strict=True)}
        joint = Joint.of(made[JOINED[0]], made[JOINED[1]], rooms)
        return TritonExecutable(self.moe.block, self.moe.hidden, made, joint)

    def bank(self, bank: BankOps, rooms: Sequence[torch.device | Tensor]) -> Bank:
        """Pack the GEMMs of a bank, gate before up, each in its room."""
        gemms = gemms_of(bank)
        packed = [self.matrices(gemm, room) for gemm, room in zip(gemms, rooms, strict=True)]
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

    def schemes(self, op: GroupGemmOp) -> tuple[Scheme, ...]:
        """Scheme of every expert."""
        assert op.choice is not None, f"{op.role} of {self.moe.block} is lowered"
        return tuple(self.moe.candidates[int(index)] for index in op.choice.array)

    def matrices(self, op: GroupGemmOp, room: torch.device | Tensor) -> Matrices:
        """
        Quantize and pack the weights of one GEMM.

        Raises:
            BadWeightShape: a weight is not what the module says.
        """
        schemes = self.schemes(op)
        arena = allocate_arena(op.n, op.k, schemes, len(op.weights), room)
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


def gemms_of(bank: BankOps) -> tuple[GroupGemmOp, ...]:
    """GEMMs of a bank: gate and up as one, or gate, or up; then down."""
    down = next(gemm for gemm in bank.gemms if gemm.role == "down")
    made_by: dict[SSAValue, GroupGemmOp] = {out: gemm for gemm in bank.gemms for out in gemm.outs}
    return (*dict.fromkeys(made_by[value] for value in bank.act.inputs), down)


def can_join(found: Mapping[str, BankOps]) -> bool:
    """
    Say whether one set of launches can run a routed and a shared bank.

    Both have gate and up in one GEMM with the same nonlinearity, and no biases. The shared expert, one, is a whole
    number of times as wide as a routed one: where k is split, both are split alike.
    """
    if tuple(sorted(found)) != JOINED or found["shared"].experts != 1:
        return False
    routed, shared = (found[name] for name in JOINED)
    if (routed.act.kind, dict(routed.act.params)) != (shared.act.kind, dict(shared.act.params)):
        return False
    pairs = [(len(gemms), len(gemms[0].weights)) for gemms in map(gemms_of, (routed, shared))]
    is_plain = not any(gemm.biases for bank in (routed, shared) for gemm in bank.gemms)
    turns = all(bank.act.hadamard in (0, *TURNS) for bank in (routed, shared))
    fits = gemms_of(shared)[0].n % gemms_of(routed)[0].n == 0
    return routed.act.kind in FUSED and pairs == [(2, 2), (2, 2)] and is_plain and turns and fits


def compile_blocks(blocks: list[MoeOp], weights: WeightSource, device: torch.device) -> Mapping[str, TritonExecutable]:
    """Pack every block: block name -> executable."""
    return {moe.block: Builder(moe, weights, device).block() for moe in blocks}
