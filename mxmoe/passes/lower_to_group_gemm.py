"""`lower-to-group-gemm`: one launch per GEMM of a bank, gate and up fused where they chose alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.dialects.builtin import ArrayAttr, StringAttr

from mxmoe.ir import Bank, GroupGemmOp, LinearOp, ModuleOp, TableAttr, banks, drop_experts
from mxmoe.passes.base import Environment, Pass


@dataclass(frozen=True)
class LowerToGroupGemm(Pass):
    """
    Replace linears by group GEMMs.

    Gate and up of a bank read the same rows; where every expert chose the same scheme for both they become one
    group GEMM `gate_up` with two weights, otherwise two group GEMMs. Down becomes one. Experts whose scheme is w0 leave
    the module (`drop_experts`), so that no backend knows of them. The annotations that the
    decision was made from are left behind: they are in the allocated module and in the plan.
    """

    name = "lower-to-group-gemm"
    fuse: bool = True
    """Fuse gate and up where they chose alike, and both or neither have a bias."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Lower every block; the blocks become lowered."""
        for moe in self.blocks(module, "allocated", way="allocate-bits or apply-plan makes allocated blocks"):
            for bank in banks(moe).values():
                for group in self._groups(bank):
                    _lower(group)
            drop_experts(moe)
            moe.stage = "lowered"

    def _groups(self, bank: Bank) -> list[list[LinearOp]]:
        entries = [op for role, op in bank.linears.items() if role != "down"]
        # one op has a bias for each of its weights or for none
        alike = len({(op.choice, op.bias is None) for op in entries}) == 1
        fused = [entries] if self.fuse and alike else [[op] for op in entries]
        return [*fused, [bank.linears["down"]]]


def _lower(group: Sequence[LinearOp]) -> None:
    """Put one group GEMM in place of linears that share their rows."""
    first = group[0]
    assert first.choice is not None, f"{first.weight} is allocated"
    biases = [op.bias for op in group if op.bias]
    gemm = GroupGemmOp.create(
        operands=first.operands,
        result_types=[op.out.type for op in group],
        properties={
            "role": StringAttr("_".join(op.role for op in group)),
            "weights": ArrayAttr([StringAttr(op.weight) for op in group]),
            **({"biases": ArrayAttr([StringAttr(name) for name in biases])} if biases else {}),
            "choice": TableAttr(first.choice),
        },
    )
    block = first.parent
    assert block is not None, f"{first.weight} stands in a block"
    block.insert_op_before(gemm, first)
    for op, result in zip(group, gemm.outs, strict=True):
        result.name_hint = op.out.name_hint
        op.out.replace_all_uses_with(result)
        block.erase_op(op)
