"""From a lowered module and weights to matrices on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from xdsl.ir import SSAValue

from mxmoe.backends.triton.bank import Bank
from mxmoe.backends.triton.executable import TritonExecutable
from mxmoe.backends.triton.int4_experts import Int4Experts
from mxmoe.backends.triton.joint import JOINED, Joint
from mxmoe.backends.triton.launch import FUSED, TURNS, Matrices
from mxmoe.backends.triton.layout import allocate_arena, arena_bytes, put
from mxmoe.backends.triton.native import has_int4_units, native_schemes
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.errors import BadWeightShape
from mxmoe.ir import Bank as BankOps
from mxmoe.ir import GroupGemmOp, MoeOp, Scheme, banks
from mxmoe.quant import Quantized
from mxmoe.target import WeightSource


@dataclass(frozen=True)
class Outline:
    """Makes room for the banks of one block on one device, and leaves it empty: enough to say what it launches."""

    moe: MoeOp
    device: torch.device

    def block(self) -> TritonExecutable:
        """Make every bank."""
        found = banks(self.moe)
        apart = [self.gemm(op, bank).apart for bank in found.values() for op in gemms_of(bank)]
        if any(apart) or not can_join(found):
            made = {name: self.bank(bank, [self.device] * len(bank.gemms)) for name, bank in found.items()}
            return TritonExecutable(self.moe.block, self.moe.hidden, made)
        # matrices that one launch reads lie in one room
        pairs = list(zip(*(gemms_of(found[name]) for name in JOINED), strict=True))
        sizes = [[arena_bytes(op.n, op.k, self.schemes(op), len(op.weights)) for op in pair] for pair in pairs]
        rooms = [torch.zeros(sum(size), dtype=torch.uint8, device=self.device) for size in sizes]
        parts = zip(*(room.split(size) for room, size in zip(rooms, sizes, strict=True)), strict=True)
        made = {name: self.bank(found[name], part) for name, part in zip(JOINED, parts, strict=True)}
        joint = Joint.of(made[JOINED[0]], made[JOINED[1]], rooms, found[JOINED[0]].top_k)
        return TritonExecutable(self.moe.block, self.moe.hidden, made, joint)

    def bank(self, bank: BankOps, rooms: Sequence[torch.device | Tensor]) -> Bank:
        """Make the GEMMs of a bank, gate before up, each in its room."""
        gemms = gemms_of(bank)
        packed = [self.matrices(op, self.gemm(op, bank), room) for op, room in zip(gemms, rooms, strict=True)]
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

    def gemm(self, op: GroupGemmOp, bank: BankOps) -> Gemm:
        """Say what is multiplied, and which of its schemes INT4 units of the device run."""
        gemm = Gemm(op.n, op.k, self.schemes(op), gated=len(op.weights) == 2)
        if not has_int4_units(self.device):
            return gemm
        is_fused = op.role != "down" and len(gemms_of(bank)) == 2
        return replace(gemm, apart=native_schemes(gemm, bank.act.kind if is_fused else "none"))

    def matrices(self, op: GroupGemmOp, gemm: Gemm, room: torch.device | Tensor) -> Matrices:
        """
        Make the matrices of one GEMM.

        Raises:
            BadWeightShape: a weight is not what the module says.
        """
        bias = self.bias(op) if op.biases else None
        arena = allocate_arena(op.n, op.k, gemm.schemes, len(op.weights), room, gemm.apart)
        int4 = tuple(Int4Experts.allocate(gemm, scheme, bias, self.device) for scheme in gemm.apart)
        made = Matrices(gemm, arena, bias, int4)
        self.fill(op, made)
        return made

    def fill(self, op: GroupGemmOp, made: Matrices) -> None:
        """Put the weights in."""

    def bias(self, op: GroupGemmOp) -> Tensor:
        """Biases of all weights, float32 [matrices, experts, n]."""
        return torch.empty((len(op.biases), op.experts, op.n), device=self.device)


@dataclass(frozen=True)
class Builder(Outline):
    """Packs the banks of one block for one device."""

    weights: WeightSource

    def fill(self, op: GroupGemmOp, made: Matrices) -> None:
        """Quantize and pack every matrix."""
        native = dict(zip(made.gemm.apart, made.int4, strict=True))
        for expert, scheme in enumerate(made.gemm.schemes):
            found = [self.weight(op, name, expert, scheme) for name in op.weights]
            if scheme in native:
                native[scheme].put(expert, found)
                continue
            for number, q in enumerate(found):
                put(made.arena, number, expert, q)

    def weight(self, op: GroupGemmOp, name: str, expert: int, scheme: Scheme) -> Quantized:
        """
        Quantize one matrix.

        Raises:
            BadWeightShape: it is not what the module says.
        """
        q = self.weights.quantized(name, expert, scheme)
        if (q.n, q.k) != (op.n, op.k):
            raise BadWeightShape(name=f"{name}[{expert}]", found=[q.n, q.k], wanted=[op.n, op.k])
        return q

    def bias(self, op: GroupGemmOp) -> Tensor:
        """
        Biases of all weights, float32 [matrices, experts, n].

        Raises:
            BadWeightShape: one is not what the module says.
        """
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
    return {moe.block: Builder(moe, device, weights).block() for moe in blocks}
