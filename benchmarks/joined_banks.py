"""
Times a block's routed and shared bank in the same launches against one bank after the other, on one GPU.

Experts of Qwen1.5-MoE's shape with random weights, compiled for `triton-sm90`; a call is everything from the routing's
indices to both outputs, timed as a CUDA graph of ten calls, the mean of twenty replays. Each way is compared with one
bank after the other before; up to `joint.MOST_TOKENS` there is a third, joined launches of which none is divided.

    python benchmarks/joined_banks.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from common import write_result
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import mxmoe
from mxmoe.backends.triton.choose import by_rule
from mxmoe.backends.triton.joint import MOST_TOKENS
from mxmoe.backends.triton.launch import reads_sorted

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
CALLS, REPLAYS = 10, 20
MOST_ERROR = 0.01


def block(device: str = "cuda") -> nn.Module:
    """Random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        made = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**SIZES)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.02)
    return made


def time_us(run: Any, args: Sequence[Tensor]) -> float:  # noqa: ANN401  # an executable of a backend that may be absent
    """Microseconds of a call."""
    run.run_block(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run.run_block(*args)
    for _ in range(3):
        graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / (CALLS * REPLAYS)


def ways(run: Any, tokens: int, top_k: int) -> dict[str, Any]:  # noqa: ANN401
    """Name every way to run a block: one bank after the other first."""
    found = {"apart_us": replace(run, joint=None)}
    if run.joins(tokens):
        found["joined_us"] = run
    if tokens <= MOST_TOKENS:
        whole = tuple(by_rule(one.gemm, tokens, top_k) for one in (run.joint.entry, run.joint.down))
        joint = replace(run.joint, chosen={(tokens, top_k): whole}, constants={})
        found["joined_whole_us"] = replace(run, joint=joint)
    return found


def compare(run: Any, tokens: int) -> dict[str, Any]:  # noqa: ANN401
    """All ways over one routing, and which of the joined GEMMs are divided."""
    experts, top_k = SIZES["num_experts"], SIZES["num_experts_per_tok"]
    hidden = torch.randn((tokens, SIZES["hidden_size"]), device="cuda", dtype=torch.bfloat16)
    index = torch.rand((tokens, experts), device="cuda").topk(top_k).indices
    args = (hidden, index, torch.rand((tokens, top_k), device="cuda").softmax(-1))
    found: dict[str, Any] = {"divided": [reads_sorted(config) for config in run.joint.configs(tokens, top_k)]}
    apart: dict[str, Tensor] = {}
    for name, way in ways(run, tokens, top_k).items():
        made = way.run_block(*args)
        apart = apart or made
        for bank, meant in apart.items():
            error = float((made[bank] - meant).float().norm() / meant.float().norm())
            assert error < MOST_ERROR, f"{name}: {bank} of {tokens} tokens is off by {error:.1e}"
        found[name] = round(time_us(way, args), 1)
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--schemes", nargs="+", default=["w8a8_e4m3", "w4a8_g128_sym", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 32, 64, 128, 300, 512, 1024, 2048])
    args = parser.parse_args(argv)
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    for scheme in args.schemes:
        compiled: Any = mxmoe.compile(block(), "triton-sm90", schemes=scheme, quiet=True)
        (run,) = compiled.compilation.executables.values()
        figures[scheme] = {f"{tokens} tokens": compare(run, tokens) for tokens in args.tokens}
    write_result("joined_banks", figures)


if __name__ == "__main__":
    main(sys.argv[1:])
