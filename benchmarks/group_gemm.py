"""
Times grouped GEMMs and whole blocks of experts on one GPU: ours in every scheme and mix, and other people's kernels.

Models qwen15_moe, mixtral and dsv3; 1 to 8192 tokens; gate_up, down and the whole block; skewed routing. The rules of
the clock are those of `moe_workloads.py`: weights from memory, CUDA graph replay, the median. Every time that is
written was checked against float32 on a sample of rows of the same launch. One row of the result file is one cell of
one contender; cells that are in it already are skipped, so that the command can be given again. Beside the file lies
its .json with machine, versions, commands and the rates of dense products on the day.

    python benchmarks/group_gemm.py                      everything, into benchmarks/results/group_gemm.csv
    python benchmarks/group_gemm.py --dry-run            tiny shapes on the CPU, to try the harness
    python benchmarks/group_gemm.py --compile-jobs 6     first compile all kernels in six processes
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances
from moe_contender import Contender, Prepared, Unsupported, by_name, check_rows
from moe_operands import sorted_rows, stored, tokens_of, widened
from moe_peers import peers
from moe_workloads import MODELS, PARTS, TOKENS, Cell, dense_rates, graph_us, roofline_us, rotations, wall_us
from ours import ours
from tqdm import tqdm

KEY = ("model", "tokens", "routing", "part", "contender")
FIELDS = (
    *KEY, "weight_class", "format", "time_us", "tflops", "weight_gbps", "roof_us", "bound", "fraction", "active",
    "most_rows", "rotations", "error", "config", "status",
)  # fmt: skip
MOST_ERROR = 0.1
"""What is further from float32 than this is called wrong; 8-bit activations cost a block some hundredths."""
LOST = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
"""Messages after which the process has lost its GPU."""


def stub(cell: Cell, device: str) -> Prepared:
    """An expert at a time on whatever device: what the harness is tried with."""
    turns = rotations(cell, 16, device=device)
    n, k = cell.gemms[0]
    weight = widened(stored("bf16", n, k, cell.model.experts, 1, device)[0])
    x = tokens_of(cell, device)

    def run(turn: Any) -> torch.Tensor:  # noqa: ANN401
        rows = sorted_rows(cell, x, turn).float()
        parts = rows.split(turn.counts.tolist())
        return torch.cat([part @ weight(expert).T for expert, part in enumerate(parts)])

    launches = [lambda turn=turn: run(turn) for turn in turns]
    inputs = sorted_rows(cell, x, turns[0])
    return Prepared(launches, lambda: check_rows(launches[0](), turns[0], inputs, weight), turns[0].counts)


def contenders() -> list[Contender]:
    """Ours, the peers, and the stub that only a dry run takes by itself."""
    return [*peers(), *ours()]


STUB = Contender("stub", "bf16", "bf16", lambda _: 16.0, 2.0, "bf16", stub, PARTS[:2])


def cells(args: argparse.Namespace) -> Iterator[tuple[Contender, Cell]]:
    """A model at a time, then a contender, so that weights are made once and never lie beside another's."""
    chosen = by_name([*contenders(), STUB], args.contenders or (["stub"] if args.dry_run else None))
    chosen = [one for one in chosen if one is not STUB or args.dry_run]
    for model, one, part in itertools.product(args.models, chosen, args.parts):
        if part in one.parts:
            yield from ((one, Cell(MODELS[model], tokens, part, args.routing)) for tokens in args.tokens)


def row_of(one: Contender, cell: Cell) -> dict[str, Any]:
    """What a row says before anything was measured."""
    values = (cell.model.name, cell.tokens, cell.routing, cell.part, one.name)
    return {**dict(zip(KEY, values, strict=True)), "weight_class": one.weight_class, "format": one.format}


def measure(one: Contender, cell: Cell, device: str) -> dict[str, Any]:
    """One row: check first, then time; what goes wrong is said in `status`."""
    row = row_of(one, cell)
    try:
        ready = one.make(cell, device)
        error = ready.check()
        us = (graph_us if device == "cuda" else wall_us)(ready.launches)
        bits, active = one.bits(cell), int((ready.counts > 0).sum())
    except Unsupported as reason:
        return {**row, "status": f"unsupported: {reason}"}
    except Exception as reason:  # the run goes on with the next contender, and the file says what broke
        text = " ".join(f"{type(reason).__name__}: {reason}".split())
        if any(message in text for message in LOST):
            raise
        return {**row, "status": f"failed: {text[:300]}"}
    roof, bound = roofline_us(cell, bits, one.act_bytes, one.unit, active)
    if ready.roof_us is not None:
        roof, bound = ready.roof_us, "mixed"
    moved = ready.weight_bytes if ready.weight_bytes is not None else cell.weight_bytes(bits, active)
    figures: dict[str, Any] = {
        "time_us": f"{us:.2f}",
        "tflops": f"{cell.flops / us * 1e-6:.1f}",
        "weight_gbps": f"{moved / us * 1e-3:.0f}",
        "roof_us": f"{roof:.2f}",
        "bound": bound,
        "fraction": f"{roof / us:.3f}",
        "active": active,
        "most_rows": int(ready.counts.max()),
        "rotations": len(ready.launches),
        "error": f"{error:.1e}",
    }
    return {**row, **figures, "config": ready.config, "status": "ok" if error < MOST_ERROR else "wrong"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a result file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def done(path: Path, again: bool) -> set[tuple[str, ...]]:
    """Cells that need no second visit: measured ones, and unless `again` is set those that failed."""
    return {tuple(row[key] for key in KEY) for row in read_rows(path) if row["status"] == "ok" or not again}


def describe(path: Path, device: str, seconds: float) -> None:
    """Write machine, versions, commands and dense rates beside the result file."""
    beside = path.with_suffix(".json")
    known = json.loads(beside.read_text()) if beside.exists() else {}
    facts: dict[str, Any] = {"benchmark": path.stem, **circumstances()}
    facts["versions"]["triton"] = getattr(sys.modules.get("triton"), "__version__", "absent")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name}, {properties.multi_processor_count} SMs, CUDA {torch.version.cuda}"
        facts["dense_tflops"] = {name: round(rate * 1e-12, 1) for name, rate in dense_rates().items()}
    facts["commands"] = [*known.get("commands", []), {"command": facts.pop("command"), "seconds": round(seconds, 1)}]
    beside.write_text(json.dumps(facts, indent=1) + "\n")


def run(args: argparse.Namespace) -> None:
    """Measure every cell that the file lacks, until the time is up."""
    device = "cpu" if args.dry_run else "cuda"
    seen, start = done(args.out, args.again), time.perf_counter()
    left = [pair for pair in cells(args) if tuple(str(row_of(*pair)[key]) for key in KEY) not in seen]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    is_new = not args.out.exists()
    before: Contender | None = None
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        for one, cell in (bar := tqdm(left, unit="cell", mininterval=5)):
            if time.perf_counter() - start > args.seconds:
                sys.stdout.write(f"time is up; {bar.total - bar.n} cells are left for the next call\n")
                break
            if before is not None and before is not one:
                before.reset()
                if device == "cuda":
                    torch.cuda.empty_cache()
            before = one
            row = measure(one, cell, device)
            bar.set_postfix_str(f"{row['model']} {row['tokens']} {row['part']} {one.name}", refresh=False)
            writer.writerow(row)
            file.flush()
    describe(args.out, device, time.perf_counter() - start)


def compile_all(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run every launch once in several processes, so that measuring finds all kernels compiled."""
    command = [sys.executable, __file__, *argv, "--shard"]
    running = [subprocess.Popen([*command, f"{i}/{args.compile_jobs}"]) for i in range(args.compile_jobs)]
    for process in running:
        process.wait()


def compile_shard(args: argparse.Namespace) -> None:
    """One process's share: neighbouring cells of a contender go to different processes, and so do their tiles."""
    index, count = map(int, args.shard.split("/"))
    seen = done(args.out, args.again)
    mine = [pair for pair in cells(args) if tuple(str(row_of(*pair)[key]) for key in KEY) not in seen][index::count]
    before: Contender | None = None
    for one, cell in mine:
        if before is not None and before is not one:
            before.reset()
            torch.cuda.empty_cache()
        before = one
        try:
            one.make(cell, "cuda").launches[0]()
            torch.cuda.synchronize()
        except Exception as reason:  # the measuring run will say it again, in its file
            sys.stderr.write(f"{one.name} {cell.model.name} {cell.tokens} {cell.part}: {str(reason)[:200]}\n")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--contenders", nargs="+", help="names, or beginnings with a * behind; all if not given")
    parser.add_argument("--routing", choices=("skew", "balanced"), default="skew")
    parser.add_argument("--out", type=Path, default=RESULTS / "group_gemm.csv")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder that fetch_peers.py filled")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no cell after so long")
    parser.add_argument("--again", action="store_true", help="try cells again that failed")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--compile-jobs", type=int, default=0)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="names of the contenders")
    args = parser.parse_args(argv)
    args.models = args.models or (["tiny"] if args.dry_run else [name for name in MODELS if name != "tiny"])
    args.tokens = args.tokens or ([1, 16] if args.dry_run else TOKENS)
    return args


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    sys.path.insert(0, str(args.peers.resolve()))
    if args.list:
        sys.stdout.write("\n".join(f"{one.name:28} {one.weight_class:6} {one.format}" for one in contenders()) + "\n")
    elif args.shard:
        compile_shard(args)
    else:
        if args.compile_jobs:
            compile_all(args, argv)
        run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
