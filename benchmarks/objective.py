"""
Perplexity of the demo's mixes for several exponents r of the objective loss^r * time^(1-r), on calibration text.

Statistics come from the first half of the shipped calibration text, perplexity from 48 KiB of its second half, so that
the demo's r is chosen without its held-out text. Writes `benchmarks/results/objective.json`.

    python benchmarks/objective.py
"""

from __future__ import annotations

import copy
import os
import statistics

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

from common import write_result

import mxmoe
from mxmoe.calib import byte_windows, observe
from mxmoe.evaluate import load_tiny, perplexity
from mxmoe.evaluate.demo import BUDGETS, CANDIDATES, TARGET
from mxmoe.frontend import lift

EXPONENTS = (0.5, 0.75, 0.9, 1.0)
WINDOWS, BYTES = 32, 48 * 1024


def main() -> None:
    tiny = load_tiny()
    model, half = tiny.model.float(), len(tiny.calibration) // 2
    windows = list(byte_windows(tiny.calibration[:half], 512, WINDOWS))
    stats = observe(lift(model), windows, schemes=CANDIDATES, quiet=True)
    text = tiny.calibration[half : half + BYTES]
    rows = []
    for r in EXPONENTS:
        for bits in BUDGETS:
            mixed = copy.deepcopy(model)
            compiled = mxmoe.compile(mixed, TARGET, inputs=stats, schemes=CANDIDATES, weight_bits=bits, r=r, quiet=True)
            block_us = statistics.mean(compiled.report().predicted_us.values())
            found = perplexity(compiled, text)
            rows.append({"r": r, "weight_bits": bits, "nats": found.nats_per_token, "predicted_block_us": block_us})
    mean = {str(r): statistics.mean(row["nats"] for row in rows if row["r"] == r) for r in EXPONENTS}
    write_result("objective", {"mean_nats_per_byte": mean, "mixes": rows})


if __name__ == "__main__":
    main()
