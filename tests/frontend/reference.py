"""A bank evaluated from the lifted weights by names and shapes alone: the plainest loop over assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from mxmoe.frontend import BankRun, Lifted, LiftedBlock
from mxmoe.ir import banks, moe_ops
from mxmoe.quant import apply_act


def reference(lifted: Lifted, block: LiftedBlock, bank: str) -> BankRun:
    """Give run(hidden, top_k_index, top_k_weights) for one bank, read off the IR."""
    moe = next(op for op in moe_ops(lifted.module) if op.block == block.name)
    view = banks(moe)[bank]
    held = {role: lifted.weights[op.weight] for role, op in view.linears.items()}
    bias = {role: lifted.weights[op.bias] for role, op in view.linears.items() if op.bias}

    def run(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for token, slot in torch.cartesian_prod(*map(torch.arange, top_k_index.shape)).reshape(-1, 2).tolist():
            expert = int(top_k_index[token, slot])
            if expert == view.experts:
                continue

            def linear(role: str, x: Tensor, expert: int = expert) -> Tensor:
                return held[role][expert].float() @ x + (bias[role][expert].float() if role in bias else 0)

            x = hidden[token].float()
            gate = linear("gate", x) if "gate" in held else None
            inner = apply_act(view.act.kind, gate, linear("up", x), view.act.params)
            out[token] += float(top_k_weights[token, slot]) * linear("down", inner)
        return out.to(hidden.dtype)

    return run
