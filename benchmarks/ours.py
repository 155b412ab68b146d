"""
Our kernels as contenders.

`ours_<scheme>` runs all experts in one scheme, `ours_<plan>` runs a plan of `moe_plans.py` in one launch per product.
For comparison, `..._split` runs the same plan with one launch per scheme, one after the other, and `..._streams` runs
those launches side by side on streams of their own. `random_bank.py` makes weights and launches.
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
from moe_workloads import PARTS, Cell, Rotation, copies_needed, fixed_rotations, plan_copies, rotations
from torch import Tensor

UNIFORM = (
    "bf16",
    "w8a8_sym",
    "w8a8_e4m3",
    "w4a16_g128_asym",
    "w4a16_sym",
    "w4a8_g128_sym",
    "w4a8_sym",
    "w4a8_g128_sym_e4m3",
    "w4a8_g128_sym_iscale",
)
MIXES = ("hot:0.25", "bits:5")
APART, WAYS = ("hot:0.25",), ("split", "streams")
"""Plans that are also launched scheme by scheme, and how."""


def prepare(cell: Cell, plan: Plan, device: str, seed: int) -> Any:  # noqa: ANN401  # Triton may not be there
    """Packed random weights: an object whose `bind(x, ids, weights)` gives `launch`, `check` and `config`."""
    try:
        if device == "cpu":  # kernels are interpreted, which must be known before they are imported
            importlib.import_module("mxmoe.backends.triton.mode").choose_mode()
        bank = importlib.import_module("random_bank")
    except ImportError as error:
        raise Unsupported(f"no kernels: {error}") from error
    return bank.prepare(cell, plan, device, seed)


def _index(turn: Rotation) -> Tensor:
    return turn.ids.to(torch.int64)


def _prepared(bound: Sequence[Any], turns: Sequence[Rotation], note: str = "") -> Prepared:
    first = bound[0]
    return Prepared([one.launch for one in bound], first.check, turns[0].counts, f"{note} {first.config}".strip())


def uniform(scheme: str, cell: Cell, device: str) -> Prepared:
    """All experts in one scheme, over rotations of the routing."""
    bits, plan = SCHEMES[scheme][0], plan_of(f"all:{scheme}", cell)
    turns = rotations(cell, bits, copies=copies_needed(cell, bits), device=device)
    sets = [prepare(cell, plan, device, seed) for seed in range(1 + max(turn.copy for turn in turns))]
    x = tokens_of(cell, device)
    return _prepared([sets[turn.copy].bind(x, _index(turn), turn.weights) for turn in turns], turns)


def mixed(name: str, cell: Cell, device: str) -> Prepared:
    """A plan in one launch per product; as many copies of all weights as keep the active ones out of the cache."""
    plan = plan_of(name, cell)
    turns = fixed_rotations(cell, plan_copies(cell, mean_bits(plan)), device=device)
    x = tokens_of(cell, device)
    bound = [prepare(cell, plan, device, turn.copy).bind(x, _index(turn), turn.weights) for turn in turns]
    ready = _prepared(bound, turns, f"{name} {mean_bits(plan):.3f} bits")
    ready.roof_us = plan_roofline_us(cell, ready.counts, plan)
    ready.weight_bytes = plan_bytes(cell, ready.counts, plan)
    return ready


def split(name: str, beside: bool, cell: Cell, device: str) -> Prepared:
    """The same plan with one launch per scheme: experts of other schemes are padding to it."""
    plan = plan_of(name, cell)
    schemes = sorted(set(plan[0]))
    turns = fixed_rotations(cell, plan_copies(cell, mean_bits(plan)), device=device)
    x = tokens_of(cell, device)
    parts = [
        [
            prepare(cell, plan_of(f"all:{scheme}", cell), device, turn.copy).bind(
                x, _masked(_index(turn), plan[0], scheme), turn.weights
            )
            for scheme in schemes
        ]
        for turn in turns
    ]
    streams = [torch.cuda.Stream() for _ in schemes[1:]] if beside and device == "cuda" else []
    launches = [functools.partial(_all, [one.launch for one in own], streams) for own in parts]
    counts = turns[0].counts
    roof, moved = plan_roofline_us(cell, counts, plan), plan_bytes(cell, counts, plan)
    note = f"{name} {len(schemes)} launches"
    return Prepared(launches, lambda: max(one.check() for one in parts[0]), counts, note, roof, moved)


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
    for name in MIXES:
        launches = {"": (functools.partial(mixed, name), PARTS)}
        if name in APART:
            launches |= {f"_{way}": (functools.partial(split, name, way == "streams"), PARTS[:2]) for way in WAYS}
        for suffix, (make, parts) in launches.items():
            title = f"ours_{name.replace(':', '').replace('.', '')}{suffix}"
            found.append(Contender(title, "mixed", name, _mean(name), 1.0, "int8", make, parts, is_peer=False))
    return found
