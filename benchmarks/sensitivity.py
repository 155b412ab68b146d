"""
Arithmetic and time of one observation of a Qwen1.5-MoE layer, against one full block pass per (expert, role, scheme).

60 routed experts, hidden 2048, intermediate 1408, top-4, and a shared expert of 5632. The comparison is the definition
of sensitivity executed as it is written: for every linear and scheme the whole block once more over the data.

The layer that runs has fewer routed experts, of the same sizes, so that it takes about a minute on two free cores. Its
multiply-adds are counted as its products run (`Stats.macs`), those of a block pass by torch's operator hook; both must
equal the formulas, and the formulas give the count of the whole layer. Neither counts the quantizing of weights and
activations. The time of the observation has all of it; the time of the definition is that of its block passes alone.
Writes `benchmarks/results/sensitivity.json`.

    python benchmarks/sensitivity.py
    python benchmarks/sensitivity.py --experts 60    # the whole layer
"""

from __future__ import annotations

import argparse
import time

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


def build(experts: int) -> Qwen2MoeSparseMoeBlock:
    generator = torch.Generator().manual_seed(0)
    block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**SHAPE | {"num_experts": experts}, experts_implementation="eager"))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return block.eval()


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
            start = time.perf_counter()
            block(hidden[None])
            times.append(time.perf_counter() - start)
    return counter.get_total_flops() // 2, sorted(times)[1]


def ratio(count: dict[str, int]) -> float:
    return count["passes"] * count["block_pass"] / count["reduction"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8, help="routed experts of the layer that runs")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    arguments = parser.parse_args()
    block = build(arguments.experts)
    hidden = torch.randn((arguments.tokens, SHAPE["hidden_size"]), generator=torch.Generator().manual_seed(1))
    macs, seconds = block_pass(block, hidden)
    start = time.perf_counter()
    stats = observe(lift(block), hidden, schemes=arguments.schemes, quiet=True)
    observed = time.perf_counter() - start
    ran = formula(arguments.experts, arguments.tokens, len(arguments.schemes))
    whole = formula(SHAPE["num_experts"], arguments.tokens, len(arguments.schemes))
    assert (macs, stats.macs) == (ran["block_pass"], ran["reduction"]), (macs, stats.macs, ran)
    write_result(
        "sensitivity",
        {
            "shape": SHAPE,
            "tokens": arguments.tokens,
            "schemes": arguments.schemes,
            "whole layer, by formula": {**whole, "times_less_arithmetic": ratio(whole)},
            f"{arguments.experts} experts, counted while running": {
                **ran,
                "times_less_arithmetic": ratio(ran),
                "block_pass_seconds": seconds,
                "definition_seconds_extrapolated": ran["passes"] * seconds,
                "observe_seconds": observed,
                "times_less_time": ran["passes"] * seconds / observed,
            },
        },
    )
    if ratio(whole) < AT_LEAST:
        raise SystemExit(f"the reduction must take at least {AT_LEAST}x less arithmetic")


if __name__ == "__main__":
    main()
