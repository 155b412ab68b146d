"""
Holds the times of `group_gemm.py` against its marks, one by one, and says by how much each is met or missed.

Two references: the peers that were measured in the same run, and the best published time of each weight class in every
cell (`results/peers_h200.csv`: the same GPU model, the same routings and clock, measured before this project's kernels
existed, and with kernels that cannot be carried to every machine). Ours in a weight class is the fastest of our uniform
schemes of the class. Writes `benchmarks/results/marks.md`.

    python benchmarks/marks.py [results/group_gemm.csv]
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import RESULTS
from moe_plans import SCHEMES, Plan, plan_of, rows_of
from moe_workloads import MODELS, PEAKS, Cell

Key = tuple[str, int, str]
"""Model, tokens, part."""
GEMMS = ("gate_up", "down")
DECODE, PREFILL = (1, 16, 64), 8192
REFERENCES = ("same run", "published")


@dataclass(frozen=True)
class Row:
    """One measured or published time."""

    key: Key
    contender: str
    weight_class: str
    time_us: float
    fraction: float = math.nan
    """Roofline over time."""
    tflops: float = math.nan
    format: str = ""

    @property
    def is_ours(self) -> bool:
        """Ours are named so."""
        return self.contender.startswith("ours_")


@dataclass(frozen=True)
class Mark:
    """One mark and what was found."""

    name: str
    asked: str
    found: Mapping[str, str]
    """Reference -> what was found; a mark that needs none has one entry, under ""."""
    passed: Mapping[str, bool | None]
    """None: nothing was measured."""
    misses: Sequence[str] = field(default=())
    """Cells that miss, worst first."""


def parse(path: Path) -> list[Row]:
    """Rows of a result file whose time counts: measured, skewed, and near enough to float32."""
    with path.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row.get("status", "ok") == "ok" and row.get("time_us")]
    return [
        Row(
            (row["model"], int(row["tokens"]), row["part"]),
            row["contender"],
            row["weight_class"],
            float(row["time_us"]),
            float(row.get("fraction") or math.nan),
            float(row.get("tflops") or math.nan),
            row["format"],
        )
        for row in found
        if row.get("routing", "skew") == "skew" and row["model"] != "tiny"
    ]


def best(rows: Iterable[Row], chosen: Callable[[Row], bool]) -> dict[Key, Row]:
    """Cell -> the fastest of the chosen rows."""
    found: dict[Key, Row] = {}
    for row in rows:
        if chosen(row) and (row.key not in found or row.time_us < found[row.key].time_us):
            found[row.key] = row
    return found


def ours_of(rows: Iterable[Row], weight_class: str) -> dict[Key, Row]:
    """Cell -> our fastest uniform scheme of a class."""
    return best(rows, lambda row: row.is_ours and row.weight_class == weight_class)


def peers_of(rows: Iterable[Row], weight_class: str) -> dict[Key, Row]:
    """Cell -> the fastest peer of a class."""
    return best(rows, lambda row: not row.is_ours and row.weight_class == weight_class)


def speedups(peers: Mapping[Key, Row], ours: Mapping[Key, Row], parts: Sequence[str]) -> dict[Key, float]:
    """Cell -> the peer's time over ours, where both were measured."""
    both = [key for key in ours if key in peers and key[2] in parts]
    return {key: peers[key].time_us / ours[key].time_us for key in both}


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def say(key: Key) -> str:
    """`mixtral 512 down`."""
    return f"{key[0]} {key[1]} {key[2]}"


def _misses(values: Mapping[Key, float], least: float, reference: str) -> list[str]:
    low = sorted((value, key) for key, value in values.items() if value < least)
    return [f"{say(key)}: {value:.3f}x ({reference})" for value, key in low]


def share_mark(
    name: str, asked: str, sets: Mapping[str, Mapping[Key, float]], least: float, share: float, cells: int
) -> Mark:
    """A mark that a share of all cells must reach a speedup."""
    found: dict[str, str] = {}
    passed: dict[str, bool | None] = {}
    misses: list[str] = []
    for reference, values in sets.items():
        good = sum(value >= least for value in values.values())
        low = min(values.values(), default=math.nan)
        count = len(values)
        missing = f", {cells - count} not measured" if count < cells else ""
        found[reference] = f"{good} of {count} cells ({good / max(1, count):.0%}), worst {low:.2f}x{missing}"
        passed[reference] = good >= share * count if count else None
        misses += _misses(values, least, reference)
    return Mark(name, asked, found, passed, misses)


def mean_mark(name: str, asked: str, sets: Mapping[str, Mapping[Key, float]], least: float) -> Mark:
    """A mark on the geometric mean of speedups."""
    means = {reference: geometric_mean(values.values()) for reference, values in sets.items()}
    found = {one: f"{mean:.3f}x over {len(sets[one])} cells" for one, mean in means.items()}
    return Mark(name, asked, found, {one: None if math.isnan(mean) else mean >= least for one, mean in means.items()})


def floor_mark(name: str, asked: str, values: Mapping[str, float], least: float, unit: str = "") -> Mark:
    """A mark that every named value must reach."""
    low = sorted((value, name) for name, value in values.items() if value < least)
    worst = min(values.values(), default=math.nan)
    text = f"{len(values) - len(low)} of {len(values)}, worst {worst:.3f}{unit}"
    passed = not low if values else None
    return Mark(name, asked, {"": text}, {"": passed}, [f"{own}: {value:.3f}{unit}" for value, own in low])


def class_marks(rows: Sequence[Row], published: Sequence[Row], weight_class: str) -> list[Mark]:
    """What a class owes its peers over all products."""
    least, share, mean = {"4bit": (1.0, 0.9, 1.3), "8bit": (1.0, 0.9, 1.1), "bf16": (1 / 1.05, 0.9, 0.0)}[weight_class]
    ours = ours_of(rows, weight_class)
    sources = dict(zip(REFERENCES, (rows, published), strict=True))
    sets = {one: speedups(peers_of(source, weight_class), ours, GEMMS) for one, source in sources.items()}
    asked = {"4bit": "faster", "8bit": "at least as fast", "bf16": "within 5 %"}[weight_class]
    marks = [share_mark(f"{weight_class} products", f"{asked} in >= {share:.0%} of cells", sets, least, share, 36)]
    if mean:
        marks.append(mean_mark(f"{weight_class} products, mean", f"geometric mean >= {mean}x", sets, mean))
    return marks


def roofline_marks(rows: Sequence[Row]) -> list[Mark]:
    """Fractions of our own rooflines."""
    decode = {
        say(key): row.fraction
        for key, row in best(rows, lambda row: row.is_ours and row.weight_class == "4bit").items()
        if key[0] in ("dsv3", "mixtral") and key[1] in DECODE and key[2] == "gate_up"
    }
    rates: dict[str, float] = {}
    for row in rows:
        if row.is_ours and row.weight_class == "8bit" and row.key[:2] == ("mixtral", PREFILL) and row.key[2] in GEMMS:
            share = row.tflops * 1e12 / PEAKS[SCHEMES[row.format][2]]
            rates[say(row.key)] = max(rates.get(say(row.key), 0.0), share)
    return [
        floor_mark("4bit decode, gate_up of dsv3 and mixtral", ">= 0.75 of its roofline", decode, 0.75),
        floor_mark("8bit mixtral at 8192 tokens", ">= 0.90 of the dense rate of its unit", rates, 0.90),
    ]


def expected_us(cell: Cell, plan: Sequence[str], uniform_us: Mapping[str, float]) -> float:
    """
    Time of a mix if each expert cost what it costs in a launch of its scheme alone.

    A uniform launch's time is shared among its experts by their own rooflines; each expert brings its share along.
    """
    rows = rows_of(cell)
    (n, k) = cell.gemms[0]
    total = 0.0
    for scheme in set(plan):
        bits, _, unit, _ = SCHEMES[scheme]
        cost = np.maximum(n * k * bits / 8 / PEAKS["bandwidth"], 2.0 * rows * n * k / PEAKS[unit]) * (rows > 0)
        mine = np.array([own == scheme for own in plan])
        total += uniform_us[scheme] * float(cost[mine].sum() / cost.sum())
    return total


def mix_marks(rows: Sequence[Row], plans: Sequence[str], plan_source: Callable[[str, Cell], Plan]) -> list[Mark]:
    """One launch against the sum of its parts, and against a launch or a stream for each scheme."""
    times = {(row.key, row.contender): row.time_us for row in rows}
    parts: dict[str, float] = {}
    rivals: dict[str, dict[str, float]] = {"split": {}, "streams": {}}
    for key in sorted({row.key for row in rows if row.key[2] in GEMMS}):
        cell = Cell(MODELS[key[0]], key[1], key[2])
        for plan in plans:
            name = "ours_" + plan.replace(":", "").replace(".", "")
            if (key, name) not in times:
                continue
            schemes = plan_source(plan, cell)[0]
            uniform = {one: times.get((key, f"ours_{one}"), math.nan) for one in set(schemes)}
            expected = expected_us(cell, schemes, uniform)
            if not math.isnan(expected):
                parts[f"{plan} {say(key)}"] = expected / times[key, name]
            for kind, found in rivals.items():
                if (key, f"{name}_{kind}") in times:
                    found[f"{plan} {say(key)}"] = times[key, f"{name}_{kind}"] / times[key, name]
    return [
        floor_mark("mixed launch, parts over whole", "whole <= 1.05x its parts", parts, 1 / 1.05, "x"),
        floor_mark("mixed launch over one launch per scheme", "faster in every cell", rivals["split"], 1.0, "x"),
        floor_mark("mixed launch over one stream per scheme", "faster in every cell", rivals["streams"], 1.0, "x"),
    ]


def plan_marks(rows: Sequence[Row], published: Sequence[Row], name: str = "ours_bits5") -> list[Mark]:
    """Plans at five bits against the best uniform 8-bit peer."""
    ours = best(rows, lambda row: row.contender == name)
    sources = dict(zip(REFERENCES, (rows, published), strict=True))
    sets = {one: speedups(peers_of(source, "8bit"), ours, GEMMS) for one, source in sources.items()}

    def where(allowed: Callable[[int], bool]) -> dict[str, dict[Key, float]]:
        return {one: {key: v for key, v in values.items() if allowed(key[1])} for one, values in sets.items()}

    few, many, middle = where(lambda t: t <= 512), where(lambda t: t == PREFILL), where(lambda t: t == 512)
    return [
        share_mark("plans at 5 bits, up to 512 tokens", "faster than 8-bit peers in every cell", few, 1.0, 1.0, 24),
        share_mark("plans at 5 bits, 8192 tokens", "never slower", many, 1.0, 1.0, 6),
        mean_mark("plans at 5 bits, 512 tokens, mean", "geometric mean >= 1.3x", middle, 1.3),
    ]


def block_marks(rows: Sequence[Row], published: Sequence[Row]) -> list[Mark]:
    """Whole blocks, class by class, and what a block costs beyond its products."""
    sources = dict(zip(REFERENCES, (rows, published), strict=True))
    marks: list[Mark] = []
    everything: dict[str, dict[Key, float]] = {one: {} for one in REFERENCES}
    for weight_class in ("4bit", "8bit", "bf16"):
        ours = ours_of(rows, weight_class)
        sets = {one: speedups(peers_of(source, weight_class), ours, ("block",)) for one, source in sources.items()}
        marks.append(mean_mark(f"block, {weight_class}", "geometric mean >= 1.25x", sets, 1.25))
        for one, values in sets.items():
            everything[one] |= {(key[0], key[1], f"block {weight_class}"): value for key, value in values.items()}
    times = {(row.key, row.contender): row.time_us for row in rows if row.is_ours}
    extra: dict[str, float] = {}
    for (key, contender), us in times.items():
        model, tokens, part = key
        parts = [times.get(((model, tokens, one), contender)) for one in GEMMS]
        if part == "block" and tokens == 16 and None not in parts:
            extra[f"{model} {contender}"] = us - sum(one or 0.0 for one in parts)
    low = sorted(((value, name) for name, value in extra.items() if value >= 8.0), reverse=True)
    worst = max(extra.values(), default=math.nan)
    fixed = Mark(
        "block at 16 tokens, beyond its products",
        "< 8 us",
        {"": f"{len(extra) - len(low)} of {len(extra)}, worst {worst:.1f} us"},
        {"": not low if extra else None},
        [f"{name}: {value:.1f} us" for value, name in low],
    )
    return [mean_mark("block, all classes", "geometric mean >= 1.25x", everything, 1.25), *marks, fixed]


def all_marks(
    rows: Sequence[Row], published: Sequence[Row], plan_source: Callable[[str, Cell], Plan] = plan_of
) -> list[Mark]:
    """Every mark in the order in which they are asked for."""
    classes = [mark for kind in ("4bit", "8bit", "bf16") for mark in class_marks(rows, published, kind)]
    mixes = mix_marks(rows, ("hot:0.25", "bits:5"), plan_source)
    return [*classes, *roofline_marks(rows), *mixes, *plan_marks(rows, published), *block_marks(rows, published)]


def winners(rows: Sequence[Row]) -> list[str]:
    """A line for each class: which of our schemes was the fastest in how many cells of products."""
    lines: list[str] = []
    for weight_class in ("4bit", "8bit", "bf16"):
        formats = [row.format for key, row in ours_of(rows, weight_class).items() if key[2] in GEMMS]
        counts = sorted(((formats.count(one), one) for one in set(formats)), reverse=True)
        if counts:
            each = ", ".join(f"{name} in {n}" for n, name in counts)
            lines.append(f"Fastest of ours, {weight_class}: {each} of {len(formats)} cells.")
    return lines


WORDS = {True: "met", False: "missed", None: "not measured"}


def markdown(marks: Sequence[Mark], shown: int = 12) -> str:
    """The table, and under it the cells that miss."""
    lines = ["| mark | asked | against | found | |", "|---|---|---|---|---|"]
    for mark in marks:
        for reference, text in mark.found.items():
            verdict = WORDS[mark.passed[reference]]
            found = "-" if mark.passed[reference] is None else text
            lines.append(f"| {mark.name} | {mark.asked} | {reference or 'itself'} | {found} | {verdict} |")
    for mark in marks:
        if mark.misses:
            rest = f" and {len(mark.misses) - shown} more" if len(mark.misses) > shown else ""
            lines += ["", f"**{mark.name}**, cells that miss: {'; '.join(mark.misses[:shown])}{rest}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    from mxmoe.files import write_whole

    source = Path(argv[0]) if argv else RESULTS / "group_gemm.csv"
    rows = parse(source)
    text = markdown(all_marks(rows, parse(RESULTS / "peers_h200.csv")))
    text = "\n\n".join([text.rstrip(), *winners(rows)]) + "\n"
    write_whole(RESULTS / "marks.md", text.encode())
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
