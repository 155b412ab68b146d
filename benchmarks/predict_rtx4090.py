"""
Predicts the time of whole blocks of experts on an RTX 4090, and sets it beside what others published for that card.

Nothing here was run on an RTX 4090. A prediction is the law of the shipped profile (`mxmoe/cost/data/README.md`: tile
times that the authors of MxMoE measured) applied to the tiles of our own schedule, which `mxmoe.cost` lays and runs on
128 SMs. The published figures are those of Duanmu et al., "MxMoE", ICML 2025, arXiv 2505.05799, figure 5, read off the
picture: products only, without routing, quantization of activations and combination; so are ours.

Experts are asked for by 2.6 to 1, most to least, as in the published workload of Qwen1.5-MoE at 8192 tokens; shared
experts see every token. A mix gives 8 bits to a part of the weights:

    4.25 bits   w4a16 and w8a8 (1/16 of the weights); where 8 bits save most time, the shared expert first if it fits
    5 bits      w4a4 (or w4a8) and w8a8 (1/4 of the weights); which experts is a matter of accuracy, unknown here, so
                that every fourth routed expert has 8 bits, and the shared one 4 or, where said, 8

Experts on INT4 units have a launch of their own, whose time is added. Writes `benchmarks/results/predict_rtx4090.json`
and `.md`; about eight minutes, as every plan chooses its tiles by simulating.

    python benchmarks/predict_rtx4090.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import RESULTS, circumstances, write_result
from tqdm import tqdm

from mxmoe.cost import CostModel, Gemm, cost_model, plan_launch, simulate_launch
from mxmoe.device import unit_of
from mxmoe.files import write_whole
from mxmoe.ir import Scheme

SPREAD = 2.6
TOKENS = (512, 8192)
BF16, W4A16, W4A16_G128, W8A8 = "bf16", "w4a16_asym", "w4a16_g128_asym", "w8a8_sym"
W4A8, W4A8_I, FP8 = "w4a8_g128_sym", "w4a8_g128_sym_iscale", "w8a8_e4m3"
W4A4, W4A4_G128 = "w4a4_sym", "w4a4_g128_sym"
UNIFORM = (BF16, W4A16, W4A16_G128, W8A8, FP8, W4A8, W4A8_I, W4A4, W4A4_G128)


@dataclass(frozen=True)
class Block:
    """Shape of the experts of one layer, and TFLOPS that were published for them: (tokens, what) -> value."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    shared: int
    """Width of the shared expert, 0 for none."""
    published: Mapping[tuple[int, str], float]

    def rows(self, tokens: int) -> tuple[int, ...]:
        """Rows of every routed expert, most first, then of the shared one."""
        share = np.geomspace(SPREAD, 1.0, self.experts)
        ideal = share / share.sum() * tokens * self.top_k
        rows = np.floor(ideal).astype(int)
        rows[: tokens * self.top_k - rows.sum()] += 1
        return (*rows.tolist(), *((tokens,) if self.shared else ()))

    @property
    def lanes(self) -> int:
        """Experts, the shared one included."""
        return self.experts + (self.shared > 0)

    def weights(self, lane: int) -> int:
        """Width of an expert: its number of weights, in some unit."""
        return self.shared if lane == self.experts else self.width

    def products(self, tokens: int, schemes: tuple[str, ...]) -> tuple[list[Gemm], list[Gemm]]:
        """The products of gate_up and of down."""
        rows, chosen = self.rows(tokens), tuple(map(Scheme.parse, schemes))
        entry, exit_ = ([Gemm(n, k, rows[: self.experts], chosen[: self.experts])] for n, k in self.sizes(self.width))
        if self.shared:
            for launch, (n, k) in zip((entry, exit_), self.sizes(self.shared), strict=True):
                launch.append(Gemm(n, k, rows[self.experts :], chosen[self.experts :]))
        return entry, exit_

    def sizes(self, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(n, k) of gate_up and of down."""
        return (2 * width, self.hidden), (self.hidden, width)

    def operations(self, tokens: int) -> float:
        """Multiply-adds of the block, each counted as two."""
        wide = zip(self.rows(tokens), map(self.weights, range(self.lanes)), strict=True)
        return sum(2.0 * rows * 3 * width * self.hidden for rows, width in wide)


def _figures(at512: tuple[float, ...], at8192: tuple[float, ...]) -> dict[tuple[int, str], float]:
    small = zip(("bf16", W4A16, W8A8, "mix 4.25"), at512, strict=True)
    large = zip(("bf16", W4A4, W8A8, "mix 5"), at8192, strict=True)
    return {(512, what): value for what, value in small} | {(8192, what): value for what, value in large}


BLOCKS = (
    Block("DeepSeek-V2-Lite", 2048, 1408, 64, 6, 2816,
          _figures((45.2, 90.6, 65.8, 103.9), (145.6, 648.7, 411.9, 579.0))),
    Block("Qwen1.5-MoE", 2048, 1408, 60, 4, 5632,
          _figures((43.9, 93.6, 67.2, 115.4), (146.8, 689.5, 421.8, 545.5))),
    Block("Qwen2-57B-A14B", 3584, 2560, 64, 8, 20480,
          _figures((73.0, 120.1, 104.6, 120.0), (136.2, 849.6, 365.9, 454.6))),
    Block("Mixtral-8x7B", 4096, 14336, 8, 2, 0,
          _figures((66.4, 126.2, 118.4, 124.2), (142.2, 907.6, 421.9, 544.2))),
)  # fmt: skip


def block_us(model: CostModel, block: Block, tokens: int, schemes: tuple[str, ...]) -> float:
    """Predict the microseconds of a block: gate_up and down, INT4 experts of a mix in launches of their own."""
    total = 0.0
    for launch in block.products(tokens, schemes):
        parts = [_only(launch, is_int4) for is_int4 in (False, True)]
        for gemms in parts:
            if any(sum(gemm.rows) for gemm in gemms):
                total += simulate_launch(model, plan_launch(model, gemms), gemms).makespan_us
    return total


def _only(launch: list[Gemm], is_int4: bool) -> list[Gemm]:
    """The same products with the experts of one kind."""
    found: list[Gemm] = []
    for gemm in launch:
        kept = [i for i, scheme in enumerate(gemm.schemes) if (unit_of(scheme) == "int4") == is_int4]
        if kept:
            rows, schemes = tuple(gemm.rows[i] for i in kept), tuple(gemm.schemes[i] for i in kept)
            found.append(Gemm(gemm.n, gemm.k, rows, schemes))
    return found


def mix_for_time(model: CostModel, block: Block, tokens: int, share: float) -> tuple[str, ...]:
    """W4a16, and w8a8 for at most a share of the weights: for the experts that it saves most time for each weight."""
    rows = block.rows(tokens)

    def saved(lane: int) -> float:
        us = [_expert_us(model, block, rows[lane], lane, scheme) for scheme in (W4A16, W8A8)]
        return (us[0] - us[1]) / block.weights(lane)

    left = share * sum(map(block.weights, range(block.lanes)))
    chosen = [W4A16] * block.lanes
    for lane in sorted(range(block.lanes), key=saved, reverse=True):
        if saved(lane) > 0 and block.weights(lane) <= left:
            chosen[lane] = W8A8
            left -= block.weights(lane)
    return tuple(chosen)


def _expert_us(model: CostModel, block: Block, rows: int, lane: int, scheme: str) -> float:
    """Time of one expert spread over all SMs."""
    parsed, total = Scheme.parse(scheme), 0.0
    for n, k in block.sizes(block.weights(lane)):
        total += min(
            math.ceil(rows / tile.m) * math.ceil(n / tile.n) * model.tile_us(parsed, tile, k, rows)
            for tile in model.tiles(parsed)
        )
    return total


def mix_for_accuracy(block: Block, low: str, shared: str) -> tuple[str, ...]:
    """W8a8 for a quarter of the weights: the shared expert as told, and every so many-th routed one; the rest low."""
    total = sum(map(block.weights, range(block.lanes)))
    left = total / 4 - (block.shared if shared == W8A8 else 0)
    count = min(block.experts, max(0, round(left / block.width)))
    wide = set(np.linspace(0, block.experts - 1, count).round().astype(int).tolist()) if count else set[int]()
    routed = [W8A8 if lane in wide else low for lane in range(block.experts)]
    return (*routed, *((shared,) if block.shared else ()))


def plans(model: CostModel, block: Block, tokens: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What is predicted: title -> (key of the published figure, scheme of every expert)."""
    found = {scheme: (scheme, (scheme,) * block.lanes) for scheme in UNIFORM}
    found["mix of 4.25 bits, w4a16 + w8a8"] = ("mix 4.25", mix_for_time(model, block, tokens, 1 / 16))
    found["mix of 5 bits, w4a4 + w8a8"] = ("mix 5", mix_for_accuracy(block, W4A4, W4A4))
    if block.shared and 4 * block.shared <= block.experts * block.width + block.shared:
        found["mix of 5 bits, w4a4 + w8a8 (shared)"] = ("mix 5", mix_for_accuracy(block, W4A4, W8A8))
    found["mix of 5 bits, w4a8 + w8a8"] = ("", mix_for_accuracy(block, W4A8, W4A8))
    return found


def predict(model: CostModel, block: Block, tokens: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for title, (key, schemes) in plans(model, block, tokens).items():
        us = block_us(model, block, tokens, schemes)
        tflops = block.operations(tokens) / us * 1e-6
        known = block.published.get((tokens, key))
        basis = sorted({f"{model.provenance(Scheme.parse(one))}" for one in schemes})
        lines.append({
            "model": block.name, "tokens": tokens, "plan": title, "predicted_us": round(us, 1),
            "predicted_tflops": round(tflops, 1), "published_tflops": known,
            "predicted_over_published": None if known is None else round(tflops / known, 2), "basis": ", ".join(basis),
        })  # fmt: skip
    return lines


HEAD = """# Blocks of experts on an RTX 4090: predicted, beside what others published

**Predicted** columns are predictions: tile times that others measured on an RTX 4090 (see `mxmoe/cost/data/README.md`),
laid out by our schedule and simulated on 128 SMs. Nothing of ours ran on such a card. **Published** columns are of
Duanmu et al., "MxMoE", ICML 2025, arXiv 2505.05799, figure 5, read off the picture: their kernels, products only.
A ratio above 1 says that the prediction is the faster one; it is no measurement of a speed-up.

What to hold against a prediction: int8 and int4 tiles were measured with 128 rows only, and lower ones scale by their
rooflines; "scaled from" and "roofline" rest on figures of another scheme, or on none; the table that all rests on errs
on the slow side, as its int4 rows show at 8192 tokens. The published `bf16` is fp16 with a single tile of CUTLASS.

Command: `{command}`. Assumptions are in the head of the script.
"""


def markdown(lines: list[dict[str, Any]]) -> str:
    """The page: what is whose, how near predictions come to what is known, a table for each number of tokens."""
    text = [HEAD.format(command=circumstances()["command"]).rstrip(), "", "## Predicted over published", ""]
    text += ["| tokens | plan | models | lowest | median | highest |", "|---:|---|---:|---:|---:|---:|"]
    known = [line for line in lines if line["published_tflops"] is not None]
    for tokens, plan in dict.fromkeys((line["tokens"], line["plan"]) for line in known):
        ratios = sorted(
            one["predicted_over_published"] for one in known if (one["tokens"], one["plan"]) == (tokens, plan)
        )
        middle = f"{statistics.median(ratios):.2f}"
        text.append(f"| {tokens} | {plan} | {len(ratios)} | {ratios[0]:.2f} | {middle} | {ratios[-1]:.2f} |")
    for tokens in TOKENS:
        text += ["", f"## {tokens} tokens", ""]
        text += ["| model | plan | predicted us | predicted TFLOPS | published TFLOPS | ratio | figures are |"]
        text += ["|---|---|---:|---:|---:|---:|---|"]
        for line in (line for line in lines if line["tokens"] == tokens):
            published, ratio = line["published_tflops"], line["predicted_over_published"]
            shown = ("", "") if published is None else (f"{published:.1f}", f"{ratio:.2f}")
            times = (f"{line['predicted_us']:.0f}", f"{line['predicted_tflops']:.1f}")
            text.append("| " + " | ".join((line["model"], line["plan"], *times, *shown, line["basis"])) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    model = cost_model("measured", "rtx4090")
    cells = [(block, tokens) for tokens in TOKENS for block in BLOCKS]
    lines = [line for block, tokens in tqdm(cells, unit="block") for line in predict(model, block, tokens)]
    write_result("predict_rtx4090", {"lines": lines})
    write_whole(RESULTS / "predict_rtx4090.md", markdown(lines))


if __name__ == "__main__":
    main()
