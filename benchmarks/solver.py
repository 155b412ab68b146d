"""
Allocates a model of DeepSeek-V3's size; the marks are 1 s with a proved gap under 1e-5, and 10 s for 40 budgets.

58 blocks x 257 experts x 3 roles = 44,718 rows, 8 candidate schemes, with gate and up free or tied. Losses are made up,
with the tail of real sensitivities: most rows within a factor of four, one in fifty up to a hundred times above. Costs
are those of an RTX 4090 roofline for a skewed routing of 4,096 tokens. Each question is asked for five draws of the
losses; the slowest draw and the widest gap count. Of three repeats the fastest counts, so that a busy machine matters
less; processor time is given beside wall time. HiGHS answers for 4,392 rows. Writes `benchmarks/results/solver.json`
and `solver.csv`.

    python benchmarks/solver.py
"""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
from common import RESULTS, write_result

from mxmoe.solver import Budget, Problem, Solution, frontier, solve, tie

T = TypeVar("T")
BLOCKS, EXPERTS, TOKENS, TOP_K, WEIGHTS, DRAWS = 58, 257, 4096, 8, 7168 * 2048, 5
SCHEMES = {  # effective bits, loss of a median row, dense T(FL)OPS
    "w2a16_g128_asym": (2.25, 180.0, 165.0),
    "w3a16_g128_asym": (3.25, 36.0, 165.0),
    "w4a16_g128_asym": (4.25, 8.0, 165.0),
    "w4a16_sym": (4.0078125, 16.0, 165.0),
    "w4a8_g128_sym": (4.125, 11.0, 661.0),
    "w8a8_sym": (8.0078125, 1.0, 661.0),
    "w8a8_e4m3": (8.0078125, 1.6, 661.0),
    "bf16": (16.0, 0.002, 165.0),
}
DRAM_GB_S = 1008.0
QUESTIONS: dict[str, tuple[dict[str, Any], str | float]] = {
    "loss at 4.25 bits": ({"weight_bits": 4.25}, "loss"),
    "loss at 3.25 bits": ({"weight_bits": 3.25}, "loss"),
    "time at 4.25 bits": ({"weight_bits": 4.25}, "time"),
    "loss^0.75 time^0.25 at 4.25 bits": ({"weight_bits": 4.25}, 0.75),
    "loss at 5 bits and a latency": ({"weight_bits": 5.0, "latency_us": None}, "loss"),
    "loss^0.75 time^0.25 at 5 bits and a latency": ({"weight_bits": 5.0, "latency_us": None}, 0.75),
}


def problem(tied: bool, draw: int, blocks: int = BLOCKS, experts: int = EXPERTS) -> Problem:
    rng = np.random.default_rng(draw)
    keys = list(
        itertools.product((f"layer{i}" for i in range(blocks)), ["routed"], ["gate", "up", "down"], range(experts))
    )
    rows = len(keys)
    bits, loss, rate = (np.array(column) for column in zip(*SCHEMES.values(), strict=True))
    level = rng.lognormal(0, 0.5, rows) * np.where(rng.random(rows) < 0.02, rng.pareto(1.2, rows) * 3 + 1, 1.0)
    level *= np.repeat(rng.lognormal(0, 0.7, blocks), rows // blocks)
    popularity = rng.gamma(0.7, 1.0, (blocks, 1, experts)).repeat(3, axis=1)
    tokens = (popularity / popularity.mean(axis=2, keepdims=True)).ravel() * TOKENS * TOP_K / experts
    cost = np.maximum(WEIGHTS * bits / 8 / (DRAM_GB_S * 1e3), 2 * tokens[:, None] * WEIGHTS / (rate * 1e6))
    return Problem(
        level[:, None] * loss * rng.lognormal(0, 0.3, (rows, len(SCHEMES))),
        bits,
        cost,
        numel=np.full(rows, WEIGHTS),
        groups=tie(keys) if tied else None,
    )


def budget_of(instance: Problem, limits: dict[str, Any]) -> Budget:
    """Fill a latency in halfway between what the least loss takes and what is possible."""
    if "latency_us" not in limits:
        return Budget(**limits)
    bits = limits["weight_bits"]
    ends = [solve(instance, bits, objective=objective).latency_us or 0.0 for objective in ("loss", "time")]
    return Budget(weight_bits=bits, latency_us=sum(ends) / 2)


def timed(call: Callable[[], T], repeats: int = 3) -> tuple[T, float, float]:
    """Return the last result, and the least wall and processor seconds."""
    walls, works = [], []
    for _ in range(repeats):
        wall, work = time.perf_counter(), time.process_time()
        result = call()
        walls.append(time.perf_counter() - wall)
        works.append(time.process_time() - work)
    return result, min(walls), min(works)


def row(rows: str, question: str, found: list[Solution], wall_s: float, cpu_s: float) -> dict[str, Any]:
    gap = max(solution.gap for solution in found)
    times = {"wall_s": round(wall_s, 3), "cpu_s": round(cpu_s, 3)}
    return {"rows": rows, "question": question, **times, "gap": float(f"{gap:.2e}")}


def ask(tied: bool) -> Iterator[dict[str, Any]]:
    instances = [problem(tied, draw) for draw in range(DRAWS)]
    name = f"{instances[0].n_rows:,}" + (", gate = up" if tied else "")
    for question, (limits, objective) in QUESTIONS.items():
        budgets = [budget_of(instance, limits) for instance in instances]
        calls = [partial(solve, p, b, objective=objective) for p, b in zip(instances, budgets, strict=True)]
        found, walls, works = zip(*(timed(call) for call in calls), strict=True)
        yield row(name, question, list(found), max(walls), max(works))
    for objective in ("loss", 0.75):
        points, wall, work = timed(partial(frontier, instances[0], 40, objective=objective), repeats=1)
        yield row(name, f"frontier of 40 points, {objective}", points, wall, work)


def against_highs() -> Iterator[dict[str, Any]]:
    small = problem(False, 0, blocks=24, experts=61)
    engines = {"lagrangian": {}, "pulp, gap 1e-4": {"gap": 1e-4}, "pulp, gap 1e-6": {"gap": 1e-6}}
    for engine, options in engines.items():
        call = partial(solve, small, 4.25, solver=engine.split(",")[0], **options)
        found, wall, work = timed(call, repeats=1)
        yield row(f"{small.n_rows:,}", f"loss at 4.25 bits, {engine}", [found], wall, work) | {"value": found.objective}


def main() -> None:
    solve(problem(False, 0, blocks=1), 4.25)  # imports
    rows = [*ask(tied=False), *ask(tied=True), *against_highs()]
    with (RESULTS / "solver.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["rows", "question", "wall_s", "cpu_s", "gap", "value"])
        writer.writeheader()
        writer.writerows(rows)
    marks = {"mark_s": 1.0, "mark_gap": 1e-5, "mark_frontier_s": 10.0}
    write_result("solver", {"schemes": len(SCHEMES), "draws": DRAWS, **marks, "answers": rows})


if __name__ == "__main__":
    main()
