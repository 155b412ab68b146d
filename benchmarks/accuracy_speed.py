"""
Seconds of the accuracy path on a whole layer of Qwen1.5-MoE's shape, against the definition executed as it is written.

60 routed experts, hidden 2048, intermediate 1408, top-4, a shared expert of 5632; 128 sequences of 4096 tokens,
random weights and normal hidden states in bf16. Measured: one observation, which gives the sensitivity of every scheme
of every linear; Hessians of all experts; GPTQ of all experts in three schemes. The definition is a full pass of the
block over all tokens for every (expert, role, scheme), with that one linear quantized: some of these passes are run and
timed, and their change of the output is held against the observation's figure.
Writes `benchmarks/results/accuracy_speed.json`.

    python benchmarks/accuracy_speed.py --device cuda
    python benchmarks/accuracy_speed.py --smoke
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_subject import Phases, spoken
from common import RESULTS, circumstances
from torch import Tensor
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mxmoe.calib import HessianOptions, Stats, collect_hessians, observe
from mxmoe.files import write_whole
from mxmoe.frontend import Lifted, expert_views, lift
from mxmoe.ir import Scheme
from mxmoe.quant import dequantize, quantize

SHAPE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
SMALL = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
SCHEMES = (
    *("w8a8_sym", "w4a8_g128_sym", "w4a4_sym", "w4a4_g128_sym", "w8a8_e4m3", "w8a16_asym"),
    *("w4a16_g128_asym", "w3a16_g128_asym", "w2a16_g128_asym"),
)
SAMPLED = (("up", 0, "w4a16_g128_asym"), ("down", 1, "w3a16_g128_asym"), ("gate", 2, "w2a16_g128_asym"))
"""(role, expert, scheme) of the full passes: weight-only, so that the block itself runs them."""


def build(shape: dict[str, int], device: torch.device) -> Qwen2MoeSparseMoeBlock:
    """Make the block with random weights of unit gain."""
    torch.manual_seed(0)
    # of what transformers has, the fastest: the definition's passes shall not be slow for want of a kernel
    how: dict[str, Any] = {"experts_implementation": "grouped_mm" if device.type == "cuda" else "eager"}
    config = Qwen2MoeConfig(**shape, **how)
    with torch.device(device):
        block = Qwen2MoeSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return block.to(dtype).eval()


def passes(
    block: Qwen2MoeSparseMoeBlock, lifted: Lifted, hidden: Sequence[Tensor], schemes: Sequence[str]
) -> list[dict[str, Any]]:
    """Run the block over all tokens once for each sampled linear and scheme, that linear quantized: the definition."""
    views = expert_views(lifted.blocks[0].banks["routed"])
    found: list[dict[str, Any]] = []
    for role, expert, scheme in SAMPLED:
        if scheme not in schemes:
            continue
        weight = views[expert].weights[role]
        kept = weight.clone()
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        references = [block(part) for part in hidden]
        _wait(weight.device)
        began = time.perf_counter()
        weight.copy_(dequantize(quantize(kept, Scheme.parse(scheme))))
        outputs = [block(part) for part in hidden]
        _wait(weight.device)
        seconds = time.perf_counter() - began
        weight.copy_(kept)
        for ours, theirs in zip(outputs, references, strict=True):
            total += (ours.float() - theirs.float()).square().sum(dtype=torch.float64)
        found.append(
            {"role": role, "expert": expert, "scheme": scheme, "seconds": seconds, "squared_change": float(total)}
        )
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compared(stats: Stats, lifted: Lifted, sampled: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the observation's figure beside each full pass's."""
    name = lifted.blocks[0].name
    for one in sampled:
        table = stats.sensitivity(name, "routed", one["role"], [one["scheme"]])
        one["observed"] = float(table[one["expert"], 0])
    return list(sampled)


def main(arguments: Sequence[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--smoke", action="store_true", help="a small layer and few tokens, on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.device, options.sequences, options.length = "cpu", 2, 64
    device, shape = torch.device(options.device), SMALL if options.smoke else SHAPE
    block, phases, peaks = build(shape, device), Phases(), dict[str, float]()
    lifted = lift(block)
    generator = torch.Generator(device).manual_seed(1)
    dtype = next(block.parameters()).dtype
    hidden = [
        torch.randn((1, options.length, shape["hidden_size"]), generator=generator, device=device).to(dtype)
        for _ in range(options.sequences)
    ]
    with torch.no_grad():
        observe(lifted, hidden[:1], schemes=options.schemes, quiet=True)  # the first call loads libraries
        with phases("observe", device):
            stats = observe(lifted, hidden, schemes=options.schemes, facts=())
        peaks["observe"] = phases.peak
        with phases("collect Hessians", device):
            rows = HessianOptions(max_rows=32768, max_buffer_mb=4000)
            hessians = collect_hessians(lifted, hidden, options=rows)
        peaks["collect Hessians"] = phases.peak
        weights = lifted.weights.using("gptq", hessians)
        for scheme in [
            one for one in options.schemes if one in {"w4a16_g128_asym", "w2a16_g128_asym", "w4a4_g128_sym"}
        ]:
            with phases(f"gptq {scheme}", device):
                for bank in lifted.blocks[0].banks.values():
                    for name in bank.shape.weights.values():
                        weights.quantized_stack(name, [Scheme.parse(scheme)] * bank.shape.experts)
            peaks[f"gptq {scheme}"] = phases.peak
        sampled = compared(stats, lifted, passes(block, lifted, hidden, options.schemes))
    count = (shape["num_experts"] + 1) * 3 * len(options.schemes)
    each = float(np.median([one["seconds"] for one in sampled]))
    figures = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "shape": shape,
        "tokens": options.sequences * options.length,
        "schemes": options.schemes,
        "seconds": {name: round(seconds, 3) for name, seconds in phases.seconds.items()},
        "peak_gb": {name: round(peak, 2) for name, peak in peaks.items()},
        "multiply_adds_of_the_observation": stats.macs,
        "full passes of the definition": count,
        "seconds of one, median": each,
        "seconds of all, extrapolated": each * count,
        "times less time": each * count / phases.seconds["observe"],
        "sampled": sampled,
    }
    command = spoken("accuracy_speed.py", arguments)
    whole = {"benchmark": "accuracy_speed", **circumstances(), "command": command, "figures": figures}
    options.results.mkdir(parents=True, exist_ok=True)
    write_whole(options.results / "accuracy_speed.json", json.dumps(whole, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
