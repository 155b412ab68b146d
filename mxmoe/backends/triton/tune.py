"""
Finds tiles by measuring: what the rule chooses, each of its numbers changed by itself, then the changes that helped.

The result is what `tuned.py` reads; the measurements lie in a file beside it, and a later call goes on from there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton

from mxmoe.backends.triton import hopper
from mxmoe.backends.triton.choose import FEW, SOME, by_rule, mean_rows
from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.measure import add_rows, gpu_divides, sweep
from mxmoe.backends.triton.tiles import HEIGHTS, WIDTHS, Config, Gemm, Shape
from mxmoe.backends.triton.tuned import (
    DIVIDED,
    WHOLE,
    Entry,
    Run,
    Tuned,
    current_hashes,
    kind_of,
    parse_config,
    run_of,
    spell_config,
)
from mxmoe.backends.triton.workloads import FIELDS, Job, Workload
from mxmoe.files import write_whole
from mxmoe.ir import Scheme

WORKLOADS = (
    # products of Qwen1.5-MoE, Mixtral-8x7B and DeepSeek-V3
    Workload(1408, 2048, True, 60, 4),
    Workload(2048, 1408, False, 60, 4),
    Workload(14336, 4096, True, 8, 2),
    Workload(4096, 14336, False, 8, 2),
    Workload(2048, 7168, True, 256, 8),
    Workload(7168, 2048, False, 256, 8),
)
TOKENS = (1, 16, 64, 512, 2048, 8192)
SCHEMES = (
    *("w4a8_g128_sym", "w4a8_g128_sym_iscale", "w8a8_sym", "w4a16_g128_asym", "w8a8_e4m3", "bf16"),
    *("w4a8_g128_sym_e4m3", "w8a16_sym"),
)
SETS = ("w4a8_g128_sym_iscale+w8a8_sym", "w4a8_g128_sym+w8a8_sym")
"""Schemes that are tuned together."""
SET_SEED = 7
"""Which draw of `workloads.schemes_of` the experts of a set have: about a half each."""
MOST_SUMS = 128 * 256
"""Sums of a tile; more do not fit the registers."""
ROUNDS = (0.6, 0.15, 0.25)
"""Shares of the time: changes of one number, changes together, sets of schemes."""
SLOWEST = 1.5
"""Entries that take longer than so many times the fastest of their class and kind of kernel are left out."""
LEAST_TALL = 0.5
"""What part of a mean expert's rows the divided kernel's tallest tile has at least, where there is one as tall."""
LEAST_TILES = 132
"""SMs of an H200: where k can be split instead, fewer tiles leave some idle, and the time depends on which."""
MOST_OVER = 4.0
"""How many times a mean expert's rows the busiest is taken to have: where none fills a tile, none is kept together."""
MOST_LOW = 2.0
"""How many times a mean expert's rows its lowest tile has at most, unless there is none lower."""

Change = tuple[str, object]
Bound = tuple[int, int | None]
"""Warps and most registers of a launch."""


def changes(gemm: Gemm, rule: Config, rows: float) -> Iterator[Config]:
    """Yield configs that differ from the rule's in one number, of a GEMM of one scheme, the most promising first."""
    (scheme,) = gemm.distinct
    name, shape = rule.shapes[0]
    heights = {
        FEW: ((16,), (16, 32)),
        SOME: ((16, 32), (16, 32, 64), (32,)),
    }.get(FEW if rows <= FEW else SOME if rows <= SOME else 0.0, ((32, 64, 128), (32, 64), (16, 32, 64)))
    yield from (replace(rule, warps=warps, registers=bound) for warps, bound in bounds_of(rows))
    shapes: list[Shape] = [replace(shape, heights=tall) for tall in heights]
    shapes += [replace(shape, width=wide) for wide in (shape.width * 2, shape.width // 2) if wide in WIDTHS]
    most = 2 if scheme.weight_bits == 3 else 6
    shapes += [replace(shape, stages=flight) for flight in (shape.stages + 1, shape.stages - 1) if 2 <= flight <= most]
    if not gemm.gated and body_of(scheme) != "wide" and rows <= SOME:
        wanted = (shape.parts * 2, shape.parts // 2)
        shapes += [replace(shape, parts=parts) for parts in wanted if 1 <= parts <= 8 and gemm.k // parts >= 352]
    sides = 2 if gemm.gated else 1
    shapes += deeper(shape) if body_of(scheme) == "dense" and rows <= SOME else []
    for one in shapes:
        if one.width * sides * max(one.heights) <= max(MOST_SUMS, shape.width * sides * max(shape.heights)):
            yield replace(rule, shapes=((name, one),))


def first_changes(gemm: Gemm, rule: Config) -> list[Config]:
    """What is tried for one token, which is compiled for by itself."""
    (scheme,) = gemm.distinct
    name, shape = rule.shapes[0]
    return [replace(rule, shapes=((name, one),)) for one in deeper(shape)] if body_of(scheme) == "dense" else []


def deeper(shape: Shape) -> list[Shape]:
    """Tiles of dense weights whose steps are twice as deep, so that memory is read in longer pieces, and narrower."""
    deep = replace(shape, depth=2 * shape.depth, stages=3)
    return [replace(deep, width=shape.width // 2), deep, replace(deep, width=shape.width // 2, stages=4)]


def divided_configs(gemm: Gemm, rows: float, active: int) -> tuple[Config, ...]:
    """Configs of the divided kernel worth measuring for so many rows of a mean active expert, of which `active` are."""
    if not gemm.gated and active * -(-gemm.n // hopper.NARROW_WIDTH) < LEAST_TILES:
        return ()

    def suits(config: Config) -> bool:
        heights = [height for _, shape in config.shapes for height in shape.heights]
        if any(shape.together for _, shape in config.shapes) and rows * MOST_OVER < max(heights):
            return False
        wanted = LEAST_TALL * min(rows, max(hopper.HEIGHTS))
        return min(heights) <= max(MOST_LOW * rows, min(hopper.HEIGHTS)) and max(heights) >= wanted

    return tuple(config for config in hopper.candidates(gemm) if suits(config))


def bounds_of(rows: float) -> tuple[Bound, ...]:
    """Warps and bounds of registers worth trying for so many rows of a mean active expert."""
    if rows <= FEW:
        return ((4, None), (4, 96), (8, None))
    return ((4, 128), (8, None), (4, 168), (8, 128), (4, None)) if rows <= SOME else ((8, None), (4, None), (8, 128))


def first_jobs(
    workloads: Sequence[Workload], tokens: Sequence[int], schemes: Sequence[str], *, divides: bool = False
) -> list[Job]:
    """
    The rule's configs of everything, then one change of everything, and so on: what is cut off is cut off evenly.

    Where the GPU `divides`, the configs of the divided kernel come before the changes.
    """
    columns: list[list[Job]] = []
    for scheme, one, count in itertools.product(schemes, workloads, tokens):
        gemm = one.gemm(scheme)
        rule, rows = by_rule(gemm, count, one.top_k), mean_rows(gemm, count, one.top_k)
        divided = divided_configs(gemm, rows, one.active(count)) if divides else ()
        more = (*divided, *(changes(gemm, rule, rows) if count > 1 else first_changes(gemm, rule)))
        columns.append([Job(one, count, scheme, spell_config(config)) for config in dict.fromkeys((rule, *more))])
    return _evenly(columns)


def _evenly(columns: Sequence[Sequence[Job]]) -> list[Job]:
    """Give the first of every column, then the second of every one, and so on."""
    return [job for row in itertools.zip_longest(*columns) for job in row if job is not None]


def second_jobs(rows: Sequence[Mapping[str, str]]) -> list[Job]:
    """For every class, the changes that helped put together: all of them, and the best two."""
    found: list[Job] = []
    for (one, count, scheme), times in _by_class(rows).items():
        rule = by_rule(one.gemm(scheme), count, one.top_k)
        before = times.get(rule)
        if before is None or ":" in scheme:
            continue
        own = {config: time for config, time in times.items() if kind_of(config) == WHOLE}
        helped = sorted((time, spell_config(config)) for config, time in own.items() if time < 0.995 * before)
        best: dict[str, object] = {}
        for _, text in helped:
            for field, value in _differences(rule, parse_config(text)):
                best.setdefault(field, value)
        for most in (len(best), 2):
            config = _changed(rule, dict(itertools.islice(best.items(), most)))
            if most > 1 and config not in times and max(config.shapes[0][1].heights) in HEIGHTS:
                found.append(Job(one, count, scheme, spell_config(config)))
    return list(dict.fromkeys(found))


def set_jobs(
    rows: Sequence[Mapping[str, str]], workloads: Sequence[Workload], tokens: Sequence[int], sets: Sequence[str],
    *, divides: bool = False,
) -> list[Job]:  # fmt: skip
    """
    For every set of schemes, what each scheme was fastest with under warps and registers that all share.

    Where the GPU `divides`, configs of the divided kernel besides.
    """
    times, columns = _by_class(rows), list[list[Job]]()
    for names, one, count in itertools.product(sets, workloads, tokens):
        plan = f"{SET_SEED}:{names}"
        gemm = one.gemm(plan)
        rule = by_rule(gemm, count, one.top_k)
        mean = mean_rows(gemm, count, one.top_k)
        divided = divided_configs(gemm, mean, one.active(count)) if divides else ()
        configs = [rule, *divided]
        # many rows are the divided kernel's wherever it multiplies the schemes
        for run in bounds_of(mean) if not divided or mean <= FEW else ():
            options = [_shapes_with(times.get((one, count, name), {}), gemm, shape, run) for name, shape in rule.shapes]
            for shapes in itertools.product(*options):
                pairs = tuple((name, shape) for (name, _), shape in zip(rule.shapes, shapes, strict=True))
                configs.append(replace(rule, warps=run[0], registers=run[1], shapes=pairs))
        columns.append([Job(one, count, plan, spell_config(config)) for config in dict.fromkeys(configs)])
    return _evenly(columns)


def _shapes_with(times: Mapping[Config, float], gemm: Gemm, own: Shape, run: Bound) -> list[Shape]:
    """Tiles of one scheme under a run: its fastest, and the rule's, made smaller where registers are few."""
    sums = max(own.heights) * own.width * (1 + gemm.gated)
    small = own
    if run[1] is not None and sums > run[0] * 32 * run[1] // 2:
        lower = own.heights[:-1]
        small = replace(own, heights=lower) if lower else own
    mine = [config for config in times if (config.warps, config.registers) == run]
    best = [replace(min(mine, key=times.__getitem__).shapes[0][1], parts=own.parts)] if mine else []
    return list(dict.fromkeys([*best, small]))


def _differences(rule: Config, other: Config) -> list[Change]:
    if (rule.warps, rule.registers) != (other.warps, other.registers):
        return [("run", (other.warps, other.registers))]
    a, b = rule.shapes[0][1], other.shapes[0][1]
    fields = ("heights", "width", "depth", "stages", "parts")
    return [(name, getattr(b, name)) for name in fields if getattr(a, name) != getattr(b, name)]


def _changed(rule: Config, values: Mapping[str, object]) -> Config:
    name, shape = rule.shapes[0]
    run = values.get("run", (rule.warps, rule.registers))
    assert isinstance(run, tuple), "a pair of warps and registers"
    inner = {field: value for field, value in values.items() if field != "run"}
    return replace(rule, warps=run[0], registers=run[1], shapes=((name, replace(shape, **inner)),))


def _by_class(rows: Sequence[Mapping[str, str]]) -> dict[tuple[Workload, int, str], dict[Config, float]]:
    """(workload, tokens, scheme) -> config -> microseconds."""
    found: dict[tuple[Workload, int, str], dict[Config, float]] = {}
    for row in rows:
        if row["status"] == "ok":
            job = Job.of_row(dict(row))
            times = found.setdefault((job.workload, job.tokens, job.plan), {})
            times[parse_config(job.config)] = float(row["time_us"])
    return found


def make_tuned(rows: Sequence[Mapping[str, str]], device: str, mixes: bool = False) -> Tuned:
    """Keep the fastest config of every class, schemes and `Run`, where the rule's was measured too."""
    entries: list[Entry] = []
    kinds = sorted({WHOLE, *(kind_of(parse_config(row["config"])) for row in rows)})
    for (one, count, plan), times in _by_class(rows).items():
        gemm, scheme = one.gemm(plan), plan.rpartition(":")[2]
        before, mean = times.get(by_rule(gemm, count, one.top_k)), mean_rows(gemm, count, one.top_k)
        divided = divided_configs(gemm, mean, one.active(count)) if DIVIDED in kinds else ()
        if before is None or _is_cut_off(times, divided, plan):
            continue
        mean = round(mean, 3)
        active = one.active(count)
        times = {config: us for config, us in times.items() if kind_of(config) == WHOLE or config in divided}
        by_run: dict[Run, Config] = {}
        for config in sorted(times, key=times.__getitem__):
            by_run.setdefault(run_of(config), config)
        least = {kind: min((t for c, t in times.items() if kind_of(c) == kind), default=0.0) for kind in kinds}
        for config in (config for config in by_run.values() if times[config] <= SLOWEST * least[kind_of(config)]):
            entries.append(Entry(one.n, one.k, one.gated, mean, active, scheme, config, times[config], before))
    entries.sort(key=lambda one: (one.scheme, not one.gated, one.n, one.k, one.rows, one.active, one.time_us))
    hashes = {kind: current_hashes()[kind] for kind in kinds}
    return Tuned(device, triton.__version__, hashes, tuple(entries), mixes)


def _is_cut_off(times: Mapping[Config, float], divided: Sequence[Config], plan: str) -> bool:
    """Say whether a set of schemes was hardly tried in the divided kernel's tiles: each by itself says more then."""
    wanted = set(map(run_of, divided))
    return "+" in plan and len(wanted & set(map(run_of, times))) < min(2, len(wanted))


def known_rows(
    tuned: Tuned, workloads: Sequence[Workload], tokens: Sequence[int]
) -> Iterator[Mapping[str, str]]:  # fmt: skip
    """Yield the measurements that entries stand for, but those of the rule, to which all others are compared."""
    for one, count, entry in itertools.product(workloads, tokens, tuned.entries):
        plan = f"{SET_SEED}:{entry.scheme}" if "+" in entry.scheme else entry.scheme
        if (one.n, one.k, one.gated) != (entry.n, entry.k, entry.gated):
            continue
        gemm = one.gemm(plan)
        mean = (round(mean_rows(gemm, count, one.top_k), 3), one.active(count))
        if mean == (entry.rows, entry.active) and entry.config != by_rule(gemm, count, one.top_k):
            key = Job(one, count, plan, spell_config(entry.config)).key
            yield {**dict(zip(FIELDS, key, strict=False)), "time_us": f"{entry.time_us:.3f}", "status": "ok"}


def tune(
    out: Path, measured: Path, *, seconds: float, workers: int | None = None, known: Path | None = None,
    workloads: Sequence[Workload] = WORKLOADS, tokens: Sequence[int] = TOKENS, schemes: Sequence[str] = SCHEMES,
) -> Tuned:  # fmt: skip
    """
    Measure for about `seconds`, and write what was fastest to `out`.

    Args:
        out: the JSON that `tuned.py` reads.
        measured: every measurement, as CSV; those in it already are not made again.
        seconds: start no measurement later.
        workers: processes that compile; by default as many as there are cores, but one.
        known: such a JSON, whose entries of kernels that are as they were need not be measured again.
        workloads, tokens, schemes: the classes.
    """
    many = workers or max(1, (os.cpu_count() or 2) - 1)
    for name in schemes:
        Scheme.parse(name)
    if known is not None:
        add_rows(measured, known_rows(Tuned.loads(known.read_text()).current(), workloads, tokens))
    divides = gpu_divides()
    jobs = first_jobs(workloads, tokens, schemes, divides=divides)
    rows = sweep(jobs, measured, seconds=ROUNDS[0] * seconds, workers=many, title="tiles")
    rows = sweep(second_jobs(rows), measured, seconds=ROUNDS[1] * seconds, workers=many, title="tiles together")
    sets = [names for names in SETS if set(names.split("+")) <= set(schemes)]
    jobs = set_jobs(rows, workloads, tokens, sets, divides=divides)
    rows = sweep(jobs, measured, seconds=ROUNDS[2] * seconds, workers=many, title="sets")
    found = make_tuned(rows, torch.cuda.get_device_name())
    write_whole(out, found.dumps())
    return found
