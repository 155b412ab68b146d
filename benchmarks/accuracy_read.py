"""The rows of the accuracy study, and what is read out of them: means, margins against the noise of seeds, ranks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Cells = dict[str, str]
METRICS = ("ppl", "kl", "kl_p99", "top1")


@dataclass(frozen=True)
class Line:
    """One measured plan."""

    model: str
    quantizer: str
    seed: int
    setting: str
    method: str
    cells: Cells

    def number(self, name: str) -> float:
        """Give a cell as a number; NaN where it is empty or not there."""
        text = self.cells.get(name, "")
        return float(text) if text else math.nan

    @property
    def added(self) -> float:
        """Held-out loss that quantization adds, in nats per token."""
        return math.log(self.number("held_ppl") / self.number("held_ppl_bf16"))

    @property
    def added_outside(self) -> float:
        """The same on text of another kind."""
        return math.log(self.number("ood_ppl") / self.number("ood_ppl_bf16"))


class Table:
    """All rows."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a CSV of the study."""
        found = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        return cls(Line(c["model"], c["quantizer"], int(c["seed"]), c["setting"], c["method"], c) for c in found)

    def pick(self, **wanted: Any) -> list[Line]:  # noqa: ANN401  # a field's value, or several
        """Give the rows whose fields have the wanted values, or one of the wanted values."""

        def fits(line: Line) -> bool:
            each = ((getattr(line, name), value) for name, value in wanted.items())
            return all(own in value if isinstance(value, tuple) else own == value for own, value in each)

        return [line for line in self.lines if fits(line)]

    def by_seed(self, value: Callable[[Line], float], **wanted: Any) -> dict[int, float]:  # noqa: ANN401
        """Seed -> value of the row that fits."""
        return {line.seed: value(line) for line in self.pick(**wanted)}


@dataclass(frozen=True)
class Margin:
    """How much less of something one way has than another, seed by seed."""

    mean: float
    deviation: float
    """Standard deviation over the seeds; NaN of one."""
    seeds: int

    @classmethod
    def of(cls, better: dict[int, float], worse: dict[int, float]) -> Margin:
        """Pair two ways by seed; a way that was measured with one seed only stands beside all."""
        if len(worse) == 1 and len(better) > 1:
            worse = dict.fromkeys(better, next(iter(worse.values())))
        common = sorted(set(better) & set(worse))
        gains = np.array([worse[seed] - better[seed] for seed in common])
        deviation = float(gains.std(ddof=1)) if len(gains) > 1 else math.nan
        return cls(float(gains.mean()) if len(gains) else math.nan, deviation, len(gains))

    @property
    def is_clear(self) -> bool:
        """Positive, and more than twice its deviation over at least two seeds."""
        return self.seeds > 1 and self.mean > 2 * self.deviation

    @property
    def is_no_loss(self) -> bool:
        """Not worse by more than twice its deviation."""
        noise = 0.0 if math.isnan(self.deviation) else 2 * self.deviation
        return self.seeds > 0 and self.mean >= -noise

    def __str__(self) -> str:
        if not self.seeds or math.isnan(self.mean):
            return "–"
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.4f}"
        return f"{self.mean:+.4f}{spread}"


def mean_of(values: Iterable[float]) -> float:
    """Give the mean; NaN of nothing."""
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def with_spread(values: Sequence[float], form: str) -> str:
    """Write mean and standard deviation, a dash where nothing was measured."""
    if not values or math.isnan(values[0]):
        return "–"
    mean = format(float(np.mean(values)), form)
    return mean if len(values) < 2 else f"{mean} ± {format(float(np.std(values, ddof=1)), form)}"


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Give the correlation of the ranks, equal values sharing their mean rank; NaN of fewer than three pairs."""
    if len(left) < 3:
        return math.nan
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
