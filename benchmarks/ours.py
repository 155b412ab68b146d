"""
Our kernels as contenders: one file that knows how `mxmoe.backends.triton.bench` is called, and nothing else does.

`ours_<scheme>` runs all experts in one scheme, `ours_<plan>` runs a plan of `moe_plans.py` in one launch per product.
For comparison, `..._split` runs the same plan with one launch per scheme, one after the other, and `..._streams` runs
those launches side by side on streams of their own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from moe_contender import Contender, Prepared, Unsupported
from moe_operands import tokens_of
from moe_plans import SCHEMES, Plan, mean_bits, plan_bytes, plan_of, plan_roofline_us
from moe_workloads import (
    PARTS,
    Cell,
    Rotation,
    copies_needed,
    fixed_rotations,
    plan_copies,
    relative_error,
    rotations,
)
from torch import Tensor

UNIFORM = ("bf16", "w8a8_sym", "w8a8_e4m3", "w4a16_g128_asym", "w4a16_sym", "w4a8_g128_sym")
MIXES = ("hot:0.25", "bits:5")
SAMPLE = 48


# --- the calls that depend on the backend ----------------------------------------------------------------------------


def _bench() -> Any:  # noqa: ANN401  # a module that may not be there
    try:
        return importlib.import_module("mxmoe.backends.triton.bench")
    except ImportError as error:
        raise Unsupported(f"no mxmoe.backends.triton.bench: {error}") from error


def prepare(cell: Cell, plan: Plan, seed: int) -> Any:  # noqa: ANN401  # as above
    """
    Make packed random weights for the cell on the GPU.

    What comes back has `run(hidden, top_k_index, top_k_weights)`, which may be captured in a CUDA graph, and
    `reference(rows)`, those rows of the last run's output in float32 from dequantized weights.
    """
    bench, model = _bench(), cell.model
    shapes = [
        bench.GemmShape(experts=model.experts, k=k, n=n, top_k=model.top_k, fused_gate_up=part == "gate_up")
        for part, (n, k) in zip(PARTS if cell.part == "block" else (cell.part,), cell.gemms, strict=False)
    ]
    if cell.part == "block":
        return bench.prepare_block(shapes[0], shapes[1], list(plan[0]), list(plan[1]), tokens=cell.tokens, seed=seed)
    return bench.prepare(shapes[0], list(plan[0]), tokens=cell.tokens, seed=seed)


def launch(ready: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # noqa: ANN401  # as above
    """One run; ids are int64, an id equal to the number of experts is padding."""
    return ready.run(x, ids, weights)


def error_of(ready: Any, out: Tensor) -> float:  # noqa: ANN401  # as above
    """Relative error of a sample of rows against float32."""
    count = out.shape[0]
    rows = torch.linspace(0, count - 1, min(count, SAMPLE), device=out.device).round().long().unique()
    return relative_error(out[rows], ready.reference(rows))


# --- contenders ------------------------------------------------------------------------------------------------------


def _index(turn: Rotation) -> Tensor:
    return turn.ids.to(torch.int64)


def uniform(scheme: str, cell: Cell, device: str) -> Prepared:
    """All experts in one scheme, over rotations of the routing."""
    bits, plan = SCHEMES[scheme][0], plan_of(f"all:{scheme}", cell)
    copies = copies_needed(cell, bits)
    turns = rotations(cell, bits, copies=copies, device=device)
    sets = [prepare(cell, plan, seed) for seed in range(copies)]
    x = tokens_of(cell, device)
    launches = [functools.partial(launch, sets[turn.copy], x, _index(turn), turn.weights) for turn in turns]
    return Prepared(launches, lambda: error_of(sets[turns[0].copy], launches[0]()), turns[0].counts)


def mixed(name: str, cell: Cell, device: str) -> Prepared:
    """A plan in one launch per product; as many copies of all weights as keep the active ones out of the cache."""
    plan = plan_of(name, cell)
    copies = plan_copies(cell, mean_bits(plan))
    turns = fixed_rotations(cell, copies, device=device)
    sets = [prepare(cell, plan, seed) for seed in range(copies)]
    x = tokens_of(cell, device)
    launches = [
        functools.partial(launch, own, x, _index(turn), turn.weights) for own, turn in zip(sets, turns, strict=True)
    ]
    counts = turns[0].counts
    return Prepared(
        launches,
        lambda: error_of(sets[0], launches[0]()),
        counts,
        f"{name} {mean_bits(plan):.3f} bits",
        plan_roofline_us(cell, counts, plan),
        plan_bytes(cell, counts, plan),
    )


def split(name: str, beside: bool, cell: Cell, device: str) -> Prepared:
    """The same plan with one launch per scheme: experts of other schemes are padding to it."""
    plan = plan_of(name, cell)
    schemes = sorted(set(plan[0]))
    copies = plan_copies(cell, mean_bits(plan))
    turns = fixed_rotations(cell, copies, device=device)
    x = tokens_of(cell, device)
    parts: list[list[Callable[[], Tensor]]] = []
    readies: list[list[Any]] = []
    for seed, turn in enumerate(turns):
        readies.append([prepare(cell, plan_of(f"all:{scheme}", cell), seed) for scheme in schemes])
        ids = [_masked(_index(turn), plan[0], scheme) for scheme in schemes]
        parts.append(
            [functools.partial(launch, r, x, own, turn.weights) for r, own in zip(readies[-1], ids, strict=True)]
        )
    streams = [torch.cuda.Stream() for _ in schemes[1:]] if beside and device == "cuda" else []
    launches = [functools.partial(_all, own, streams) for own in parts]

    def check() -> float:
        errors = [error_of(ready, call()) for ready, call in zip(readies[0], parts[0], strict=True)]
        return max(errors)

    counts = turns[0].counts
    roof, moved = plan_roofline_us(cell, counts, plan), plan_bytes(cell, counts, plan)
    return Prepared(launches, check, counts, f"{name} {len(schemes)} launches", roof, moved)


def _masked(ids: Tensor, schemes: Sequence[str], scheme: str) -> Tensor:
    mine = torch.tensor([own == scheme for own in schemes], device=ids.device)
    return torch.where(mine[ids], ids, len(schemes))


def _all(calls: Sequence[Callable[[], Tensor]], streams: Sequence[Any]) -> list[Tensor]:
    """One after the other, or the later ones each on a stream that forks here and joins here."""
    if not streams:
        return [call() for call in calls]
    main = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(main)
    found = [calls[0]()]
    for stream, call in zip(streams, calls[1:], strict=True):
        with torch.cuda.stream(stream):
            found.append(call())
    for stream in streams:
        main.wait_stream(stream)
    return found


def _mean(name: str) -> Callable[[Cell], float]:
    return lambda cell: mean_bits(plan_of(name, cell))


def ours() -> list[Contender]:
    """Every contender of ours; whether the backend is there shows when a cell is made."""
    found: list[Contender] = []
    for scheme in UNIFORM:
        bits, act_bytes, unit, weight_class = SCHEMES[scheme]
        found.append(
            Contender(
                f"ours_{scheme}", weight_class, scheme, lambda _, bits=bits: bits, act_bytes, unit,
                functools.partial(uniform, scheme), is_peer=False,
            )
        )  # fmt: skip
    gemms = PARTS[:2]
    for name in MIXES:
        short = name.replace(":", "").replace(".", "")
        for suffix, make, parts in (
            ("", functools.partial(mixed, name), PARTS),
            ("_split", functools.partial(split, name, False), gemms),
            ("_streams", functools.partial(split, name, True), gemms),
        ):
            found.append(
                Contender(
                    f"ours_{short}{suffix}", "mixed", name, _mean(name), 1.0, "int8", make, parts, is_peer=False,
                )
            )  # fmt: skip
    return found
