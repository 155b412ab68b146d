"""
Times a Qwen1.5-MoE shaped block of experts on the CPU: numba on packed weights against dense torch, and its memory.

60 experts of 2048 x 1408, top 4; 1, 16 and 512 tokens; each round routes other tokens, as successive layers would.
Every variant runs in a process of its own; packed and dense calls alternate, and the fastest round counts. Two clocks:
the wall with all cores, and the processor time of one thread, which other work on the machine disturbs little. Resident
memory is read before the dense weights exist. Marks: w4a16 at one token no slower than float32, w8a8 at 512 tokens
within 3x of it. Writes `benchmarks/results/numba_experts.json`.

    python benchmarks/numba_experts.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from common import write_result
from torch import Tensor

from mxmoe.backends.numba import NumbaBackend, NumbaExecutable
from mxmoe.ir import BankShape, BlockShape, ModuleOp, Scheme, Table, banks, build_module, moe_ops
from mxmoe.passes import ChooseTiles, Environment, LowerToGroupGemm
from mxmoe.quant import Quantized, quantize

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 60, 4, 2048, 1408
VARIANTS = {
    "w4a16_g128_asym": ("w4a16_g128_asym",),
    "w8a8_sym": ("w8a8_sym",),
    "mixed": ("w2a16_g128_asym", "w3a16_g128_asym", "w4a16_g128_asym", "w4a8_g128_sym", "w8a8_sym"),
}
ROUNDS = {1: 30, 16: 8, 512: 3}
ROLES = ("gate", "up", "down")


class RandomWeights:
    """One random matrix for each role and scheme, which every expert gets a packed copy of."""

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(ROLES.index(name))
        n, k = (HIDDEN, INTERMEDIATE) if name == "down" else (INTERMEDIATE, HIDDEN)
        return torch.randn((n, k), generator=generator) / k**0.5

    @cache  # noqa: B019  # lives as long as the process
    def _quantized(self, name: str, scheme: Scheme) -> Quantized:
        return quantize(self[name], scheme)

    def quantized(self, name: str, expert: int, scheme: Scheme) -> Quantized:
        """As of `mxmoe.target.WeightSource`."""
        del expert
        return self._quantized(name, scheme)


def lowered(schemes: tuple[str, ...], experts: int, hidden: int, intermediate: int) -> ModuleOp:
    """A lowered module; experts take the schemes in turn, gate and up alike, down the next one."""
    bank = BankShape("routed", experts, min(TOP_K, experts), intermediate, "silu", True, {role: role for role in ROLES})
    module = build_module([BlockShape("block", hidden, (bank,))], [Scheme.parse(name) for name in schemes])
    for moe in moe_ops(module):
        for role, op in banks(moe)["routed"].linears.items():
            choice = (np.arange(experts) + (role == "down")) % len(schemes)
            op.set_table("choice", Table(("expert",), choice.astype(np.int8)))
        moe.stage = "allocated"
    LowerToGroupGemm().run(module, Environment())
    ChooseTiles().run(module, Environment())
    return module


def dense_experts(weights: RandomWeights, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The eager loop over the experts that were hit, gate and up in one product, as transformers runs it."""
    gate_up = torch.cat([weights["gate"], weights["up"]]).to(dtype).repeat(EXPERTS, 1, 1)
    down = weights["down"].to(dtype).repeat(EXPERTS, 1, 1)

    def run(hidden: Tensor, index: Tensor, router: Tensor) -> Tensor:
        hidden, router = hidden.to(dtype), router.to(dtype)
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            gate, up = (hidden[token] @ gate_up[expert].T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(gate) * up) @ down[expert].T
            out.index_add_(0, token, y * router[token, slot, None])
        return out

    return run


def status(field: str) -> int:
    """A memory figure of this process, in bytes: VmRSS is resident now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def routed_tokens(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((tokens, HIDDEN), generator=generator)
    index = torch.rand((tokens, EXPERTS), generator=generator).argsort(-1)[:, :TOP_K].contiguous()
    return hidden, index, torch.rand((tokens, TOP_K), generator=generator)


def fastest(calls: dict[str, Callable[..., Tensor]], tokens: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of the fastest round of each call, rounds alternating."""
    best = dict.fromkeys(calls, float("inf"))
    for seed in range(ROUNDS[tokens] + 1):
        args = routed_tokens(tokens, seed)
        for name, call in calls.items():
            start = clock()
            call(*args)
            if seed:  # the first round warms up
                best[name] = min(best[name], (clock() - start) * 1e3)
    return {name: round(value, 3) for name, value in best.items()}


def measure(variant: str) -> dict[str, Any]:
    """Everything about one variant; run in a process of its own."""
    weights = RandomWeights()
    for schemes in VARIANTS.values():  # the machine code and the one quantized copy are loaded before memory is read
        tiny = NumbaBackend().compile(lowered(schemes, 2, HIDDEN, INTERMEDIATE), weights)["block"]
        tiny("routed", torch.zeros(1, HIDDEN), torch.zeros((1, 2), dtype=torch.int64), torch.ones(1, 2))
    before = status("VmRSS")
    start = time.perf_counter()
    module = lowered(VARIANTS[variant], EXPERTS, HIDDEN, INTERMEDIATE)
    packed: NumbaExecutable = NumbaBackend().compile(module, weights)["block"]
    compile_s = time.perf_counter() - start
    for tokens in ROUNDS:
        packed("routed", *routed_tokens(tokens, 0))
    memory = {
        "weights_held_mb": round(packed.nbytes / 1e6, 1),
        "resident_growth_mb": round((status("VmRSS") - before) / 1e6, 1),
        "peak_growth_with_512_tokens_mb": round((status("VmHWM") - before) / 1e6, 1),
        "dense_f32_mb": round(EXPERTS * 3 * HIDDEN * INTERMEDIATE * 4 / 1e6, 1),
    }
    calls: dict[str, Callable[..., Tensor]] = {
        "numba": lambda *args: packed("routed", *args),
        "torch_f32": dense_experts(weights, torch.float32),
        "torch_bf16": dense_experts(weights, torch.bfloat16),
    }
    walls = {str(tokens): fastest(calls, tokens, time.perf_counter) for tokens in ROUNDS}
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    alone = {str(tokens): fastest(calls, tokens, time.thread_time) for tokens in ROUNDS}
    return {"pack_s": round(compile_s, 2), "memory": memory, "wall_ms": walls, "one_thread_cpu_ms": alone}


def table(figures: dict[str, Any]) -> str:
    titles = ("numba ms", "f32 ms", "bf16 ms", "of f32")
    lines = [f"{'scheme':18}{'clock':20}{'tokens':>7}" + "".join(f"{title:>10}" for title in titles) + "  weights MB"]
    for variant, found in figures.items():
        for clock in ("wall_ms", "one_thread_cpu_ms"):
            for tokens, ms in found[clock].items():
                row = "".join(f"{ms[name]:10.2f}" for name in ("numba", "torch_f32", "torch_bf16"))
                ratio, held = ms["numba"] / ms["torch_f32"], found["memory"]["weights_held_mb"]
                lines.append(f"{variant:18}{clock:20}{tokens:>7}{row}{ratio:10.2f}{held:12.1f}")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(measure(sys.argv[1])))
        return
    figures: dict[str, Any] = {}
    for variant in VARIANTS:
        done = subprocess.run([sys.executable, __file__, variant], capture_output=True, text=True, check=True)
        figures[variant] = json.loads(done.stdout)
    shape = {"experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
    write_result("numba_experts", {"shape": shape, "torch_threads": torch.get_num_threads(), "variants": figures})
    sys.stdout.write(table(figures) + "\n")


if __name__ == "__main__":
    main()
