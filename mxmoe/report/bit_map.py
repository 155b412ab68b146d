"""Who got how many bits: from a module or a plan to the plain values of a bit map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mxmoe.errors import NothingChosen
from mxmoe.ir import GroupGemmOp, ModuleOp, Plan, Row, banks, moe_ops
from mxmoe.report.picture import BitMap


def plan_bits(plan: Plan) -> dict[Row, float]:
    """Row -> payload bits; a plan does not know how wide its rows are, so scales are not counted."""
    return {row: scheme.payload_bits for row, scheme in plan.rows.items()}


def module_bits(module: ModuleOp) -> dict[Row, float]:
    """
    Row -> effective bits of an allocated or lowered module.

    Raises:
        NothingChosen: a block has no choices yet.
    """
    bits: dict[Row, float] = {}
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            for op in (*bank.linears.values(), *bank.gemms):
                if op.choice is None:
                    raise NothingChosen(block=moe.block, stage=moe.stage)
                roles = op.role.split("_") if isinstance(op, GroupGemmOp) else [op.role]
                for role in roles:
                    for expert, index in enumerate(op.choice.array.tolist()):
                        row = Row(moe.block, bank.name, role, expert)
                        bits[row] = moe.candidates[index].effective_bits(op.k)
    return bits


def usage(module: ModuleOp) -> dict[str, list[int]]:
    """Block -> its routed experts from the most to the least used; empty if a block does not know its routing."""
    order: dict[str, list[int]] = {}
    for moe in moe_ops(module):
        found = banks(moe)
        frequency = (found.get("routed") or next(iter(found.values()))).route.frequency
        if frequency is None:
            return {}
        order[moe.block] = np.argsort(-frequency.array, kind="stable").tolist()
    return order


def bit_map(bits: Mapping[Row, float], title: str, order: Mapping[str, Sequence[int]] | None = None) -> BitMap:
    """
    Make one line for every block and role, gate and up in one where they are alike, and a column for every expert.

    Block names are shortened to what tells them apart. `order` (block -> experts, see `usage`) orders the columns of
    each block; without it they are in the order of their numbers. A shared bank of one is set apart.
    """
    lines: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row, value in bits.items():
        lines.setdefault((row.block, row.role), {}).setdefault(row.bank, {})[row.expert] = value
    blocks = list(dict.fromkeys(block for block, _ in lines))
    for block in blocks:
        if lines.get((block, "gate")) == lines.get((block, "up"), {}):
            lines = {(b, "gate, up") if (b, r) == (block, "gate") else (b, r): v for (b, r), v in lines.items()}
            del lines[block, "up"]
    short = dict(zip(blocks, short_names(blocks), strict=True))
    routed: list[tuple[float, ...]] = []
    for (block, _), line in lines.items():
        experts = line.get("routed") or next(iter(line.values()))
        routed.append(tuple(experts[expert] for expert in (order or {}).get(block, sorted(experts))))
    return BitMap(
        title,
        tuple(f"{short[block]} {role}".strip() for block, role in lines),
        tuple(routed),
        tuple(line["shared"][0] if {"routed", "shared"} <= line.keys() else None for line in lines.values()),
        "experts of each block, most used first" if order else "expert",
    )


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
