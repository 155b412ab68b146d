"""
Times of grouped launches on the present GPU: workloads, random weights, compiling in many processes, and the clock.

A launch is timed over copies of its weights, or over relabelled experts, such that it finds none of them in the cache:
one CUDA graph of all of them, replayed; the median counts. A launch that reads the tokens sorted by expert is charged
with what it takes longer to write them so than by token. While one process measures, others compile what comes next.
"""

from __future__ import annotations

import csv
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mxmoe.backends.triton import hopper
from mxmoe.backends.triton.dispatch import Dispatch, Tables
from mxmoe.backends.triton.launch import (
    FUSED_TOKENS,
    Epilogue,
    Matrices,
    Rows,
    begin,
    make_rows,
    reads_sorted,
    run_gemm,
    sort_rows,
)
from mxmoe.backends.triton.layout import Arena, allocate_arena, meta_bytes
from mxmoe.backends.triton.schedule import allocate, build
from mxmoe.backends.triton.tiles import Config, Gemm, classes_of
from mxmoe.backends.triton.tuned import parse_config
from mxmoe.backends.triton.workloads import FIELDS, SEED, Job, Workload, routing, turns_of
from mxmoe.errors import WrongTiles

ROOM = 80e9
"""Bytes of weights that are kept for later measurements."""
MOST_ERROR = 0.02
"""Relative difference of results of two configs: the order of sums, and rounding to 16 bits."""


def random_arena(gemm: Gemm, device: torch.device) -> Arena:
    """Weights of random bits without NaN or infinity, scales and zero points that fit them."""
    arena = allocate_arena(gemm.n, gemm.k, gemm.schemes, 1 + gemm.gated, device)
    words = arena.data[: len(arena.data) // 8 * 8].view(torch.int64)
    for part in words.split(1 << 27):
        part.random_(-(2**63), 2**63 - 1)
        part.bitwise_and_(0xBFBFBFBFBFBFBFBF - 2**64)
    for at, (_, scale, zero) in enumerate(arena.starts):
        scheme = gemm.schemes[at % len(gemm.schemes)]
        scales, zeros = meta_bytes(scheme, gemm.n, gemm.k)
        dtype = torch.bfloat16 if scheme.group_size is not None and not scheme.integer_scales else torch.float32
        arena.data[scale : scale + scales].view(dtype).fill_(0.01)
        if scheme.integer_scales:
            arena.data[zero : zero + zeros].random_(1, 17)
        else:
            arena.data[zero : zero + zeros].view(dtype).fill_(2.0 ** (scheme.weight_bits - 1))
    return arena


def compile_group(jobs: Sequence[Job]) -> str:
    """Compile the kernels of launches that differ in tokens only, into Triton's cache; what went wrong, or nothing."""
    torch.set_num_threads(1)
    try:
        if torch.cuda.is_available():
            for job in jobs:
                _scheduled(_dispatch(job), routing(job.workload.experts, job.workload.top_k, job.tokens), "cuda")
                _compile_rows(job)
        one = jobs[0]
        compile_launch(one.workload.gemm(one.plan), parse_config(one.config), one.tokens, one.workload.top_k)
    except Exception as error:  # the file says what broke, and the sweep goes on
        return _said(error)
    return ""


def _compile_rows(job: Job) -> None:
    """Make rows for a few tokens by the kernels that make those of the job."""
    one, gemm, config = job.workload, job.workload.gemm(job.plan), parse_config(job.config)
    tokens = min(job.tokens, FUSED_TOKENS + 16)
    dispatch = Dispatch(one.experts, one.top_k, tokens, (classes_of(gemm, config)[0],))
    x = torch.zeros((tokens if one.gated else dispatch.rows, one.k), dtype=torch.bfloat16, device="cuda")
    make_rows(x, gemm.row_kinds)
    if one.gated and reads_sorted(config):
        index = torch.from_numpy(routing(one.experts, one.top_k, tokens)).cuda()
        for is_sorted in (True, False):
            begin(allocate(dispatch, "cuda"), index, x, gemm.row_kinds, is_sorted=is_sorted)


def compile_launch(gemm: Gemm, config: Config, tokens: int, top_k: int) -> None:
    """Compile the group GEMM of a launch, for which no memory is needed; Triton's errors pass."""
    base = torch.zeros((1 + gemm.gated, len(gemm.schemes), 3), dtype=torch.int64)
    arena = Arena(gemm.n, gemm.k, gemm.schemes, len(base), torch.zeros(1024, dtype=torch.uint8), base, ())
    kinds = gemm.row_kinds
    codes = tuple(torch.zeros((16, gemm.k), dtype=kind.dtype) for kind in kinds)
    rows = Rows(codes, tuple(torch.zeros(16) for _ in kinds))
    dispatch = Dispatch(len(gemm.schemes), top_k, tokens, (classes_of(gemm, config)[0],))
    out = _outputs(gemm, config, dispatch, torch.device("cpu"))
    matrices, tables = Matrices(gemm, arena, None), allocate(dispatch, "cpu")
    gather = gemm.gated and not reads_sorted(config)
    run_gemm(matrices, config, rows, tables, 0, out, _epilogue(gemm), gather=gather, compile_only=True)


def _dispatch(job: Job) -> Dispatch:
    tiling = classes_of(job.workload.gemm(job.plan), parse_config(job.config))[0]
    return Dispatch(job.workload.experts, job.workload.top_k, job.tokens, (tiling,))


def _scheduled(dispatch: Dispatch, ids: NDArray[np.int64], device: torch.device | str) -> Tables:
    tables = allocate(dispatch, device)
    build(tables, torch.from_numpy(ids).to(device))
    return tables


def _epilogue(gemm: Gemm) -> Epilogue:
    return Epilogue("silu") if gemm.gated else Epilogue()


def _outputs(gemm: Gemm, config: Config, dispatch: Dispatch, device: torch.device) -> Tensor:
    parts = max(config.shape(scheme).parts for scheme in gemm.distinct)
    dtype = torch.float32 if parts > 1 else torch.bfloat16
    return torch.empty((parts, dispatch.rows, gemm.n), dtype=dtype, device=device)


def _said(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[-300:]


@dataclass
class Clock:
    """Measures launches on one GPU, and keeps weights for the next measurement of the same product."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    kept: dict[tuple[Gemm, int], Arena] = field(default_factory=dict)
    seen: dict[tuple[Workload, int, str], Tensor] = field(default_factory=dict)
    """Some rows of the first result of a launch, which those of other configs must equal."""
    sorting: dict[tuple[Workload, int, str], float] = field(default_factory=dict)
    """Microseconds that sorted rows cost beyond rows by token."""

    def time_us(self, job: Job) -> float:
        """
        Median microseconds of one launch, rows as it reads them made before; see `_sorting_us` for sorted ones.

        Raises:
            WrongTiles: its result is not that of the first config that was measured.
        """
        torch.manual_seed(SEED)
        gemm, config = job.workload.gemm(job.plan), parse_config(job.config)
        dispatch = _dispatch(job)
        turns = turns_of(job)
        tokens = job.tokens if gemm.gated else dispatch.rows
        x = torch.empty((tokens, gemm.k), dtype=torch.bfloat16, device=self.device).normal_()
        is_spread = gemm.gated and reads_sorted(config)
        rows = None if is_spread else make_rows(x, gemm.row_kinds)
        out = _outputs(gemm, config, dispatch, self.device)
        arenas = [self._arena(gemm, copy) for copy in range(1 + max(copy for copy, _ in turns))]
        calls: list[Callable[[], object]] = []
        for copy, ids in turns:
            tables, matrices = _scheduled(dispatch, ids, self.device), Matrices(gemm, arenas[copy], None)
            read = sort_rows(tables, x, gemm.row_kinds) if rows is None else rows
            gather = gemm.gated and not is_spread
            calls.append(partial(run_gemm, matrices, config, read, tables, 0, out, _epilogue(gemm), gather=gather))
        us = graph_us(calls)
        self._check(job, out)
        return us + self._sorting_us(job, x) if is_spread else us

    def _sorting_us(self, job: Job, x: Tensor) -> float:
        """Microseconds that a call takes longer from its routing to sorted rows than to rows by token."""
        key = (job.workload, job.tokens, job.plan)
        if key not in self.sorting:
            one, kinds = job.workload, job.workload.gemm(job.plan).row_kinds
            index = torch.from_numpy(routing(one.experts, one.top_k, job.tokens)).to(self.device)
            tables = allocate(_dispatch(job), self.device)
            by_token, by_expert = (
                graph_us([partial(begin, tables, index, x, kinds, is_sorted=is_sorted)] * 4, budget_ms=5.0)
                for is_sorted in (False, True)
            )
            self.sorting[key] = max(0.0, by_expert - by_token)
        return self.sorting[key]

    def _check(self, job: Job, out: Tensor) -> None:
        picked = torch.linspace(0, out.shape[1] - 1, min(16, out.shape[1]), device=out.device).long()
        found = out[:, picked].sum(0, dtype=torch.float32)
        exact = self.seen.setdefault((job.workload, job.tokens, job.plan), found)
        error = float((found - exact).norm() / exact.norm())
        if not error < MOST_ERROR:
            raise WrongTiles(config=job.config, scheme=job.plan, error=f"{error:.1e}")

    def _arena(self, gemm: Gemm, copy: int) -> Arena:
        found = self.kept.pop((gemm, copy), None)
        while found is None and self.kept and sum(one.data.nbytes for one in self.kept.values()) > ROOM:
            self.kept.pop(next(iter(self.kept)))
        if found is None:
            torch.manual_seed(SEED + copy)
            found = random_arena(gemm, self.device)
        self.kept[gemm, copy] = found
        return self.kept[gemm, copy]


def gpu_divides() -> bool:
    """Say whether the present GPU runs the divided kernels."""
    return torch.cuda.is_available() and hopper.runs_on(torch.device("cuda", torch.cuda.current_device()))


def graph_us(calls: Sequence[Callable[[], object]], *, budget_ms: float = 25.0, most: int = 11) -> float:
    """Median microseconds of one call: all of them in one CUDA graph, which is replayed for about `budget_ms`."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(most + 1)]
    found: list[float] = []
    spent = 0.0
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
        spent += found[-1]
        if len(found) > 3 and spent > budget_ms:
            break
    return statistics.median(found[1:]) * 1e3 / len(calls)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a file of measurements; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["status"]]


def add_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Add rows to a file of measurements, but those of launches that it has."""
    known = {tuple(row[name] for name in FIELDS[:8]) for row in read_rows(path)}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(row for row in rows if tuple(row[name] for name in FIELDS[:8]) not in known)


def sweep(jobs: Sequence[Job], path: Path, *, seconds: float, workers: int, title: str) -> list[dict[str, str]]:
    """
    Measure every job that the file lacks, in about the order given, and add a row for each; start none when time is up.

    Returns:
        All rows of the file.
    """
    start, seen = time.monotonic(), {tuple(row[name] for name in FIELDS[:8]) for row in read_rows(path)}
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in dict.fromkeys(jobs):
        if job.key not in seen:
            groups.setdefault(_kernel_key(job), []).append(job)
    is_new, clock = not path.exists(), Clock()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    with (
        path.open("a", newline="") as file,
        tqdm(total=sum(map(len, groups.values())), desc=title, mininterval=5) as bar,
    ):
        writer: csv.DictWriter[str] = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        pending = {pool.submit(compile_group, group): group for group in groups.values()}
        for done in as_completed(pending):
            for job in pending[done] if time.monotonic() - start < seconds else ():
                writer.writerow(_row(job, done.result(), clock))
                file.flush()
                bar.update()
            if time.monotonic() - start > seconds:
                break
    for process in list((pool._processes or {}).values()):  # pyright: ignore[reportPrivateUsage]  # no public way
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return read_rows(path)


def _kernel_key(job: Job) -> tuple[object, ...]:
    """What a kernel is compiled for: the job without its tokens, and what Triton asks of integer arguments."""
    dispatch, one = _dispatch(job), job.workload
    numbers = (dispatch.assignments, dispatch.tokens, dispatch.bands(0), dispatch.rows * one.n)
    return (one, job.plan, job.config, *(number if number == 1 else number % 16 == 0 for number in numbers))


def _row(job: Job, broken: str, clock: Clock) -> dict[str, object]:
    row: dict[str, object] = dict(zip(FIELDS, job.key, strict=False))
    if broken:
        return {**row, "status": f"compile: {broken}"}
    try:
        return {**row, "time_us": f"{clock.time_us(job):.3f}", "status": "ok"}
    except (RuntimeError, WrongTiles) as error:
        text = _said(error)
        if any(word in text for word in ("illegal", "assert", "unspecified", "misaligned")):
            raise  # the process has lost its GPU
        torch.cuda.empty_cache()
        return {**row, "status": f"failed: {text}"}
