"""Blocks of a routed bank and a shared expert, and what is compared of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme, Table, banks, moe_ops, rotations
from mxmoe.passes import Environment, LowerToGroupGemm
from mxmoe.quant import Weights
from mxmoe.target import Executable
from mxmoe.testing import at_stage, random_weights

from .small_blocks import DEVICE, DTYPES

HIDDEN, EXPERTS, TOP_K = 128, 5, 2


def make(
    schemes: Sequence[str], *, hidden: int = HIDDEN, wide: int = 384, narrow: int = 128, dtype: str = "bf16",
    turns: tuple[int, int] = (0, 0), act: tuple[str, str] = ("silu", "silu"),
    has_bias: bool = False, is_tied: bool = True, seed: int = 0,
) -> tuple[ModuleOp, Weights]:  # fmt: skip
    """Draw a block of two banks; the shared expert takes the last scheme, the routed ones take turns."""
    shapes: list[BankShape] = []
    for name, experts, top_k, width, kind in (
        ("routed", EXPERTS, TOP_K, narrow, act[0]),
        ("shared", 1, 1, wide, act[1]),
    ):
        names = {role: f"mlp.{name}.{role}" for role in ("gate", "up", "down")}
        biases = {role: f"{one}.bias" for role, one in names.items()} if has_bias else {}
        shapes.append(BankShape(name, experts, top_k, width, kind, True, names, biases))  # pyright: ignore
    block = BlockShape("mlp", hidden, tuple(shapes), dtype)  # pyright: ignore[reportArgumentType]
    module = at_stage([block], "allocated", [Scheme.parse(one) for one in schemes], seed)
    for moe in moe_ops(module):
        for name, turn in zip(("routed", "shared"), turns, strict=True):
            bank = banks(moe)[name]
            bank.act.hadamard = turn
            for role, op in bank.linears.items():
                first = len(schemes) - 1 if name == "shared" else int(role == "down" or (role == "up" and not is_tied))
                chosen = (np.arange(bank.experts) + first) % len(schemes)
                op.set_table("choice", Table(("expert",), chosen.astype(np.int8)))
    LowerToGroupGemm().run(module, Environment())
    module.verify()
    return module, random_weights([block], seed).rotated(rotations(module))


def draw(tokens: int, dtype: str = "bf16", seed: int = 0, width: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, some with outliers; distinct experts, or padding for about one choice of five; weights."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn((tokens, width), generator=random)
    hidden[:, seed % width] *= 20
    index = torch.rand((tokens, EXPERTS), generator=random).argsort(dim=1)[:, :TOP_K]
    index[torch.rand((tokens, TOP_K), generator=random) < 0.2] = EXPERTS
    weights = torch.rand((tokens, TOP_K), generator=random)
    return hidden.to(DTYPES[dtype]).to(DEVICE), index.contiguous().to(DEVICE), weights.to(DEVICE)


def apart(made: Executable, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Both banks, one by one."""
    alone = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
    one = torch.ones((len(hidden), 1), device=hidden.device)
    return {
        "routed": made("routed", hidden, index, weights),
        "shared": made("shared", hidden, alone, one),
    }


def far(one: Tensor, other: Tensor) -> float:
    """Distance, relative to the second."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-20))
