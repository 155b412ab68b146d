"""
Nats per byte of the shipped model with all experts in one scheme: as it is, with what goes to down rotated while
running (`rotate_down=128`), with its residual stream rotated (`rotate_model`), and with both.

16 KiB of the calibration text's second half, eager backend. The second model computes the same as the first, with four
channels of every input of an expert 16 times as large (`plant_outliers`): large models grow outliers of their own, this
small one hardly. Writes `benchmarks/results/rotation.json`.

    python benchmarks/rotation.py
"""

from __future__ import annotations

import copy
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

from common import write_result

import mxmoe
from mxmoe.evaluate import load_tiny, perplexity
from mxmoe.frontend import lift
from mxmoe.ir import Plan, Scheme, rows_of
from mxmoe.transform import plant_outliers, rotate_model

SCHEMES = ("w4a4_g128_sym", "w4a4_sym", "w4a8_g128_sym", "w8a8_sym", "w4a16_g128_asym", "w2a16_g128_asym")
ROTATIONS = {"none": (False, None), "down": (False, 128), "stream": (True, None), "both": (True, 128)}
BYTES = 16 * 1024
FACTOR = 16.0


def main() -> None:
    tiny = load_tiny()
    half = len(tiny.calibration) // 2
    text = tiny.calibration[half : half + BYTES]
    plain = tiny.model
    planted = copy.deepcopy(plain)
    plant_outliers(planted, factor=FACTOR)
    rows = rows_of(lift(plain).module)
    figures = {}
    for name, original in (("shipped", plain), ("outliers", planted)):
        found = {"16 bits": perplexity(original, text).nats_per_token}
        for scheme in SCHEMES:
            plan = Plan(dict.fromkeys(rows, Scheme.parse(scheme)))
            found[scheme] = {}
            for rotation, (has_stream, block) in ROTATIONS.items():
                model = copy.deepcopy(original)
                if has_stream:
                    rotate_model(model)
                compiled = mxmoe.compile(model, "eager", plan=plan, rotate_down=block, quiet=True)
                found[scheme][rotation] = perplexity(compiled, text).nats_per_token
        figures[name] = found
    write_result("rotation", {"nats_per_byte": figures})


if __name__ == "__main__":
    main()
