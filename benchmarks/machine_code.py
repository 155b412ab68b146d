"""
Compiles every kernel that the target triton-sm89 offers, without a GPU, and writes down what its machine code needs.

Sizes are Qwen1.5-MoE's, 60 experts of 2048 x 1408, top 4; a row is one launch: gate and up with the nonlinearity, or
down. w4a4 runs on INT4 units (`native`), or widened to 8 bits where a block has no gate. Nothing is timed. Programs at
once follow from registers, shared memory and warps (CUDA C++ Programming Guide).
Writes `benchmarks/results/machine_code_sm89.md`; minutes where Triton's cache is empty.

    python benchmarks/machine_code.py
"""

from __future__ import annotations

from collections.abc import Iterator

import triton  # before anything of ours, which would have kernels interpreted where there is no GPU
from common import RESULTS, circumstances
from tqdm import tqdm

from mxmoe.backends.triton.ahead import Request, compile_all
from mxmoe.backends.triton.binaries import gemm_request, int4_request
from mxmoe.backends.triton.choose_ada import ada_config
from mxmoe.backends.triton.cubin import occupancy
from mxmoe.backends.triton.tiles import Gemm
from mxmoe.files import write_whole
from mxmoe.ir import Scheme
from mxmoe.target import find_target

ARCH = 89
EXPERTS, TOP_K, HIDDEN, WIDTH = 60, 4, 2048, 1408
SCHEMES = ("bf16", "w8a8_e4m3", "w4a8_g128_sym_iscale", *find_target("triton-sm89").candidates)
NATIVE = ("w4a4_sym", "w4a4_g128_sym")
ROWS = (16, 32, 96, 300)
"""Rows of a mean active expert, one number in each regime of the tile rule."""
MULTIPLIES = ("HMMA", "IMMA", "QMMA")

HEAD = """# Machine code for sm_89, read without a GPU

What ptxas makes of the kernels of `triton-sm89`: nothing here is timed, and nothing ran on an RTX 4090. A
multiprocessor of sm_89 has 65,536 registers, 100 KiB of shared memory (99 for one program) and room for 48 warps.
`native` are launches on INT4 units; w4a4 without that word is widened to 8 bits, as in blocks without a gate.

Command: `{command}`, with Triton {triton}.

| launch | rows | tiles | warps | registers | spilled | shared KiB | programs at once | products |
|---|---:|---|---:|---:|---:|---:|---:|---|
"""


def requests() -> Iterator[tuple[str, int, str, Request]]:
    """(launch, rows, tiles, request) of every launch."""
    for name in SCHEMES:
        for is_gated in (True, False):
            n, k = (WIDTH, HIDDEN) if is_gated else (HIDDEN, WIDTH)
            gemm = Gemm(n, k, (Scheme.parse(name),) * EXPERTS, is_gated)
            for rows in ROWS:
                config = ada_config(gemm, rows)
                act = "silu" if is_gated else "none"
                request = gemm_request(gemm, config, arch=ARCH, top_k=TOP_K, gather=is_gated, act=act)
                title = f"{name} {'gate_up' if is_gated else 'down'}"
                yield title, rows, str(config.shape(gemm.distinct[0])), request
    for scheme in map(Scheme.parse, NATIVE):
        for is_gated in (True, False):
            n, k = (WIDTH, HIDDEN) if is_gated else (HIDDEN, WIDTH)
            gemm = Gemm(n, k, (scheme,) * EXPERTS, is_gated, apart=(scheme,))
            for rows in ROWS:
                shape = ada_config(gemm, rows).shape(scheme)
                request = int4_request(scheme, shape.heights, arch=ARCH, gather=is_gated, is_gated=is_gated)
                yield f"{scheme} native {'gate_up' if is_gated else 'down'}", rows, str(shape), request


def main() -> None:
    lines: list[str] = []
    for title, rows, tiles, request in tqdm(list(requests()), unit="kernel"):
        binary = compile_all([request])[0]
        facts = binary.facts()
        spilled = facts.spill_loads + facts.spill_stores
        kinds = sorted(
            {opcode.removesuffix(".SAT") for opcode in facts.instructions if opcode.startswith(MULTIPLIES)},
            key=lambda opcode: -facts.count(opcode),
        )
        numbers = (binary.num_warps, facts.registers, spilled, f"{facts.shared_bytes / 1024:.0f}")
        at_once = occupancy(facts, binary.num_warps)
        lines.append("| " + " | ".join(map(str, (title, rows, tiles, *numbers, at_once, ", ".join(kinds)))) + " |")
    head = HEAD.format(command=circumstances()["command"], triton=triton.__version__)
    write_whole(RESULTS / "machine_code_sm89.md", head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
