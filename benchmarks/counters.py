"""
Reads hardware counters of chosen cells of `group_gemm.py` with Nsight Compute: why a mark is missed.

The script starts itself under `ncu`. The child makes each cell as the benchmark does, runs its launches once, and lets
ncu measure one more: first a marker, then the launch (`counters_read.py` tells them apart). ncu runs each kernel once
for every pass, with caches flushed before and clocks left alone; so times are those of single cold launches and a
little longer than the benchmark's. A cell is `model/tokens/part/contenders`, where a weight class stands for our
fastest uniform scheme and the fastest peer in `results/group_gemm.csv`. Writes counters.csv, counters.json and
counters.md to `benchmarks/results/`.

    python benchmarks/counters.py --compile-jobs 15      cells that miss their marks, kernels compiled first
    python benchmarks/counters.py --dry-run              shows cells and the command of ncu
    python benchmarks/counters.py --cells mixtral/512/down/8bit,ours_bf16
    python benchmarks/counters.py --folder F             keeps ncu's own table and what was run in the folder
    python benchmarks/counters.py --folder F --read      only reads such a folder
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances
from counters_read import FIELDS, METRICS, known_metrics, markdown, parse_ncu, rows_of, spell
from group_gemm import LOST, STUB, contenders
from marks import ours_of, parse, peers_of
from moe_contender import CLASSES, Contender, Unsupported, by_name
from moe_workloads import MODELS, PARTS, Cell

from mxmoe.files import write_whole

CELLS = (
    "qwen15_moe/1/gate_up/8bit",
    "qwen15_moe/1/down/8bit,bf16",
    "dsv3/64/gate_up/8bit",
    "mixtral/512/gate_up/8bit,bf16",
    "mixtral/512/down/8bit,ours_hot025",
    "qwen15_moe/2048/gate_up/8bit,ours_w4a8_g128_sym_iscale,ours_hot025",
    "mixtral/8192/gate_up/8bit",
)
"""Cells that miss their marks, mixes beside their schemes; and one that reads weights twice where it may."""
LOG, RANGES, FACTS = "ncu.csv", "ranges.jsonl", "facts.json"
"""Files of the folder: ncu's table; a line for each range that was begun or skipped; GPU and versions."""
CHIP = "gh100"
Note = Callable[[dict[str, Any]], None]
"""Takes a line of the file of ranges."""


@dataclass(frozen=True)
class Wanted:
    """One range: a contender's launch of a cell."""

    place: int
    """In the order in which cells were asked for."""
    cell: Cell
    contender: Contender

    def about(self) -> dict[str, Any]:
        """What is written before the range begins."""
        cell, own = self.cell, self.contender
        names = {"model": cell.model.name, "tokens": cell.tokens, "part": cell.part}
        return {"place": self.place, **names, "contender": own.name, "weight_class": own.weight_class}


def names_of(spec: str, results: Path) -> tuple[Cell, list[str]]:
    """A cell and its contenders, classes replaced by the fastest of ours and the fastest peer."""
    model, tokens, part, names = spec.split("/")
    if model not in MODELS or part not in PARTS:
        raise SystemExit(f"{spec}: models are {', '.join(MODELS)}, parts are {', '.join(PARTS)}")
    cell, found = Cell(MODELS[model], int(tokens), part), []
    for name in names.split(","):
        if name in CLASSES[:3]:
            rows = parse(results)
            sides = [side(rows, name).get((model, cell.tokens, part)) for side in (ours_of, peers_of)]
            found += [row.contender for row in sides if row is not None]
        else:
            found.append(name)
    return cell, list(dict.fromkeys(found))


def wanted(specs: Sequence[str], results: Path) -> list[Wanted]:
    """Ranges in the order of running: a model at a time, then a contender, so that weights are made once."""
    every = [*contenders(), STUB]
    pairs = [(cell, name) for cell, names in (names_of(spec, results) for spec in specs) for name in names]
    found = [Wanted(at, cell, by_name(every, [name])[0]) for at, (cell, name) in enumerate(dict.fromkeys(pairs))]
    return sorted(found, key=lambda one: (list(MODELS).index(one.cell.model.name), one.contender.name, one.place))


# --- the child: runs cells, and tells ncu which launch to measure -----------------------------------------------------


class Profiler:
    """Switches ncu on for one launch behind a marker."""

    def measure(self, launch: Callable[[], Any]) -> None:
        """Everything between start and stop is measured: the marker, and all kernels of the launch."""
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda._sleep(1)
        launch()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def free(device: str) -> None:
    """Give memory back: ncu keeps a copy of all that is allocated while it repeats a kernel."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run_range(one: Wanted, device: str, profiler: Profiler | None, note: Note) -> None:
    """Make the cell, run its launches once, and measure the first; what breaks is noted as skipped."""
    try:
        ready = one.contender.make(one.cell, device)
        for launch in ready.launches if profiler else ready.launches[:1]:
            launch()
        free(device)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as reason:  # the run goes on with the next contender, and the result says what broke
        if any(message in str(reason) for message in LOST):
            raise
        kind = "" if isinstance(reason, Unsupported) else f"{type(reason).__name__}: "
        note({**one.about(), "skipped": f"{kind}{' '.join(str(reason).split())[:200]}"})
        return
    if profiler:
        note({**one.about(), "config": ready.config})
        profiler.measure(ready.launches[0])


def run_all(ranges: Sequence[Wanted], seconds: float, device: str, profiler: Profiler | None, note: Note) -> None:
    """Every range until the time is up; without a profiler kernels are only compiled."""
    start = time.perf_counter()
    before: Contender | None = None
    for one in ranges:
        if before is not None and before is not one.contender:
            before.reset()
        before = one.contender
        free(device)
        if time.perf_counter() - start > seconds:
            note({**one.about(), "skipped": "the time was up"})
            continue
        run_range(one, device, profiler, note)
        sys.stderr.write(f"{time.perf_counter() - start:6.1f} s  {spell(one.about())}\n")


def child(args: argparse.Namespace) -> None:
    """What runs under ncu."""
    properties = torch.cuda.get_device_properties(0)
    gpu = f"{properties.name}, {properties.multi_processor_count} SMs, CUDA {torch.version.cuda}"
    facts = circumstances()
    (args.folder / FACTS).write_text(json.dumps({"gpu": gpu, **{key: facts[key] for key in ("machine", "versions")}}))
    with (args.folder / RANGES).open("w") as file:

        def note(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        run_all(wanted(args.cells, args.results), args.seconds, "cuda", Profiler(), note)


def compile_shard(args: argparse.Namespace) -> None:
    """One process's share of what has to be compiled; the child will say what breaks."""
    index, count = map(int, args.shard.split("/"))
    run_all(wanted(args.cells, args.results)[index::count], args.seconds, "cuda", None, lambda _: None)


# --- the parent -------------------------------------------------------------------------------------------------------


def ncu_command(folder: Path, metrics: Sequence[str], argv: Sequence[str]) -> list[str]:
    """What measures the child that `argv` describes."""
    return [
        "ncu", "--profile-from-start", "off", "--clock-control", "none", "--target-processes", "all",
        "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(folder / LOG),
        "--metrics", ",".join(metrics), sys.executable, __file__, *argv, "--folder", str(folder), "--child",
    ]  # fmt: skip


def ask_metrics() -> list[str]:
    """Names of the metrics that this ncu has; the others are listed."""
    answer = subprocess.run(["ncu", "--query-metrics", "--chip", CHIP], capture_output=True, text=True, check=False)
    known, dropped = known_metrics(answer.stdout)
    if dropped:
        sys.stderr.write(f"not known to ncu: {', '.join(one.name for one in dropped)}\n")
    return [one.name for one in known]


def compile_all(argv: Sequence[str], jobs: int) -> None:
    """Run every launch once in several processes, so that ncu's child finds all kernels compiled."""
    command = [sys.executable, __file__, *argv, "--shard"]
    running = [subprocess.Popen([*command, f"{at}/{jobs}"], stderr=subprocess.DEVNULL) for at in range(jobs)]
    for process in running:
        process.wait()


def collect(args: argparse.Namespace, argv: Sequence[str], folder: Path) -> None:
    """Fill the folder."""
    start = time.perf_counter()
    metrics = ask_metrics()
    if args.compile_jobs:
        compile_all(argv, args.compile_jobs)
    for name in (LOG, RANGES, FACTS):
        (folder / name).unlink(missing_ok=True)
    left = args.seconds - (time.perf_counter() - start)
    sys.stderr.write(f"{time.perf_counter() - start:6.1f} s  compiled; {left:.0f} s are left\n")
    # options that come last win
    status = subprocess.run(ncu_command(folder, metrics, [*argv, "--seconds", f"{left:.0f}"]), check=False).returncode
    if status:
        sys.stderr.write(f"ncu ended with {status}; what it measured is read all the same\n")


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The result file."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*FIELDS, *(one.column for one in METRICS)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def report(folder: Path, out: Path) -> None:
    """Read the folder and write the three files."""
    lines = [json.loads(line) for line in (folder / RANGES).read_text().splitlines()]
    log = (folder / LOG).read_text()
    rows, missing = rows_of([line for line in lines if "skipped" not in line], parse_ncu(log))
    skipped = [*(f"{spell(line)}: {line['skipped']}" for line in lines if "skipped" in line), *missing]
    if not rows:
        raise SystemExit(f"ncu measured nothing; its messages end with\n{log[-2000:]}\n" + "\n".join(skipped))
    facts = {"benchmark": out.stem, **circumstances(), **json.loads((folder / FACTS).read_text())}
    facts["counters"] = {one.column: f"{one.name} x {one.scale:g}" for one in METRICS}
    facts["tiles"] = {spell(line): line["config"] for line in lines if line.get("config")}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, as_csv(rows))
    write_whole(out.with_suffix(".json"), json.dumps({**facts, "skipped": skipped}, indent=1) + "\n")
    write_whole(out.with_suffix(".md"), markdown(rows))
    sys.stdout.write(markdown(rows) + "".join(f"skipped {line}\n" for line in skipped))


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="MODEL/TOKENS/PART/CONTENDERS")
    parser.add_argument("--results", type=Path, default=RESULTS / "group_gemm.csv", help="where a class looks up names")
    parser.add_argument("--out", type=Path, default=RESULTS / "counters.csv")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder that fetch_peers.py filled")
    parser.add_argument("--seconds", type=float, default=85, help="start no range after so long")
    parser.add_argument("--compile-jobs", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep ncu's table here")
    parser.add_argument("--read", action="store_true", help="only read the folder")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def show(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Ranges in the order of running, and the command."""
    for one in wanted(args.cells, args.results):
        sys.stdout.write(f"{spell(one.about())} {one.contender.weight_class}\n")
    command = ncu_command(args.folder or Path("FOLDER"), [one.name for one in METRICS], argv)
    sys.stdout.write(shlex.join(command) + "\n")


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    sys.path.insert(0, str(args.peers.resolve()))
    if args.shard:
        compile_shard(args)
    elif args.child:
        child(args)
    elif args.dry_run:
        show(args, argv)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            if not args.read:
                collect(args, argv, folder)
            report(folder, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
