"""From a module to the picture of its launches: tiles by the rule, placed by simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mxmoe.cost import CostModel, Gemm, block_launches, in_order, lay_tiles, plan_launch, start_times
from mxmoe.errors import EmptyPicture
from mxmoe.ir import ModuleOp, moe_ops
from mxmoe.passes import find_cost_model
from mxmoe.report.gantt import Timeline, draw_timelines


def draw_schedule(module: ModuleOp, *, device: str, tokens: int, block: str | None = None) -> Figure:
    """
    Draw the two launches of one block of an allocated or lowered module, as the device's best cost model predicts them.

    Rows per expert are those that the block's frequencies let expect of `tokens` tokens; `block` None is the first.

    Raises:
        EmptyPicture: no such block in the module.
        UnknownName: no such device.
        BadWorkload: no scheme chosen yet, a scheme that the device cannot run, or fewer than one token.
    """
    blocks = {moe.block: moe for moe in moe_ops(module)}
    chosen = next(iter(blocks), None) if block is None else block
    if chosen is None or chosen not in blocks:
        known = ", ".join(list(blocks)[:8]) or "none"
        raise EmptyPicture(what=f"the schedule of {chosen}", reason=f"the module has no such block; it has {known}")
    model = find_cost_model("auto", device)
    launches = block_launches(blocks[chosen], tokens)
    panels = [_timeline(name, model, gemms) for name, gemms in zip(("gate and up", "down"), launches, strict=True)]
    title = f"{chosen}, {tokens} tokens on {model.device.title} ({model.name})"
    return draw_timelines(panels, title=title)


def _timeline(name: str, model: CostModel, gemms: Sequence[Gemm]) -> Timeline:
    plan = plan_launch(model, gemms)
    tiles = lay_tiles(model, plan, gemms)
    slots = model.device.sms
    found = in_order(tiles.duration_us, slots)
    slot = np.array(found.assignment, dtype=np.int64)
    labels = [
        f"{one.scheme} m{one.tile.m}n{one.tile.n} of {gemms[one.gemm].n} x {gemms[one.gemm].k}"
        + (f" in {one.parts} parts" if one.parts > 1 else "")
        for one in plan.classes
    ]
    start = start_times(tiles.duration_us, found.assignment)
    return Timeline(name, slot, start, tiles.duration_us, tiles.class_of, tuple(labels), slots)
