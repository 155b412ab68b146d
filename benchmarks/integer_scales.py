"""
Nats per byte of the shipped model with all experts in one scheme, with scales of their own and with integer scales.

Groups of 16 and 32 channels, since the model's rows of 128 channels are one group of 128; the larger the groups of a
model, the less their scales differ. 32 KiB of held-out text, eager backend, quantizers RTN and GPTQ (Hessians of 32 KiB
of calibration text). Writes `benchmarks/results/integer_scales.json`.

    python benchmarks/integer_scales.py
"""

from __future__ import annotations

import copy
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

import torch
from common import write_result

import mxmoe
from mxmoe.evaluate import load_tiny, perplexity

GROUPS = (16, 32)
QUANTIZERS = ("rtn", "gptq")
BYTES, WINDOW = 32 * 1024, 512


def main() -> None:
    tiny = load_tiny()
    text = tiny.held_out[:BYTES]
    windows = torch.tensor(list(tiny.calibration[:BYTES])).view(-1, WINDOW)
    found: dict[str, object] = {"16 bits": perplexity(tiny.model, text).nats_per_token}
    for group in GROUPS:
        for scheme in (f"w4a8_g{group}_sym", f"w4a8_g{group}_sym_iscale"):
            for quantizer in QUANTIZERS:
                compiled = mxmoe.compile(
                    copy.deepcopy(tiny.model), "eager", inputs=windows, schemes=scheme, weight_bits=None,
                    quantizer=quantizer, quiet=True,
                )  # fmt: skip
                found[f"{scheme} {quantizer}"] = perplexity(compiled, text).nats_per_token
    write_result("integer_scales", {"nats_per_byte": found})


if __name__ == "__main__":
    main()
