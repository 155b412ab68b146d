"""
Workloads of the grouped GEMM benchmarks: shapes, seeded routings, rotations, ceilings, rooflines and the clock.

One cell is a model, a token count and a part: `gate_up` is [rows, hidden] x [experts, 2 x intermediate, hidden],
`down` is [rows, intermediate] x [experts, hidden, intermediate], `block` is everything from the routing's indices to
the combined output. Only routed experts count. Rows are tokens x top-k.

Skewed routings draw top-k experts without replacement (Gumbel top-k) with p(expert) ~ 1 / (rank + 3), ranks being a
seeded permutation; balanced ones deal experts out in turn. A launch is timed over rotations of one routing: experts are
relabelled so that active ones do not come back before all others had their turn, and a few copies of the weights are
used where a set is small, so that every launch reads its weights from memory although launches follow back to back.
A rotation's time is that of one CUDA graph of all of them, divided by their number; the median of replays counts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SEED = 1234
PARTS = ("gate_up", "down", "block")
TOKENS = (1, 16, 64, 512, 2048, 8192)


@dataclass(frozen=True)
class Model:
    """Shape of the routed experts of one block."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


MODELS = {
    model.name: model
    for model in (
        Model("qwen15_moe", 2048, 1408, 60, 4),
        Model("mixtral", 4096, 14336, 8, 2),
        Model("dsv3", 7168, 2048, 256, 8),
        Model("tiny", 256, 128, 8, 2),
    )
}


@dataclass(frozen=True)
class Cell:
    """One workload: what is multiplied, and how tokens are routed."""

    model: Model
    tokens: int
    part: str
    routing: str = "skew"

    @property
    def rows(self) -> int:
        """Assignments of tokens to experts."""
        return self.tokens * self.model.top_k

    @property
    def gemms(self) -> tuple[tuple[int, int], ...]:
        """(output channels, input channels) of each product of the part."""
        model = self.model
        both = ((2 * model.intermediate, model.hidden), (model.hidden, model.intermediate))
        return {"gate_up": both[:1], "down": both[1:], "block": both}[self.part]

    @property
    def flops(self) -> float:
        """Two for each multiply-add."""
        return sum(2.0 * self.rows * n * k for n, k in self.gemms)

    def weight_bytes(self, bits: float, active: int) -> float:
        """Bytes of the weights of `active` experts at so many bits per weight, scales included."""
        return sum(active * n * k * bits / 8 for n, k in self.gemms)

    def activation_bytes(self, act_bytes: float) -> float:
        """Every input read once and every 16-bit output written once; a block reads and writes 16-bit tokens only."""
        model = self.model
        if self.part == "block":
            return self.tokens * model.hidden * 4.0
        reads = self.tokens * model.hidden if self.part == "gate_up" else self.rows * model.intermediate
        return reads * act_bytes + self.rows * self.gemms[0][0] * 2


PEAKS = {"bandwidth": 4.60e12, "bf16": 788e12, "fp8": 1475e12, "int8": 1593e12}
"""Bytes/s and FLOP/s that one H200 (700 W) reached: a read-only kernel; dense products of 4096^3, random data."""


def roofline_us(cell: Cell, bits: float, act_bytes: float, unit: str, active: int) -> tuple[float, str]:
    """Least time in microseconds, and whether memory or the matrix unit sets it."""
    moved = cell.weight_bytes(bits, active) + cell.activation_bytes(act_bytes)
    memory, compute = moved / PEAKS["bandwidth"] * 1e6, cell.flops / PEAKS[unit] * 1e6
    return max(memory, compute), "memory" if memory >= compute else "compute"


def popularity(experts: int, seed: int = SEED) -> NDArray[np.float64]:
    """Probability [experts] of each expert of a skewed routing."""
    rank = np.random.default_rng(seed).permutation(experts)
    weight = 1.0 / (rank + 3.0)
    return weight / weight.sum()


def draw_routing(
    model: Model, tokens: int, routing: str = "skew", seed: int = SEED
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Expert ids [tokens, top_k] and router weights [tokens, top_k] that sum to one, the same in every run."""
    rng = np.random.default_rng(seed + 7919 * tokens)
    if routing == "skew":
        noise = rng.gumbel(size=(tokens, model.experts))
        keys = np.log(popularity(model.experts, seed))[None, :] + noise
        ids = np.argsort(-keys, axis=1, kind="stable")[:, : model.top_k]
    elif routing == "balanced":
        dealt = np.arange(tokens)[:, None] * model.top_k + np.arange(model.top_k)[None, :]
        ids = np.random.default_rng(seed).permutation(model.experts)[dealt % model.experts]
    else:
        raise ValueError(f"{routing=} is neither skew nor balanced")
    weights = rng.random((tokens, model.top_k)).astype(np.float32) + 0.1
    return ids.astype(np.int32), weights / weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Rotation:
    """One relabelled routing on the device, sorted by expert."""

    ids: Tensor
    """[tokens, top_k] int32."""
    weights: Tensor
    """[tokens, top_k] float32."""
    order: Tensor
    """[rows] int64: place in the order of experts -> token * top_k + slot."""
    inverse: Tensor
    """[rows] int64: token * top_k + slot -> place in the order of experts."""
    ends: Tensor
    """[experts] int32: where each expert's rows end in the sorted order."""
    counts: NDArray[np.int64]
    """[experts] rows of each expert, on the host."""
    copy: int
    """Which copy of the weights the launch reads."""

    @property
    def active(self) -> int:
        """Experts with at least one row."""
        return int(np.count_nonzero(self.counts))


def _rotation(ids: NDArray[np.int32], weights: NDArray[np.float32], experts: int, device: str, copy: int) -> Rotation:
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    counts = np.bincount(flat, minlength=experts).astype(np.int64)
    put = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (ids, weights, order, inverse)]
    ends = torch.from_numpy(np.cumsum(counts).astype(np.int32)).to(device)
    return Rotation(put[0], put[1], put[2], put[3], ends, counts, copy)


MIN_BYTES, MOST_ROTATIONS, COPY_BYTES = 300e6, 16, 256e6


def copies_needed(cell: Cell, bits: float) -> int:
    """How many sets of weights keep a set of all experts from staying in the cache."""
    return min(MOST_ROTATIONS, max(1, math.ceil(COPY_BYTES / cell.weight_bytes(bits, cell.model.experts))))


def rotations(cell: Cell, bits: float, *, copies: int = 1, device: str = "cuda", seed: int = SEED) -> list[Rotation]:
    """Relabelled copies of the cell's routing whose launches, in turn, find none of their weights in the cache."""
    model = cell.model
    ids, weights = draw_routing(model, cell.tokens, cell.routing, seed)
    active = np.unique(ids)
    used, experts = active.size, model.experts
    labels = np.concatenate([active, np.setdiff1d(np.arange(experts), active)])
    place = np.empty(experts, np.int64)
    place[labels] = np.arange(experts)
    # sized by the smaller product, so that both parts of a model are timed over the same rotations
    launch_bytes = used * model.hidden * model.intermediate * bits / 8
    number = int(min(MOST_ROTATIONS, max(2, math.ceil(MIN_BYTES / launch_bytes))))
    if used == experts:
        number = min(max(number, copies), 4 if launch_bytes > 1e8 else MOST_ROTATIONS)
    found: list[Rotation] = []
    for turn in range(number):
        shift = (turn * used) % experts if used < experts else turn
        copy = ((turn * used) // experts if used < experts else turn) % copies
        relabelled = labels[(place[ids] + shift) % experts].astype(np.int32)
        found.append(_rotation(relabelled, weights, experts, device, copy))
    return found


def fixed_rotations(cell: Cell, copies: int, *, device: str = "cuda", seed: int = SEED) -> list[Rotation]:
    """As many launches of one routing as there are copies of the weights: for plans whose experts are not alike."""
    ids, weights = draw_routing(cell.model, cell.tokens, cell.routing, seed)
    return [_rotation(ids, weights, cell.model.experts, device, copy) for copy in range(copies)]


def plan_copies(cell: Cell, bits: float) -> int:
    """How many copies of all weights keep the active ones of one routing out of the cache."""
    active = np.unique(draw_routing(cell.model, cell.tokens, cell.routing)[0]).size
    return int(min(MOST_ROTATIONS, max(2, math.ceil(MIN_BYTES / cell.weight_bytes(bits, active)))))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values; inf where anything is not finite."""
    error = float((found.double() - exact.double()).norm() / exact.double().norm())
    return error if math.isfinite(error) else math.inf


def random_values(shape: Sequence[int], scale: float, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal values of some standard deviation, made in slices so that large arrays need little beside themselves."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    for part in out.view(-1).split(1 << 28):
        wide = torch.bfloat16 if dtype.itemsize < 2 else dtype
        part.copy_(torch.empty(part.shape, dtype=wide, device=device).normal_(0, scale, generator=generator))
    return out


def random_bytes(shape: Sequence[int], low: int, high: int, device: str, seed: int) -> Tensor:
    """Bytes from low to high - 1."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(tuple(shape), dtype=torch.uint8, device=device)
    for part in out.view(-1).split(1 << 28):
        part.random_(low, high, generator=generator)
    return out


def graph_us(launches: Sequence[Callable[[], Any]], *, budget_ms: float = 50.0, most: int = 15) -> float:
    """Median microseconds of one launch: all launches in one CUDA graph, which is replayed for about `budget_ms`."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [launch() for launch in launches]
    del kept

    def replay() -> tuple[Any, Any]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        return start, end

    replay()
    torch.cuda.synchronize()
    first = replay()
    torch.cuda.synchronize()
    repeats = int(min(most, max(3, budget_ms / max(first[0].elapsed_time(first[1]), 1e-3))))
    pairs = [replay() for _ in range(repeats)]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3 / len(launches)


def dense_rates(size: int = 4096) -> dict[str, float]:
    """FLOP/s of torch's dense products of random square matrices, on the present device: how fast it is today."""
    a, b = (random_values((size, size), 1.0, torch.bfloat16, "cuda", seed) for seed in (0, 1))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    ai, bi = (x.mul(30).clamp(-127, 127).to(torch.int8) for x in (a, b))
    calls: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: a @ b.T,
        "fp8": lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
        "int8": lambda: torch._int_mm(ai, bi.T),
    }
    return {name: 2e6 * size**3 / graph_us([call] * 8) for name, call in calls.items()}


def wall_us(launches: Sequence[Callable[[], Any]]) -> float:
    """Median microseconds of one launch on the wall clock: where there is no GPU, to try the harness."""
    times: list[float] = []
    for launch in launches[:2]:
        start = time.perf_counter()
        launch()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)
