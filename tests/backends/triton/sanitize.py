"""
One small block for each body of the kernels, with edges in every direction: to be run under a memory checker.

    compute-sanitizer --tool memcheck python tests/backends/triton/sanitize.py nibbles
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

CASES: Mapping[str, tuple[str, ...]] = {
    "dense16": ("bf16", "fp16"),
    "dense8": ("w8a8_sym", "w8a8_e4m3"),
    "nibbles": ("w4a8_sym", "w4a8_g128_sym", "w4a4_g128_sym"),
    "scaled": ("w4a8_g128_sym_iscale",),
    "nibbles_e4m3": ("w4a8_sym_e4m3", "w4a8_g128_sym_e4m3"),
    "wide2": ("w2a16_g128_asym", "w2a16_sym"),
    "wide3": ("w3a16_g128_asym", "w3a16_g32_sym"),
    "wide4": ("w4a16_g128_asym", "w4a16_g64_sym_fp16"),
    "wide8": ("w8a16_g128_asym", "w8a16_sym"),
    "divided_int8": ("w8a8_sym", "w4a8_g128_sym", "bf16"),
    "divided_e4m3": ("w8a8_e4m3", "w4a8_g128_sym_e4m3", "w4a8_sym_e4m3"),
    "divided_scaled": ("w4a8_g128_sym_iscale", "w8a8_sym", "w4a8_g128_sym"),
}
"""Name -> the schemes of the block."""
SIZES = dict.fromkeys(("divided_int8", "divided_e4m3", "divided_scaled"), (272, 208))
"""Channels outside and between, where 8-bit rows have to be whole 16 bytes; of the other blocks they are not."""
TOKENS = (1, 19, 150)
"""Few rows and many, none of which fills its tiles."""


def main(name: str) -> None:
    """Compile the block, and run it over several routings."""
    # every tensor in memory of its own: what is read behind its end is seen
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from mxmoe.ir import Scheme
    from tests.backends.triton.small_blocks import Pair, Small

    schemes = tuple(map(Scheme.parse, CASES[name]))
    hidden, between = SIZES.get(name, (264, 200))
    pair = Pair.of(Small(schemes, hidden, between, experts=3, top_k=2, has_bias=True))
    for tokens in TOKENS:
        pair.check(pair.small.tokens(tokens, 0), pair.small.routing(tokens, tokens))


if __name__ == "__main__":
    main(sys.argv[1])
