"""Small blocks to run: random weights for a shape, its module at any stage, and what a router may send to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxmoe.ir import BlockShape, LinearOp, ModuleOp, Scheme, Stage, Table, banks, build_module, moe_ops
from mxmoe.passes import Environment, LowerToGroupGemm
from mxmoe.quant import Weights


@dataclass(frozen=True, eq=False)
class Routed:
    """What a router says about some tokens."""

    index: Tensor
    """int64 [tokens, top_k]; the number of experts means padding."""
    weights: Tensor
    """float32 [tokens, top_k]."""
    kind: str = "given"
    """How it was drawn, for messages."""

    def __repr__(self) -> str:
        return f"Routed({self.kind}: {self.index.tolist()})"


def random_weights(shapes: Sequence[BlockShape], seed: int = 0) -> Weights:
    """
    Draw normal weights for blocks, of the size that keeps activations near 1: float32, biases included.

    Every fourth expert has one channel 20 times as large, as real experts do: quantizing per channel then differs
    visibly from quantizing in groups.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for shape in shapes:
        for bank in shape.banks:
            for role, name in bank.weights.items():
                n, k = (shape.hidden, bank.intermediate) if role == "down" else (bank.intermediate, shape.hidden)
                weight = torch.randn((bank.experts, n, k), generator=generator) / k**0.5
                weight[::4, :, k // 2] *= 20
                tensors[name] = weight
                if role in bank.biases:
                    tensors[bank.biases[role]] = torch.randn((bank.experts, n), generator=generator)
    return Weights(tensors)


def at_stage(shapes: Sequence[BlockShape], stage: Stage, candidates: Sequence[Scheme], seed: int = 0) -> ModuleOp:
    """
    Build the module of some blocks at a stage, with random annotations and choices; gate and up choose alike or not.

    One candidate gives a uniform module.
    """
    module = build_module(shapes, candidates)
    rng = np.random.default_rng(seed)
    if stage == "lifted":
        return module
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            per_expert = rng.random(bank.experts).astype(np.float32)
            bank.route.set_table("frequency", Table(("expert",), per_expert * bank.top_k))
            bank.route.set_table("mass", Table(("expert",), per_expert))
            tie = bool(rng.integers(2))
            for op in bank.linears.values():
                _annotate(op, len(candidates), rng)
            if stage != "annotated":
                for role, op in bank.linears.items():
                    choice = rng.integers(len(candidates), size=bank.experts).astype(np.int8)
                    alike = tie and role == "up" and "gate" in bank.linears
                    op.set_table("choice", bank.linears["gate"].choice if alike else Table(("expert",), choice))
        moe.stage = "annotated" if stage == "annotated" else "allocated"
    if stage == "lowered":
        LowerToGroupGemm().run(module, Environment())
    module.verify()
    return module


def _annotate(op: LinearOp, n_candidates: int, rng: np.random.Generator) -> None:
    """Fill sensitivity and cost; one entry of the cost is inf, a scheme that cannot run."""
    cost = rng.random((op.experts, n_candidates))
    if n_candidates > 1:
        cost[0, -1] = np.inf
    op.set_table("sensitivity", Table(("expert", "scheme"), rng.random((op.experts, n_candidates))))
    op.set_table("cost", Table(("expert", "scheme"), cost))
