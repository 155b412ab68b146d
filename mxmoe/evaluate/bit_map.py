"""From an allocated module to the plain values of its bit map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mxmoe.errors import MissingInput
from mxmoe.ir import Bank, LinearOp, ModuleOp, MoeOp, banks, moe_ops
from mxmoe.report import BitMap


def bit_map(module: ModuleOp, title: str) -> BitMap:
    """
    Collect the effective bits of every row of an allocated module.

    Each block gives one row per role, or one for gate and up where all experts chose alike for both. Experts are
    ordered by how often they are used, per block, the most used first, as far as the module knows; shared experts
    with one expert are set apart.

    Raises:
        MissingInput: the module is not allocated.
    """
    labels: list[str] = []
    routed: list[tuple[float, ...]] = []
    shared: list[float | None] = []
    known = True
    blocks = moe_ops(module)
    for moe, short in zip(blocks, short_names([moe.block for moe in blocks]), strict=True):
        sides = banks(moe)
        main = sides.get("routed") or next(iter(sides.values()))
        beside = sides.get("shared") if len(sides) > 1 else None
        order, is_known = _order(main)
        known = known and is_known
        for role in _roles(main, beside):
            labels.append(f"{short} {role}".strip())
            bits = _bits(moe, main.linears[role.split(",")[0]])
            routed.append(tuple(bits[expert] for expert in order))
            shared.append(_bits(moe, beside.linears[role.split(",")[0]])[0] if beside else None)
    experts = "experts of each block, most used first" if known else "expert"
    return BitMap(title, tuple(labels), tuple(routed), tuple(shared), experts)


def short_names(names: Sequence[str]) -> list[str]:
    """
    Leave out what all dotted names share at their start and at their end.

    ["model.layers.0.mlp", "model.layers.1.mlp"] -> ["0", "1"]; a single name becomes "".
    """
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts), default=0)
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), shortest - head)
    return [".".join(p[head : len(p) - tail]) for p in parts]


def _order(bank: Bank) -> tuple[list[int], bool]:
    """Experts from the most to the least used, and whether that is known."""
    frequency = bank.route.frequency
    if frequency is None:
        return list(range(bank.experts)), False
    return np.argsort(-frequency.array, kind="stable").tolist(), True


def _roles(*sides: Bank | None) -> list[str]:
    """Roles to show: gate and up in one where every bank chose alike for both."""
    there = [bank for bank in sides if bank]
    alike = all({"gate", "up"} <= bank.linears.keys() and _alike(bank) for bank in there)
    return ["gate, up", "down"] if alike else list(there[0].linears)


def _alike(bank: Bank) -> bool:
    return bank.linears["gate"].choice == bank.linears["up"].choice


def _bits(moe: MoeOp, op: LinearOp) -> list[float]:
    """[expert], effective bits per weight."""
    if op.choice is None:
        raise MissingInput(name="bit_map", what=f"a choice of {op.weight}", way="run allocate-bits or apply-plan first")
    return [moe.candidates[index].effective_bits(op.k) for index in op.choice.array.tolist()]
