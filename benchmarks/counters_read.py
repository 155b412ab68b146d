"""
What `counters.py` asks of Nsight Compute, and how its table is read: columns, ncu's CSV, ranges, the page.

A profiled range begins with a marker, torch's kernel that only waits; the kernels after it belong to the launch. The
longest of them stands for the launch, and all of them are counted. Percentages of a unit are those of its sustained
peak; `stall_*` are warps that wait for the reason, for each instruction issued.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MARKER = "spin_kernel"
"""Part of the name of the kernel behind `torch.cuda._sleep`."""
REASONS = (
    "barrier", "branch_resolving", "dispatch_stall", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "no_instruction", "not_selected", "selected", "short_scoreboard",
    "sleeping", "wait",
)  # fmt: skip
WORKS = "selected"
"""Not a reason to wait: the warp that issues."""


@dataclass(frozen=True)
class Metric:
    """One column of the result file."""

    column: str
    name: str
    """As ncu knows it, with rollup and unit."""
    scale: float = 1.0
    """From ncu's base unit to the column's."""

    @property
    def base(self) -> str:
        """The name without what is computed from it, as `ncu --query-metrics` lists it."""
        return self.name.partition(".")[0]


_ELAPSED, _ACTIVE = "avg.pct_of_peak_sustained_elapsed", "avg.pct_of_peak_sustained_active"
METRICS = (
    Metric("time_us", "gpu__time_duration.sum", 1e-3),
    Metric("sm_cycles", "sm__cycles_elapsed.max"),
    Metric("sm_cycles_active", "sm__cycles_active.avg"),
    Metric("sm_ghz", "smsp__cycles_elapsed.avg.per_second", 1e-9),
    Metric("tensor_pct", f"sm__pipe_tensor_cycles_active.{_ELAPSED}"),
    Metric("tensor_active_pct", f"sm__pipe_tensor_cycles_active.{_ACTIVE}"),
    Metric("gmma_instructions", "sm__inst_executed_pipe_tensor_op_gmma.sum"),
    Metric("dram_pct", f"dram__throughput.{_ELAPSED}"),
    Metric("dram_read_mb", "dram__bytes_read.sum", 1e-6),
    Metric("dram_write_mb", "dram__bytes_write.sum", 1e-6),
    Metric("l2_pct", f"lts__t_sectors.{_ELAPSED}"),
    Metric("l2_read_mb", "lts__t_sectors_op_read.sum", 32e-6),
    Metric("l2_hit_pct", "lts__t_sector_hit_rate.pct"),
    Metric("issue_per_cycle", "sm__inst_issued.avg.per_cycle_active"),
    Metric("alu_pct", f"sm__inst_executed_pipe_alu.{_ACTIVE}"),
    Metric("fma_pct", f"sm__inst_executed_pipe_fma.{_ACTIVE}"),
    Metric("xu_pct", f"sm__inst_executed_pipe_xu.{_ACTIVE}"),
    Metric("lsu_pct", f"sm__inst_executed_pipe_lsu.{_ACTIVE}"),
    Metric("warps_pct", f"sm__warps_active.{_ACTIVE}"),
    Metric("shared_pct", f"l1tex__data_pipe_lsu_wavefronts_mem_shared.{_ELAPSED}"),
    Metric("shared_conflicts", "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"),
    *(Metric(f"stall_{one}", f"smsp__average_warps_issue_stalled_{one}_per_issue_active.ratio") for one in REASONS),
)
FIELDS = ("model", "tokens", "part", "contender", "weight_class", "kernel", "kernels", "grid", "block")


@dataclass(frozen=True)
class Profiled:
    """One kernel that ncu has measured."""

    name: str
    grid: str
    block: str
    values: Mapping[str, float]
    """Metric, as ncu knows it -> value in its base unit; NaN where ncu has none."""


def known_names(listing: str) -> set[str]:
    """Base names in what `ncu --query-metrics` prints."""
    return set(re.findall(r"^\s*([a-z0-9]+__\w+)\b", listing, re.MULTILINE))


def known_metrics(listing: str) -> tuple[list[Metric], list[Metric]]:
    """Those that ncu has, and those it has not; all count as known where nothing can be read."""
    names = known_names(listing)
    if not names:
        return list(METRICS), []
    return [one for one in METRICS if one.base in names], [one for one in METRICS if one.base not in names]


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.nan


def parse_ncu(text: str) -> list[Profiled]:
    """Kernels in the order of their launches, from `ncu --csv --page raw --print-units base`."""
    lines = text.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    # the line of units below the header has no ID, ncu's own messages begin with ==
    rows = csv.DictReader(line for line in lines[start:] if line.strip() and not line.startswith("=="))
    return [
        Profiled(
            row["Kernel Name"],
            row.get("Grid Size", ""),
            row.get("Block Size", ""),
            {name: _number(value or "") for name, value in row.items() if name and "__" in name},
        )
        for row in rows
        if (row["ID"] or "").strip().isdigit()
    ]


def split_ranges(kernels: Iterable[Profiled]) -> list[list[Profiled]]:
    """Kernels behind each marker; what comes before the first one is dropped."""
    found: list[list[Profiled]] = []
    for kernel in kernels:
        if MARKER in kernel.name:
            found.append([])
        elif found:
            found[-1].append(kernel)
    return found


def _time(kernel: Profiled) -> float:
    value = kernel.values.get(METRICS[0].name, math.nan)
    return 0.0 if math.isnan(value) else value


def row_of(about: Mapping[str, Any], kernels: Sequence[Profiled]) -> dict[str, Any]:
    """One row of the result file: what is known of the range, and the counters of its longest kernel."""
    longest = max(kernels, key=_time)
    row: dict[str, Any] = {name: about[name] for name in FIELDS[:5]}
    row |= {"kernel": longest.name, "kernels": len(kernels), "grid": longest.grid, "block": longest.block}
    for metric in METRICS:
        value = longest.values.get(metric.name, math.nan)
        row[metric.column] = "" if math.isnan(value) else f"{value * metric.scale:.6g}"
    return row


def rows_of(ranges: Sequence[Mapping[str, Any]], kernels: Iterable[Profiled]) -> tuple[list[dict[str, Any]], list[str]]:
    """
    Rows in the order in which cells were asked for, and what has none.

    Args:
        ranges: what the child wrote before each marker, in the order of running, each with its `place`.
        kernels: everything ncu has measured, markers too.
    """
    parts = split_ranges(kernels)
    if len(parts) > len(ranges):
        raise ValueError(f"{len(parts)} markers were measured, but only {len(ranges)} ranges were begun")
    full = [(one, own) for one, own in zip(ranges, parts, strict=False) if own]
    empty = [one for one in ranges if not any(one is other for other, _ in full)]
    rows = [row_of(one, own) for one, own in sorted(full, key=lambda pair: pair[0]["place"])]
    return rows, [f"{spell(one)}: no kernel was measured" for one in empty]


def spell(row: Mapping[str, Any]) -> str:
    """`mixtral 512 down ours_bf16`."""
    return f"{row['model']} {row['tokens']} {row['part']} {row['contender']}"


def top_stalls(row: Mapping[str, Any], number: int = 2) -> str:
    """The reasons for which most warps wait, with how many do for each instruction issued."""
    reasons = [one for one in REASONS if one != WORKS and row.get(f"stall_{one}")]
    most = sorted(reasons, key=lambda one: -float(row[f"stall_{one}"]))[:number]
    return ", ".join(f"{one} {float(row[f'stall_{one}']):.2g}" for one in most)


_SHOWN = (
    ("us", "time_us", ".1f"), ("GHz", "sm_ghz", ".2f"), ("tensor %", "tensor_pct", ".0f"),
    ("DRAM %", "dram_pct", ".0f"), ("L2 %", "l2_pct", ".0f"), ("issue / cycle", "issue_per_cycle", ".2f"),
    ("ALU %", "alu_pct", ".0f"),
    ("FMA %", "fma_pct", ".0f"), ("XU %", "xu_pct", ".0f"), ("shared %", "shared_pct", ".0f"),
)  # fmt: skip


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each cell and contender; ours and the peers of a cell follow each other."""
    heads = ["cell", "contender", *(head for head, _, _ in _SHOWN), "warps waiting per issue"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    last = ""
    for row in rows:
        cell = f"{row['model']} {row['tokens']} {row['part']}"
        shown = [format(float(row[name]), spec) if row.get(name) else "-" for _, name, spec in _SHOWN]
        values = ["" if cell == last else cell, row["contender"], *shown, top_stalls(row)]
        lines.append(f"| {' | '.join(values)} |")
        last = cell
    return "\n".join(lines) + "\n"
