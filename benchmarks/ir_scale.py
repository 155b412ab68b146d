"""
Builds, verifies, prints and parses a model of DeepSeek-V3's size, all tables filled; the mark is 5 s together.

58 blocks, each with 256 routed experts and 1 shared expert, 3 roles, 8 candidate schemes. Writes
`benchmarks/results/ir_scale.json`.

    python benchmarks/ir_scale.py
"""

from __future__ import annotations

import time

import numpy as np
from common import write_result

from mxmoe.ir import (
    BankShape,
    BlockShape,
    ModuleOp,
    Scheme,
    Table,
    banks,
    build_module,
    linears,
    moe_ops,
    parse_ir,
    print_ir,
)

SCHEMES = (
    "w2a16_g128_asym",
    "w3a16_g128_asym",
    "w4a16_g128_asym",
    "w4a16_sym",
    "w4a8_g128_sym",
    "w8a8_sym",
    "w8a8_e4m3",
    "bf16",
)
BLOCKS, ROUTED, HIDDEN, INTERMEDIATE = 58, 256, 7168, 2048


def bank(block: str, name: str, experts: int, top_k: int) -> BankShape:
    roles = ("gate", "up", "down")
    weights = {role: f"{block}.{name}.{role}" for role in roles}
    return BankShape(name, experts, top_k, INTERMEDIATE, "silu", True, weights)


def build() -> ModuleOp:
    names = [f"model.layers.{i + 3}.mlp" for i in range(BLOCKS)]
    shapes = [BlockShape(name, HIDDEN, (bank(name, "routed", ROUTED, 8), bank(name, "shared", 1, 1))) for name in names]
    module = build_module(shapes, [Scheme.parse(text) for text in SCHEMES])
    rng = np.random.default_rng(0)

    def table(axes: tuple[str, ...], *shape: int) -> Table:
        return Table(axes, rng.lognormal(size=shape).astype(np.float32))

    for op in linears(module):
        op.set_table("sensitivity", table(("expert", "scheme"), op.experts, len(SCHEMES)))
        op.set_table("cost", table(("expert", "scheme"), op.experts, len(SCHEMES)))
        op.set_table("choice", Table(("expert",), rng.integers(0, len(SCHEMES), op.experts).astype(np.int8)))
    for moe in moe_ops(module):
        moe.stage = "allocated"
        for one in banks(moe).values():
            one.route.set_table("frequency", table(("expert",), one.experts))
            one.route.set_table("mass", table(("expert",), one.experts))
    return module


def main() -> None:
    seconds: dict[str, float] = {}

    def timed(name: str, start: float) -> float:
        now = time.perf_counter()
        seconds[name] = round(now - start, 3)
        return now

    start = time.perf_counter()
    module = build()
    start = timed("build_s", start)
    module.verify()
    start = timed("verify_s", start)
    text = print_ir(module, elide=None)
    start = timed("print_s", start)
    again = parse_ir(text)  # verifies as well
    start = timed("parse_s", start)
    print_ir(module)
    timed("print_elided_s", start)
    assert print_ir(again, elide=None) == text, "the text must come back"
    total = sum(value for key, value in seconds.items() if key != "print_elided_s")
    write_result("ir_scale", {**seconds, "together_s": round(total, 3), "mark_s": 5.0, "text_mb": len(text) / 1e6})


if __name__ == "__main__":
    main()
