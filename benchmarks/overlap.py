"""
Times blocks whose launches begin while the one before ends against the same launches one after the other, on one GPU.

Blocks, weights and the clock are those of `group_gemm.py`; each is checked against float32, both ways are captured in a
CUDA graph, and replayed in turn. The median counts.

    python benchmarks/overlap.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from unittest import mock

import torch
from common import write_result
from moe_workloads import MODELS, Cell, graph_us
from ours import uniform

from mxmoe.backends.triton import mode

ROUNDS = 3
MOST_ERROR = 0.1


def one_by_one() -> AbstractContextManager[object]:
    """Let no launch begin before the one before it has ended."""
    return mock.patch.object(mode, "MOST_EARLY", 0)


def compare(scheme: str, cell: Cell) -> dict[str, float]:
    """Microseconds of a block in one scheme, both ways."""
    ready = uniform(scheme, cell, "cuda")
    error = ready.check()
    assert error < MOST_ERROR, f"{scheme}, {cell}: off by {error:.1e}"
    found: dict[str, list[float]] = {"one_by_one_us": [], "overlapping_us": []}
    for _ in range(ROUNDS):
        with one_by_one():
            found["one_by_one_us"].append(graph_us(ready.launches))
        found["overlapping_us"].append(graph_us(ready.launches))
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen15_moe"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--schemes", nargs="+", default=["w8a8_e4m3", "w4a8_sym"])
    args = parser.parse_args(argv)
    found: dict[str, object] = {"gpu": torch.cuda.get_device_name()}
    for name in args.models:
        for tokens in args.tokens:
            cell = Cell(MODELS[name], tokens, "block")
            found[f"{name}, {tokens} tokens"] = {scheme: compare(scheme, cell) for scheme in args.schemes}
    write_result("overlap", found)


if __name__ == "__main__":
    main(sys.argv[1:])
