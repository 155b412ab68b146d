"""
Plans of the benchmarks: which expert runs in which scheme, reproducible from a name and the seeded routing alone.

A plan gives each expert one scheme per product. `hot:0.25` puts the quarter of the experts with most rows into int8 and
the others into w4a8; `random:7` draws schemes; `bits:5` is solved by the allocator, with the cost model of the target
and losses that are made up with the tail of real ones; `all:w8a8_sym` is one scheme for all.
Solved plans stand in `results/plans.json`, so that a machine without the compiler's dependencies can run them:

    python benchmarks/moe_plans.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import RESULTS
from moe_workloads import MODELS, PEAKS, TOKENS, Cell, Model, draw_routing
from numpy.typing import NDArray

INT8, W4A8 = "w8a8_sym", "w4a8_g128_sym_iscale"
SCHEMES = {
    # bits with scales as the roofline counts them, bytes of an activation, matrix unit, weight class
    "bf16": (16.0, 2.0, "bf16", "bf16"),
    "w8a8_sym": (8.0, 1.0, "int8", "8bit"),
    "w8a8_e4m3": (8.0, 1.0, "fp8", "8bit"),
    "w8a16_sym": (8.0, 2.0, "bf16", "8bit"),
    "w4a16_sym": (4.0, 2.0, "bf16", "4bit"),
    "w4a16_g128_sym": (4.125, 2.0, "bf16", "4bit"),
    "w4a16_g128_asym": (4.25, 2.0, "bf16", "4bit"),
    "w3a16_g128_asym": (3.25, 2.0, "bf16", "4bit"),
    "w2a16_g128_asym": (2.25, 2.0, "bf16", "4bit"),
    "w4a8_g128_sym": (4.125, 1.0, "int8", "4bit"),
    "w4a8_g128_sym_e4m3": (4.125, 1.0, "fp8", "4bit"),
    "w4a8_g128_sym_iscale": (4.0625, 1.0, "int8", "4bit"),
    "w4a8_sym": (4.0, 1.0, "int8", "4bit"),
}
RANDOM_POOL = ("w4a8_g128_sym", "w8a8_sym", "w8a8_e4m3", "w4a16_g128_asym", "w3a16_g128_asym", "w2a16_g128_asym")
LEARNT_FROM = 8192
"""Tokens of the routing that solved plans take their frequencies from."""
PLANS = RESULTS / "plans.json"
SHORT = {"4": "w4a8_g128_sym", "i": W4A8, "8": INT8, "e": "w4a8_g128_sym_e4m3", "f": "w8a8_e4m3"}
UNITS = ("48", "i8", "ef")
"""Schemes that a solved plan mixes, as letters: those of int8 products, with integer scales too, or of fp8 ones."""
BITS, TRADE = 5.0, 0.75

Plan = tuple[tuple[str, ...], ...]
"""For each product of a cell, expert -> scheme."""


def rows_of(cell: Cell) -> NDArray[np.int64]:
    """[experts] rows of each expert under the cell's own routing."""
    ids, _ = draw_routing(cell.model, cell.tokens, cell.routing)
    return np.bincount(ids.ravel(), minlength=cell.model.experts).astype(np.int64)


def hottest(rows: NDArray[np.int64], share: float) -> tuple[str, ...]:
    """The share of the experts with most rows (at least one) in int8, the others in w4a8."""
    hot = set(np.argsort(-rows, kind="stable")[: max(1, int(share * rows.size))].tolist())
    return tuple(INT8 if expert in hot else W4A8 for expert in range(rows.size))


def random_schemes(experts: int, seed: int) -> tuple[str, ...]:
    """Two to four schemes of the pool, in random shares."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(RANDOM_POOL), size=int(rng.integers(2, 5)), replace=False)
    share = rng.dirichlet(np.ones(len(kinds)))
    return tuple(RANDOM_POOL[kinds[i]] for i in rng.choice(len(kinds), size=experts, p=share).tolist())


def plan_of(name: str, cell: Cell) -> Plan:
    """
    The schemes of each product of the cell.

    Raises:
        KeyError: a solved plan that is not in the file.
    """
    kind, _, value = name.partition(":")
    if kind == "all":
        return ((value,) * cell.model.experts,) * len(cell.gemms)
    if kind == "hot":
        return (hottest(rows_of(cell), float(value)),) * len(cell.gemms)
    if kind == "random":
        return tuple(random_schemes(cell.model.experts, 1000 * int(value) + i) for i in range(len(cell.gemms)))
    if kind == "bits":
        both = json.loads(PLANS.read_text())["figures"]["plans"][f"{cell.model.name} {cell.tokens} {value}"]
        parts = {"gate_up": ("gate_up",), "down": ("down",), "block": ("gate_up", "down")}[cell.part]
        return tuple(tuple(SHORT[letter] for letter in both[part]) for part in parts)
    raise ValueError(f"no plans of kind {kind!r}")


def mean_bits(plan: Plan) -> float:
    """Mean bits per weight over all experts; the products of a plan weigh alike per expert and weight."""
    # gate and up are twice as large as down
    sizes = (2.0, 1.0) if len(plan) == 2 else (1.0,)
    bits = [float(np.mean([SCHEMES[one][0] for one in product])) for product in plan]
    return sum(a * b for a, b in zip(sizes, bits, strict=True)) / sum(sizes)


def plan_bytes(cell: Cell, rows: NDArray[np.int64], plan: Plan) -> float:
    """Bytes of the weights of the experts that have rows."""
    products = zip(cell.gemms, plan, strict=True)
    return sum(n * k * SCHEMES[own[expert]][0] / 8 for (n, k), own in products for expert in np.flatnonzero(rows))


def plan_roofline_us(cell: Cell, rows: NDArray[np.int64], plan: Plan) -> float:
    """Least time: bytes of the active experts against the sum of each expert's products at its own unit's rate."""
    memory = (plan_bytes(cell, rows, plan) + cell.activation_bytes(1.0)) / PEAKS["bandwidth"]
    products = zip(cell.gemms, plan, strict=True)
    compute = sum(
        2.0 * float(rows[expert]) * n * k / PEAKS[SCHEMES[own[expert]][2]]
        for (n, k), own in products
        for expert in np.flatnonzero(rows)
    )
    return max(memory, compute) * 1e6


def made_up_losses(model: Model, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Part -> [experts, 2] losses of w4a8, w8a8: most within a factor of four, one in fifty up to a hundred times."""
    rng = np.random.default_rng(seed)
    found: dict[str, NDArray[np.float64]] = {}
    for part, matrices in (("gate_up", 2), ("down", 1)):
        level = rng.lognormal(0, 0.5, (matrices, model.experts))
        level *= np.where(rng.random(level.shape) < 0.02, rng.pareto(1.2, level.shape) * 3 + 1, 1.0)
        found[part] = level.sum(0)[:, None] * np.array([11.0, 1.0]) * rng.lognormal(0, 0.3, (model.experts, 2))
    return found


def solve_plan(model: Model, tokens: int, bits: float, cost_model: Any, trade: float = TRADE) -> dict[str, str]:  # noqa: ANN401
    """
    Solve loss^trade * time^(1 - trade) for both products of a model together, under mean bits per weight.

    All pairs are tried; the one whose plan takes least time, with losses that are the same for all, is kept.

    Returns:
        Part -> one letter per expert, of `SHORT`.
    """
    found = [_solve_for(letters, model, tokens, bits, cost_model, trade) for letters in UNITS]
    return min(found, key=lambda one: one[0])[1]


def _solve_for(
    letters: str, model: Model, tokens: int, bits: float, cost_model: Any, trade: float  # noqa: ANN401
) -> tuple[float, dict[str, str]]:  # fmt: skip
    """Microseconds and plan of the schemes of one unit."""
    from mxmoe.cost import linear_cost_us
    from mxmoe.ir import Scheme
    from mxmoe.solver import Budget, Problem, solve

    schemes = [Scheme.parse(SHORT[letter]) for letter in letters]
    parts = {part: Cell(model, tokens, part) for part in ("gate_up", "down")}
    # how often experts are asked for in general: a plan is not made for the one routing that is timed
    often = rows_of(Cell(model, LEARNT_FROM, "down")) / LEARNT_FROM
    losses = made_up_losses(model)
    cost: list[NDArray[np.float64]] = []
    for cell in parts.values():
        n, k = cell.gemms[0]
        cost.append(linear_cost_us(cost_model, schemes, n=n, k=k, frequency=often, tokens=tokens))
    sizes = [np.full(model.experts, float(np.prod(cell.gemms[0]))) for cell in parts.values()]
    problem = Problem(
        np.concatenate(list(losses.values())),
        np.array([SCHEMES[SHORT[letter]][0] for letter in letters]),
        np.concatenate(cost),
        numel=np.concatenate(sizes),
    )
    chosen = np.asarray(solve(problem, Budget(weight_bits=bits), objective=trade).choice)
    time_us = float(np.take_along_axis(np.concatenate(cost), chosen[:, None], 1).sum())
    spelled = np.array(list(letters))[chosen]
    return time_us, {part: "".join(half) for part, half in zip(parts, np.split(spelled, 2), strict=True)}


def target_costs() -> tuple[Any, str]:
    """Cost model of the H200: the measured one where its profile is shipped, else the roofline; and its name."""
    from mxmoe.cost import Measured, Roofline
    from mxmoe.device import DEVICES
    from mxmoe.errors import NoProfile

    device = DEVICES["h200"]
    try:
        return Measured(device), "measured"
    except NoProfile:
        return Roofline(device), "roofline"


def main(argv: Sequence[str]) -> None:
    from common import write_result

    costs, kind = target_costs()
    names = argv or [name for name in MODELS if name != "tiny"]
    plans = {f"{name} {tokens} 5": solve_plan(MODELS[name], tokens, BITS, costs) for name in names for tokens in TOKENS}
    used = {name: round(used_bits(plan), 3) for name, plan in plans.items()}
    figures = {"cost_model": kind, "bits": BITS, "objective": f"loss^{TRADE} time^{1 - TRADE}"}
    write_result("plans", {**figures, "mean_bits": used, "plans": plans})


def used_bits(plan: dict[str, str]) -> float:
    """Mean bits per weight of a solved plan."""
    return mean_bits(tuple(tuple(SHORT[letter] for letter in letters) for letters in plan.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
