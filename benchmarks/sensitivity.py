"""
Arithmetic and time of one observation of a Qwen1.5-MoE layer, against one full block pass per (expert, role, scheme).

60 routed experts, hidden 2048, intermediate 1408, top-4, and a shared expert of 5632. The comparison is the definition
of sensitivity executed as it is written: for every linear and scheme the whole block once more over the data.

The layer that runs has fewer routed experts, of the same sizes, so that it takes about a minute on two free cores. Its
multiply-adds are counted as its products run (`Stats.macs`), those of a block pass by torch's operator hook; both must
equal the formulas, and the formulas give the count of the whole layer. Neither counts the quantizing of weights and
activations. The time of the observation has all of it; the time of the definition is that of its block passes alone.
Writes `benchmarks/results/sensitivity.json`, or `sensitivity_cuda.json` with the peak of the GPU's memory.

    python benchmarks/sensitivity.py
    python benchmarks/sensitivity.py --experts 60    # the whole layer
    python benchmarks/sensitivity.py --experts 60 --device cuda --dtype bfloat16 --tokens 524288    # and 128 x 4096
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from common import write_result
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import observe
from mxmoe.frontend import lift

SHAPE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
SCHEMES = (
    *("w8a8_sym", "w4a8_g128_sym", "w4a4_sym", "w4a4_g128_sym", "w8a8_e4m3", "w8a16_asym"),
    *("w4a16_g128_asym", "w3a16_g128_asym", "w2a16_g128_asym"),
)
AT_LEAST = 50
"""Times less arithmetic that the reduction must take."""
SAMPLE = 4096
"""Tokens of a call of the block, and of the pass that the definition is extrapolated from."""


def build(experts: int, device: str, dtype: torch.dtype) -> Qwen2MoeSparseMoeBlock:
    generator = torch.Generator().manual_seed(0)
    block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**SHAPE | {"num_experts": experts}, experts_implementation="eager"))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return block.eval().to(device, dtype)


def batches(tokens: int, device: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Give the hidden states of all tokens, as many at a time as the block takes in one call."""
    generator = torch.Generator().manual_seed(1)
    for start in range(0, tokens, SAMPLE):
        rows = min(SAMPLE, tokens - start)
        yield torch.randn((rows, SHAPE["hidden_size"]), generator=generator).to(device, dtype)


def clock(device: str) -> float:
    """Seconds now, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def formula(experts: int, tokens: int, n_schemes: int) -> dict[str, int]:
    """Multiply-adds of a block pass and of the reduction, and passes by the definition, for a layer of `experts`."""
    hidden = SHAPE["hidden_size"]
    width = SHAPE["num_experts_per_tok"] * SHAPE["moe_intermediate_size"] + SHAPE["shared_expert_intermediate_size"]
    router = (experts + 1) * hidden  # and the gate of the shared expert
    return {
        "block_pass": tokens * (3 * width * hidden + router),
        "reduction": tokens * width * hidden * (3 + 5 * n_schemes),
        "passes": (experts + 1) * 3 * n_schemes,
    }


def block_pass(block: Qwen2MoeSparseMoeBlock, hidden: torch.Tensor) -> tuple[int, float]:
    """Multiply-adds and seconds (median of three) of one full-precision pass of the whole block."""
    with torch.no_grad():
        counter = FlopCounterMode(display=False)
        with counter:
            block(hidden[None])
        times: list[float] = []
        for _ in range(3):
            start = clock(hidden.device.type)
            block(hidden[None])
            times.append(clock(hidden.device.type) - start)
    return counter.get_total_flops() // 2, sorted(times)[1]


def ratio(count: dict[str, int]) -> float:
    return count["passes"] * count["block_pass"] / count["reduction"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8, help="routed experts of the layer that runs")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    device, dtype, tokens = arguments.device, getattr(torch, arguments.dtype), arguments.tokens
    block = build(arguments.experts, device, dtype)
    sample = min(tokens, SAMPLE)
    macs, seconds = block_pass(block, next(batches(sample, device, dtype)))
    given = list(batches(tokens, device, dtype))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(device)
    stats = observe(lift(block), given, schemes=arguments.schemes, facts=(), quiet=True)
    observed = clock(device) - start
    ran = formula(arguments.experts, tokens, len(arguments.schemes))
    whole = formula(SHAPE["num_experts"], tokens, len(arguments.schemes))
    assert (macs * tokens, stats.macs) == (ran["block_pass"] * sample, ran["reduction"]), (macs, stats.macs, ran)
    definition = ran["passes"] * seconds * tokens / sample
    write_result(
        "sensitivity" if device == "cpu" else f"sensitivity_{device}",
        {
            "shape": SHAPE,
            "tokens": tokens,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "dtype": arguments.dtype,
            "schemes": arguments.schemes,
            "whole layer, by formula": {**whole, "times_less_arithmetic": ratio(whole)},
            f"{arguments.experts} experts, counted while running": {
                **ran,
                "times_less_arithmetic": ratio(ran),
                f"block_pass_seconds of {sample} tokens": seconds,
                "definition_seconds_extrapolated": definition,
                "observe_seconds": observed,
                "times_less_time": definition / observed,
                **({"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}),
            },
        },
    )
    if ratio(whole) < AT_LEAST:
        raise SystemExit(f"the reduction must take at least {AT_LEAST}x less arithmetic")


if __name__ == "__main__":
    main()
