"""Observers of a pipeline: print after each pass, time each pass, keep the text of every stage, dump it to files."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from mxmoe.ir import ModuleOp, Table, moe_ops, print_ir
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
        self.stream.write(f"// ---- after {step.spec()}\n{print_ir(module, elide=self.elide)}\n")


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
        """Keep the module as it came in."""
        self.after(step, module)

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Keep the module under its present stage."""
        blocks = moe_ops(module)
        if blocks:
            self.texts[blocks[0].stage] = print_ir(module, elide=None)


@dataclass
class Dump:
    """Writes `00-annotate-routing.mlir`, `01-...` into a folder, whole, so that each can be parsed again."""

    folder: Path
    _count: int = 0

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Nothing to do."""

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Write the module to the next file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self._count:02d}-{step.name}.mlir").write_text(print_ir(module, elide=None))
        self._count += 1
