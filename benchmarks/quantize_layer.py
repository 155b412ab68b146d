"""
Seconds and memory that quantizing all experts of one layer takes, by quantizer, and what it does to the outputs.

The layer has the shape of Qwen1.5-MoE's (60 experts, hidden 2048, intermediate 1408, top-4); tokens are correlated
normal, routed evenly, with router weights drawn at random. Hessians are collected from them first, and timed too. The
error is the change of all experts' summed weighted outputs on tokens that were not seen, in parts of the outputs.
Writes `benchmarks/results/quantize_layer.json`.

    python benchmarks/quantize_layer.py --device cuda
    python benchmarks/quantize_layer.py --experts 2 --tokens 4096
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import write_result
from torch import Tensor
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from mxmoe.calib import collect_hessians
from mxmoe.frontend import Lifted, lift
from mxmoe.ir import Scheme
from mxmoe.quant import apply_act, dequantize

QUANTIZERS = ("rtn", "rtn_mse", "gptq", "gptq{act-order=false}", "gptq{static-groups=false}", "gptq{scales=rtn_mse}")
TOP_K = 4


def layer(experts: int, hidden: int, intermediate: int, device: str) -> Qwen2MoeExperts:
    config = Qwen2MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts)
    with torch.device(device):
        module = Qwen2MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            for matrix in parameter:
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[-1] ** -0.5)
    return module


def tokens(count: int, hidden: int, experts: int, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, some channels ten times as loud as others; top-k of a random score, and its weights."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn((hidden, 256), generator=torch.Generator().manual_seed(7)) / 16
    loud = torch.logspace(-0.5, 0.5, hidden)
    x = torch.randn((count, 256), generator=generator) @ mix.T + 0.5 * torch.randn((count, hidden), generator=generator)
    score = torch.rand((count, experts), generator=generator)
    weight, index = score.topk(min(TOP_K, experts), dim=-1)
    return (x * loud).to(device), index.to(device), (weight / weight.sum(-1, keepdim=True)).to(device)


def outputs(stacks: dict[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, index, weight = batch
    total = torch.zeros_like(x)
    for expert in range(len(stacks["up"])):
        row, slot = torch.where(index == expert)
        gate, up, down = (stacks[role][expert].float() for role in ("gate", "up", "down"))
        between = apply_act("silu", x[row] @ gate.mT, x[row] @ up.mT)
        total.index_add_(0, row, between @ down.mT * weight[row, slot, None])
    return total


class Clock:
    """Seconds of what runs within, and the most memory that a GPU held meanwhile."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device.startswith("cuda")

    def __enter__(self) -> Clock:
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start

    @property
    def figures(self) -> dict[str, float]:
        """As they are written."""
        peak = {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if self.is_gpu else {}
        return {"seconds": round(self.seconds, 3), **peak}


def measure(lifted: Lifted, quantizer: str, scheme: Scheme, hessians: Any, test: Any, device: str) -> dict[str, float]:  # noqa: ANN401
    names = lifted.blocks[0].banks["routed"].shape.weights
    weights = lifted.weights.using(quantizer, hessians)
    with Clock(device) as clock:
        stacks = {role: weights.quantized_stack(name, [scheme] * len(weights[name])) for role, name in names.items()}
    found = {role: torch.stack([dequantize(q).to(torch.bfloat16) for q in stack]) for role, stack in stacks.items()}
    batch, reference = test
    error = float((outputs(found, batch) - reference).norm() / reference.norm())
    return {**clock.figures, "error": round(error, 5)}


def main() -> None:
    parser = argparse.ArgumentParser()
    for option, default in (("experts", 60), ("hidden", 2048), ("intermediate", 1408), ("tokens", 65536)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--schemes", nargs="+", default=["w4a16_g128_asym", "w3a16_g128_asym", "w2a16_g128_asym"])
    given = parser.parse_args()
    module = layer(given.experts, given.hidden, given.intermediate, given.device)
    lifted = lift(module)
    seen = tokens(given.tokens, given.hidden, given.experts, 0, given.device)
    unseen = tokens(min(given.tokens, 4096), given.hidden, given.experts, 1, given.device)
    with torch.no_grad():
        collect_hessians(lifted, seen, quiet=True)  # the first call loads libraries
        with Clock(given.device) as clock:
            hessians = collect_hessians(lifted, seen, quiet=True)
        figures: dict[str, Any] = {"arguments": vars(given), "collect_hessians": clock.figures}
        names = lifted.blocks[0].banks["routed"].shape.weights
        reference = outputs({role: lifted.weights[name] for role, name in names.items()}, unseen)
        measure(lifted, "gptq", Scheme.parse(given.schemes[0]), hessians, (unseen, reference), given.device)
        for scheme in given.schemes:
            figures[scheme] = {
                one: measure(lifted, one, Scheme.parse(scheme), hessians, (unseen, reference), given.device)
                for one in QUANTIZERS
            }
    write_result("quantize_layer", figures)


if __name__ == "__main__":
    main()
