"""
Measures what a cost model needs: launches of one scheme and of mixes, over products, tokens and tiles as they will run.

The times become a profile (`mxmoe.cost.fit`); the measurements lie in a file beside it, and a later call goes on.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mxmoe.backends.triton.choose_ada import choose
from mxmoe.backends.triton.measure import gpu_divides, read_rows, sweep
from mxmoe.backends.triton.mode import HOPPER
from mxmoe.backends.triton.tiles import DIVIDED_WARPS, Config, Gemm
from mxmoe.backends.triton.tune import TOKENS, WORKLOADS
from mxmoe.backends.triton.tuned import Tuned, for_device, parse_config, spell_config
from mxmoe.backends.triton.workloads import Job, Workload, rows_of
from mxmoe.files import write_whole
from mxmoe.ir import Scheme

SCHEMES = (
    *("bf16", "w8a8_sym", "w8a8_e4m3", "w4a8_g128_sym", "w4a8_g128_sym_iscale", "w4a8_g128_sym_e4m3"),
    *("w4a16_g128_asym", "w3a16_g128_asym", "w2a16_g128_asym"),
)
POOL = (
    *("w4a8_g128_sym", "w4a8_g128_sym_iscale", "w8a8_sym", "w8a8_e4m3"),
    *("w4a16_g128_asym", "w3a16_g128_asym", "w2a16_g128_asym"),
)
"""Schemes of random mixes: what target triton-sm90 chooses from."""
MIXES = 5
"""Random mixes of each product and number of tokens; the last is of w4a8 with integer scales and w8a8."""


def mixed_plan(number: int, kind: int) -> str:
    """Name a random mix: two to four schemes of the pool, or w4a8 and w8a8 for the last kind."""
    rng = np.random.default_rng(number)
    if kind == MIXES - 1:
        return f"{number}:w4a8_g128_sym_iscale+w8a8_sym"
    picked = rng.choice(len(POOL), size=int(rng.integers(2, 5)), replace=False)
    return f"{number}:" + "+".join(POOL[i] for i in sorted(picked.tolist()))


def profile_jobs(
    tuned: Tuned | None,
    workloads: Sequence[Workload],
    tokens: Sequence[int],
    schemes: Sequence[str],
    *,
    divides: bool = False,
) -> list[Job]:
    """Launches to fit on: every scheme alone, and mixes by rule and as tuned; see `chosen`."""

    def job(one: Workload, count: int, plan: str, tuned: Tuned | None) -> Job:
        config = chosen(one.gemm(plan), count, one.top_k, tuned, divides=divides)
        return Job(one, count, plan, spell_config(config))

    grid = list(itertools.product(workloads, tokens))
    found = [job(one, count, scheme, tuned) for scheme, (one, count) in itertools.product(schemes, grid)]
    for kind in range(MIXES):
        for number, (one, count) in enumerate(grid):
            plan = mixed_plan(1000 * kind + number, kind)
            found.append(job(one, count, plan, None))
            if tuned is not None:
                found.append(job(one, count, plan, tuned))
    return list(dict.fromkeys(found))


def chosen(gemm: Gemm, tokens: int, top_k: int, tuned: Tuned | None, *, divides: bool = False) -> Config:
    """Choose the config of a launch as `choose_ada.config_for` does: `divides` says whether `hopper.py` runs there."""
    return choose(gemm, tokens, top_k, HOPPER, tuned, divides=divides)


def _is_divided(row: Mapping[str, str]) -> bool:
    return parse_config(row["config"]).warps == DIVIDED_WARPS


def gain_of_mixes(rows: Sequence[Mapping[str, str]], tuned: Tuned) -> float | None:
    """Geometric mean, over measured mixes, of the time by rule over that as tuned; None where there are no pairs."""
    times = {
        Job.of_row(dict(row)): float(row["time_us"]) for row in rows if row["status"] == "ok" and ":" in row["plan"]
    }
    ratios: list[float] = []
    divides = any(map(_is_divided, rows))
    for job, us in times.items():
        gemm, top_k = job.workload.gemm(job.plan), job.workload.top_k
        by = replace(job, config=spell_config(chosen(gemm, job.tokens, top_k, None, divides=divides)))
        own = spell_config(chosen(gemm, job.tokens, top_k, tuned, divides=divides))
        if job.config == own != by.config and by in times:
            ratios.append(times[by] / us)
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def launches(measured: Path, tiles: Path | None) -> list[tuple[int, int, dict[Scheme, dict[int, int]], float]]:
    """
    Read the measured launches that ran as they will be run: by rule, or with the file's tiles where there are any.

    Returns:
        For each its output channels (of gate and up together), input channels, scheme -> rows of an expert -> experts,
        and microseconds: the fields of `mxmoe.cost.Observation`.
    """
    tuned = Tuned.loads(tiles.read_text()) if tiles else None
    rows_found = read_rows(measured)
    divides = any(map(_is_divided, rows_found))
    found: list[tuple[int, int, dict[Scheme, dict[int, int]], float]] = []
    for row in rows_found:
        job = Job.of_row(row)
        gemm = job.workload.gemm(job.plan)
        config = chosen(gemm, job.tokens, job.workload.top_k, tuned, divides=divides)
        if row["status"] != "ok" or job.config != spell_config(config):
            continue
        load: dict[Scheme, dict[int, int]] = {}
        for scheme, rows in zip(gemm.schemes, rows_of(job), strict=True):
            if rows:
                counts = load.setdefault(scheme, {})
                counts[rows] = counts.get(rows, 0) + 1
        found.append((gemm.n * (1 + gemm.gated), gemm.k, load, float(row["time_us"])))
    return found


def measure(
    measured: Path, tiles: Path | None, *, seconds: float, workers: int | None = None,
    workloads: Sequence[Workload] = WORKLOADS, tokens: Sequence[int] = TOKENS, schemes: Sequence[str] = SCHEMES,
) -> str:  # fmt: skip
    """
    Measure for about `seconds`, and note in the file of tiles whether mixed launches were faster with them.

    Args:
        measured: every measurement, as CSV; those in it already are not made again.
        tiles: what `tune` wrote; None for what is shipped for this device.
        seconds: start no measurement later.
        workers: processes that compile; by default as many as there are cores, but one.
        workloads, tokens, schemes: launches of one scheme, and with the same products and tokens mixes of `POOL`.

    Returns:
        A sentence about what was measured.
    """
    many = workers or max(1, (os.cpu_count() or 2) - 1)
    found = Tuned.loads(tiles.read_text()) if tiles else for_device(torch.cuda.get_device_name())
    together = None if found is None else replace(found, mixes=True)
    jobs = profile_jobs(together, workloads, tokens, schemes, divides=gpu_divides())
    rows = sweep(jobs, measured, seconds=seconds, workers=many, title="launches")
    text = f"{len(rows)} launches in {measured}"
    gain = None if together is None else gain_of_mixes(rows, together)
    if gain is None or together is None:
        return text
    if tiles:
        write_whole(tiles, replace(together, mixes=gain > 1).dumps())
    return f"{text}; mixed ones take {gain:.3f} times as long by rule as with measured tiles"
