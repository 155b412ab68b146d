"""Observers of a pipeline: print, time, verify, log, keep the text of every stage, dump it to files."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
from xdsl.utils.exceptions import VerifyException

from mxmoe.errors import PassFailed
from mxmoe.ir import (
    Allocation,
    GroupGemmOp,
    ModuleOp,
    Scheme,
    Table,
    TableAttr,
    allocation_of,
    banks,
    moe_ops,
    print_ir,
)
from mxmoe.passes.base import Pass


@dataclass
class PrintAfterAll:
    """Writes the module after every pass."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    elide: int | None = Table.ELIDE_ABOVE

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Nothing to do."""

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Write the pass and the module."""
        self.stream.write(f"// ---- after {step}\n{print_ir(module, elide=self.elide)}\n")


@dataclass
class TimePasses:
    """Measures the wall time of every pass."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Pass name -> seconds; a pass that ran twice has the sum."""
    _start: float = 0.0

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Stop the clock."""
        self.seconds[step.name] = self.seconds.get(step.name, 0.0) + time.perf_counter() - self._start

    def table(self) -> str:
        """Write one line a pass, and the total."""
        lines = [f"{seconds * 1e3:10.2f} ms  {name}" for name, seconds in self.seconds.items()]
        return "\n".join([*lines, f"{sum(self.seconds.values()) * 1e3:10.2f} ms  total"])


@dataclass
class KeepStages:
    """Keeps the whole text of the module at the end of every stage."""

    texts: dict[str, str] = field(default_factory=dict[str, str])
    """Stage -> text, as of the last pass that left the module in that stage."""

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Keep the module as it came in; later passes find it as the one before left it."""
        if not self.texts:
            self.after(step, module)

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Keep the module under its present stage."""
        blocks = moe_ops(module)
        if blocks:
            self.texts[blocks[0].stage] = print_ir(module, elide=None)


@dataclass
class Dump:
    """Writes `00-input.mlir`, `01-annotate-routing.mlir`, ... into a folder, whole, so that each parses again."""

    folder: Path
    _count: int = 0

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Write the module as it came in."""
        if not self._count:
            self._write("input", module)

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Write the module to the next file."""
        self._write(step.name, module)

    def _write(self, name: str, module: ModuleOp) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self._count:02d}-{name}.mlir").write_text(print_ir(module, elide=None), encoding="utf-8")
        self._count += 1


@dataclass
class VerifyEach:
    """Verifies the module after every pass, so that a mistake is named after the pass that made it."""

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Nothing to do."""

    def after(self, step: Pass, module: ModuleOp) -> None:
        """
        Verify the module.

        Raises:
            PassFailed: it does not verify.
        """
        try:
            module.verify()
        except VerifyException as error:
            raise PassFailed(name=str(step), reason=error) from error


@dataclass
class Log:
    """Writes one line a pass with its time, and the budget and what was reached where a pass allocated."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _clock: TimePasses = field(default_factory=TimePasses)
    _allocation: Allocation | None = None

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Start the clock."""
        self._clock.seconds.clear()
        self._clock.before(step, module)

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Write the line of the pass; the allocation when it is a new one."""
        self._clock.after(step, module)
        self.stream.write(f"mxmoe: {step}  {self._clock.seconds[step.name] * 1e3:.2f} ms\n")
        found = allocation_of(module)
        if found is not None and found != self._allocation:
            budget = ", ".join(f"{name} <= {limit:.12g}" for name, limit in found.budget.items()) or "no budget"
            self.stream.write(
                f"mxmoe: {budget}: {found.weight_bits:.4f} bits, loss {found.loss:.6g}, {found.time_us:.6g} us,"
                f" gap {found.gap:.1e} by {found.solver}\n"
            )
        self._allocation = found


@dataclass
class LogTables:
    """Writes one line for every table that a pass wrote, and how many rows chose each scheme."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _known: dict[str, Table] = field(default_factory=dict[str, Table])

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Remember the tables that are there."""
        self._known = dict(_tables(module))

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Write what is new."""
        new = {name: table for name, table in _tables(module) if self._known.get(name) != table}
        for name, table in new.items():
            self.stream.write(f"mxmoe:   {name}: {table.head()} {_range(table)}\n")
        if any(name.endswith(" choice") for name in new):
            counts = ", ".join(f"{scheme} x {count}" for scheme, count in histogram(module).items())
            self.stream.write(f"mxmoe:   {counts}\n")


def histogram(module: ModuleOp) -> dict[Scheme, int]:
    """Count the rows (expert x role) of each scheme in a module whose choices are made, most frequent first."""
    counts: Counter[Scheme] = Counter()
    for moe in moe_ops(module):
        for op in (op for bank in banks(moe).values() for op in (*bank.linears.values(), *bank.gemms)):
            if op.choice is not None:
                rows = len(op.weights) if isinstance(op, GroupGemmOp) else 1
                for index in op.choice.array.tolist():
                    counts[moe.candidates[index]] += rows
    return dict(counts.most_common())


def _tables(module: ModuleOp) -> Iterator[tuple[str, Table]]:
    """Give every table of a module under a name that says where it is."""
    for moe in moe_ops(module):
        for bank in banks(moe).values():
            for op in (bank.route, *bank.linears.values(), *bank.gemms):
                where = f"{moe.block} {bank.name}" + ("" if op is bank.route else f" {op.properties['role']}")
                for key, attribute in op.properties.items():
                    if isinstance(attribute, TableAttr):
                        yield f"{where} {key}".replace('"', ""), attribute.data


def _range(table: Table) -> str:
    """Say from where to where the values go, and how many are impossible."""
    finite = table.array[np.isfinite(table.array)]
    lost = table.array.size - finite.size
    extent = f"{finite.min():.6g} .. {finite.max():.6g}" if finite.size else "nothing finite"
    return extent + (f", {lost} not finite" if lost else "")
