"""
Predicted against measured time of plans that no profile was fitted on: one launch of random mixes, six token counts.

72 points: three models, six token counts, four random plans of the schemes of target triton-sm90, gate_up and down in
turn. `measure` needs the GPU and skips points that the file has; without it the script predicts every point with the
target's cost model, and writes `results/predict_plans.json` and a picture. Besides, a fifth of the mixes that the
profile is fitted on is held out at a time, and predicted by a profile fitted on all the rest. Marks: median error at
most 7 %, rank correlation at least 0.95.

    python benchmarks/predict_plans.py measure
    python benchmarks/predict_plans.py
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write_result
from moe_plans import plan_of, rows_of, target_costs
from moe_workloads import MODELS, TOKENS, Cell
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

PLANS = 4
FOLDS = 5
MEDIAN_ERROR, RANK = 0.07, 0.95
FIELDS = ("model", "tokens", "part", "plan", "time_us", "error", "status")
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "predict_plans.png"


@dataclass(frozen=True)
class Point:
    """One plan on one workload."""

    cell: Cell
    plan: str

    @property
    def key(self) -> tuple[str, ...]:
        """First fields of a row."""
        return (self.cell.model.name, str(self.cell.tokens), self.cell.part, self.plan)


def points(models: Sequence[str], tokens: Sequence[int]) -> list[Point]:
    """Every plan has a seed of its own, so that no two points share one."""
    found: list[Point] = []
    for name in models:
        for count in tokens:
            for i in range(PLANS):
                cell = Cell(MODELS[name], count, ("gate_up", "down")[i % 2])
                found.append(Point(cell, f"random:{1_000_000 * list(MODELS).index(name) + 10 * count + i}"))
    return found


def predicted_us(point: Point, costs: Any) -> float:  # noqa: ANN401  # a CostModel, imported late
    """Time of the launch under the cost model."""
    from mxmoe.cost import Gemm, predict_launch_us
    from mxmoe.ir import Scheme

    (n, k), schemes = point.cell.gemms[0], plan_of(point.plan, point.cell)[0]
    rows = tuple(int(count) for count in rows_of(point.cell))
    gemm = Gemm(n, k, rows, tuple(Scheme.parse(name) for name in schemes))
    return predict_launch_us(costs, [gemm])


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    array = np.asarray(values, dtype=np.float64)
    _, group, count = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[group]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Correlation of ranks; NaN where either side is constant or has fewer than two values."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale else float("nan")


def agreement(predicted: ArrayLike, measured: ArrayLike) -> dict[str, float | int]:
    """How far predictions are off: relative errors in percent, and the correlation of ranks."""
    ratio = np.asarray(predicted, dtype=np.float64) / np.asarray(measured, dtype=np.float64)
    error = np.abs(ratio - 1)
    return {
        "points": int(ratio.size),
        "median_error_percent": round(100 * float(np.median(error)), 2),
        "p90_error_percent": round(100 * float(np.quantile(error, 0.9)), 2),
        "worst_error_percent": round(100 * float(error.max()), 2),
        "median_ratio": round(float(np.median(ratio)), 4),
        "spearman": round(spearman(predicted, measured), 4),
    }


def read(path: Path) -> list[dict[str, str]]:
    """Rows of the file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compile_point(point: Point) -> str:
    """Compile the kernel of a point, in a process of its own; what went wrong, or nothing."""
    import torch

    from mxmoe.backends.triton.choose_ada import config_for
    from mxmoe.backends.triton.measure import compile_launch
    from mxmoe.backends.triton.tiles import Gemm
    from mxmoe.ir import Scheme

    model, gated = point.cell.model, point.cell.part == "gate_up"
    n, k = (model.intermediate, model.hidden) if gated else (model.hidden, model.intermediate)
    gemm = Gemm(n, k, tuple(Scheme.parse(name) for name in plan_of(point.plan, point.cell)[0]), gated)
    config = config_for(gemm, point.cell.tokens, model.top_k, torch.device("cuda", 0))
    try:
        compile_launch(gemm, config, point.cell.tokens, model.top_k)
    except Exception as error:  # measuring will say it again
        return f"{point.key}: {error}"[:300]
    return ""


def measure(args: argparse.Namespace) -> None:
    """Time every point that the file lacks, each checked against float32."""
    from moe_contender import Unsupported
    from moe_workloads import graph_us, wall_us
    from ours import mixed

    device = "cpu" if args.dry_run else "cuda"
    clock: Callable[..., float] = wall_us if args.dry_run else graph_us
    start, seen = time.perf_counter(), {tuple(row[name] for name in FIELDS[:4]) for row in read(args.out)}
    left = [point for point in points(args.models, args.tokens) if point.key not in seen]
    if args.compile_jobs:
        with ProcessPoolExecutor(args.compile_jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for said in tqdm(pool.map(compile_point, left), total=len(left), unit="kernel", mininterval=5):
                sys.stderr.write(f"{said}\n" if said else "")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    is_new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        for point in tqdm(left, unit="plan", mininterval=5):
            if time.perf_counter() - start > args.seconds:
                break
            row: dict[str, Any] = dict(zip(FIELDS, point.key, strict=False))
            try:
                ready = mixed(point.plan, point.cell, device)
                error, us = ready.check(), clock(ready.launches)
                row |= {"time_us": f"{us:.2f}", "error": f"{error:.1e}", "status": "ok" if error < 0.1 else "wrong"}
            except (Unsupported, RuntimeError) as reason:
                row["status"] = f"failed: {' '.join(str(reason).split())[:300]}"
            writer.writerow(row)
            file.flush()


def held_out(folds: int) -> dict[str, Any]:
    """Mixes of `results/profile_h200.csv`, a fold at a time, each predicted by a profile fitted on all the rest."""
    from mxmoe.backends.triton.profile import launches
    from mxmoe.backends.triton.tuned import DATA
    from mxmoe.cost import Gemm, Measured, Observation, fit_profile, predict_launch_us
    from mxmoe.device import device

    h200 = device("h200")
    seen = [Observation(*one) for one in launches(RESULTS / "profile_h200.csv", DATA / "h200.json")]
    alone, mixes = [one for one in seen if len(one.load) == 1], [one for one in seen if len(one.load) > 1]
    predicted, measured = list[float](), list[float]()
    for fold in tqdm(range(folds), unit="fold"):
        rest = [one for at, one in enumerate(mixes) if at % folds != fold]
        model = Measured(h200, given=fit_profile([*alone, *rest], h200, quiet=True))
        for one in mixes[fold::folds]:
            experts = [(rows, scheme) for scheme, load in one.load.items() for rows in Counter(load).elements()]
            gemm = Gemm(one.n, one.k, *map(tuple, zip(*experts, strict=True)))
            predicted.append(predict_launch_us(model, [gemm]))
            measured.append(one.time_us)
    return {"folds": folds, **agreement(predicted, measured)}


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Predict every measured point, and write figures and picture."""
    costs, kind = target_costs()
    rows = [row for row in read(args.out) if row["status"] == "ok"]
    cells = [Cell(MODELS[row["model"]], int(row["tokens"]), row["part"]) for row in rows]
    measured = [float(row["time_us"]) for row in rows]
    predicted = [
        predicted_us(Point(cell, row["plan"]), costs) for cell, row in zip(cells, tqdm(rows, unit="plan"), strict=True)
    ]
    figures: dict[str, Any] = {"cost_model": kind, "all": agreement(predicted, measured)}
    for field in ("model", "tokens", "part"):
        for value in dict.fromkeys(row[field] for row in rows):
            mine = [i for i, row in enumerate(rows) if row[field] == value]
            figures[f"{field} {value}"] = agreement([predicted[i] for i in mine], [measured[i] for i in mine])
    if args.folds:
        figures["held_out"] = held_out(args.folds)
    figures["marks"] = {"median_error_percent": 100 * MEDIAN_ERROR, "spearman": RANK}
    figures["points"] = [
        {**{name: row[name] for name in FIELDS[:4]}, "measured_us": us, "predicted_us": round(guess, 2)}
        for row, us, guess in zip(rows, measured, predicted, strict=True)
    ]
    draw(figures["points"], figures["all"], args.image)
    return figures


def draw(found: Sequence[dict[str, Any]], whole: dict[str, Any], path: Path) -> None:
    """Predicted over measured time, with the band of 7 %."""
    from mxmoe.report import save_figure
    from mxmoe.report.figure import ACCENT, COOL, INK, SOFT, dress, new_figure

    figure = new_figure(6.4, 4.6)
    axes = figure.add_subplot()
    dress(axes, title="Plans that no profile was fitted on", x="measured, us", y="predicted, us")
    ends = np.array([min(p["measured_us"] for p in found) * 0.7, max(p["measured_us"] for p in found) * 1.4])
    axes.fill_between(ends, ends * (1 - MEDIAN_ERROR), ends * (1 + MEDIAN_ERROR), color="#e6eaee", linewidth=0)
    axes.plot(ends, ends, color=SOFT, linewidth=0.8)
    for (name, color), mark in zip(
        (("qwen15_moe", COOL), ("mixtral", ACCENT), ("dsv3", INK), ("tiny", SOFT)), "osD^", strict=True
    ):
        mine = [point for point in found if point["model"] == name]
        if mine:
            xy = ([p["measured_us"] for p in mine], [p["predicted_us"] for p in mine])
            axes.scatter(*xy, s=16, color=color, marker=mark, label=name, linewidths=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    text = f"median error {whole['median_error_percent']} %, rank correlation {whole['spearman']}"
    axes.text(0.98, 0.03, text, transform=axes.transAxes, ha="right", fontsize=8.5, color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("what", nargs="?", choices=("measure", "report"), default="report")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS / "predict_plans.csv", help="measured times")
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no point after so long")
    parser.add_argument("--compile-jobs", type=int, default=0, help="processes that compile kernels first")
    parser.add_argument("--folds", type=int, default=FOLDS, help="of the mixes that are held out; 0: none are")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    args.models = args.models or (["tiny"] if args.dry_run else [name for name in MODELS if name != "tiny"])
    args.tokens = args.tokens or ([1, 16] if args.dry_run else TOKENS)
    if args.what == "measure":
        measure(args)
    else:
        write_result("predict_plans", report(args))


if __name__ == "__main__":
    main(sys.argv[1:])
