"""What is in a module, a plan or a checkpoint, in words; and a picture of who got how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mxmoe.ir import Allocation, ModuleOp, Plan, Row, Scheme, allocation_of, banks, moe_ops, rotations_of
from mxmoe.passes import histogram
from mxmoe.report.bit_map import bit_map
from mxmoe.report.figure import INK, new_figure
from mxmoe.report.picture import draw_bit_map
from mxmoe.report.table import Cell, Column, text_table

if TYPE_CHECKING:
    from mxmoe.checkpoint import Checkpoint

_SHOWN = 8
"""Blocks that are listed one by one; of more, the first ones."""


def describe_module(module: ModuleOp) -> str:
    """Say of a module at any stage: its banks, its candidates, which tables are there, and what was chosen."""
    blocks = moe_ops(module)
    columns = [Column(title) for title in ("block", "stage", "bank", "experts", "top-k", "hidden", "inner", "tables")]
    rows: list[list[Cell]] = []
    for moe in blocks[:_SHOWN]:
        for bank in banks(moe).values():
            ops = (bank.route, *bank.linears.values(), *bank.gemms)
            keys = ("frequency", "mass", "sensitivity", "cost", "choice", "tile")
            tables = [key for key in keys if any(key in op.properties for op in ops)]
            inner = next(op.k for op in (*bank.linears.values(), *bank.gemms) if op.role == "down")
            known: list[Cell] = [moe.block, moe.stage, bank.name, bank.experts, bank.top_k, moe.hidden, inner]
            rows.append([*known, ", ".join(tables) or "none"])
    lines = [text_table(columns, rows)]
    if len(blocks) > _SHOWN:
        lines.append(f"and {len(blocks) - _SHOWN} blocks more")
    for candidates in dict.fromkeys(moe.candidates for moe in blocks):
        lines.append(f"candidates: {', '.join(map(str, candidates))}")
    if counts := histogram(module):
        lines.append(f"rows per scheme: {_counts(counts)}")
    lines += _describe_rotations(rotations_of(module))
    if (allocation := allocation_of(module)) is not None:
        lines += ["", _describe_allocation(allocation)]
    return "\n".join(lines)


def describe_plan(plan: Plan) -> str:
    """Say of a plan: what it was solved for, what it reached, and how many rows have each scheme."""
    blocks = len({row.block for row in plan.rows})
    lines = [f"{len(plan.rows)} rows in {blocks} block{'s' * (blocks != 1)}: {_counts(plan.histogram())}"]
    lines += _describe_rotations(plan.rotations)
    if plan.allocation is None:
        return "\n".join([*lines, "written by hand, not solved"])
    return "\n".join([*lines, _describe_allocation(plan.allocation)])


def _describe_rotations(rotations: Mapping[tuple[str, str], int]) -> list[str]:
    """Say in how many banks what goes to down is rotated, and in which blocks; nothing if in none."""
    sizes = sorted(set(rotations.values()))
    banks_say = f"{len(rotations)} bank{'s' * (len(rotations) != 1)}"
    return [f"rotated on the way to down: {banks_say}, in blocks of {', '.join(map(str, sizes))}"] if sizes else []


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Say of a checkpoint that was read whole: what was compiled for what, its files, tensors and bytes."""
    about = checkpoint.about
    n_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    experts = sum(tensor.nbytes for key, tensor in checkpoint.tensors.items() if not key.startswith("rest/"))
    plan = Plan.from_json(checkpoint.texts["plan.json"])
    lines = [
        f"{about.get('class') or 'a module whose class was not recorded'}, compiled for {about['target']}",
        f"{len(checkpoint.tensors)} tensors, {n_bytes:,} bytes, of which {experts:,} are packed experts",
        f"files: {', '.join(sorted(checkpoint.texts))}",
        describe_plan(plan),
    ]
    return "\n".join(lines)


def draw_bits(bits: Mapping[Row, float], *, title: str, unit: str) -> Figure:
    """
    Draw one line for every block and role, gate and up in one where they are alike, and one column for every expert.

    Raises:
        EmptyPicture: there is not one routed row.
    """
    image_of = bit_map(bits, title)
    known = list(bits.values()) or [0.0]
    low, high = min(known), max(known)
    figure = new_figure(9.0, max(2.6, 1.6 + 0.2 * len(image_of.rows)))
    axes = figure.add_subplot()
    image = draw_bit_map(axes, image_of, Normalize(low - 0.5 * (low == high), high + 0.5 * (low == high)))
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40)
    bar.set_label(unit, color=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  # typed as a descriptor, is a spine
    return figure


def _describe_allocation(allocation: Allocation) -> str:
    """One line for each figure, aligned."""
    goal = ", ".join(f"{name}={value}" for name, value in allocation.objective.items())
    limits = ", ".join(f"{name} <= {limit:.12g}" for name, limit in allocation.budget.items()) or "none"
    return "\n".join(
        [
            f"budget     {limits}",
            f"objective  {allocation.value:.9g}  ({goal}; solver {allocation.solver})",
            f"bound      {allocation.bound:.9g}  (gap {allocation.gap:.2e})",
            f"loss       {allocation.loss:.9g}",
            f"time       {allocation.time_us:.9g} us",
            f"bits       {allocation.weight_bits:.4f} effective per weight",
            f"bytes      {allocation.nbytes:,.0f}",
        ]
    )


def _counts(counts: Mapping[Scheme, int]) -> str:
    return ", ".join(f"{scheme} x {count}" for scheme, count in counts.items())
