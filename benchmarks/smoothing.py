"""
Perplexity of the shipped model under uniform schemes: quantizers without data, AWQ and SmoothQuant, with and without
outlier channels planted in what its experts read.

Scales come from 8 KiB of the shipped calibration text, perplexity from 6 KiB of the held-out one. Writes
`benchmarks/results/smoothing.json`.

    python benchmarks/smoothing.py
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads

from common import write_result
from torch import nn

import mxmoe
from mxmoe.calib import byte_windows
from mxmoe.evaluate import load_tiny, perplexity
from mxmoe.transform import activation_profile, awq, plant_outliers, smooth

WEIGHT_ONLY = ("w2a16_g32_asym", "w3a16_g32_asym", "w3a16_g32_sym")
BOTH = ("w8a8_sym", "w4a8_sym", "w4a4_g32_sym")
CHANNELS, FACTOR = 3, 32.0
BYTES = 6 * 1024

Transform = Callable[[nn.Module], object]


def ways(scheme: str, data: list[object]) -> dict[str, tuple[Transform | None, str]]:
    """Name -> what to do to the model, and the quantizer."""
    if scheme in BOTH:
        scales: dict[str, tuple[Transform | None, str]] = {
            f"smooth {alpha} + rtn": (lambda model, alpha=alpha: smooth(model, data, alpha, quiet=True), "rtn")
            for alpha in (0.5, 0.7)
        }
        return {"rtn": (None, "rtn"), **scales}

    def scaled(model: nn.Module) -> object:
        return awq(model, data, [scheme], rows=128, quiet=True)

    return {
        "rtn": (None, "rtn"),
        "hqq, scale fixed": (None, "hqq{refine-scale=false}"),
        "hqq": (None, "hqq"),
        "awq + rtn": (scaled, "rtn"),
        "awq + hqq": (scaled, "hqq"),
    }


def main() -> None:
    tiny = load_tiny()
    data, text = list(byte_windows(tiny.calibration, 512, 16)), tiny.held_out[:BYTES]
    planted = copy.deepcopy(tiny.model)
    plant_outliers(planted, channels=CHANNELS, factor=FACTOR)
    rows, profiles = [], {}
    for name, model in (("as shipped", tiny.model), ("outliers planted", planted)):
        lines = activation_profile(model, data, quiet=True).lines
        profiles[name] = {
            role: max(line.peak for line in lines if line.role == role and line.bank == "routed")
            for role in ("gate_up", "down")
        }
        rows.append({"model": name, "scheme": "none", "way": "none", "perplexity": perplexity(model, text).perplexity})
        for scheme in (*WEIGHT_ONLY, *BOTH):
            for way, (transform, quantizer) in ways(scheme, data).items():
                changed = copy.deepcopy(model)
                if transform is not None:
                    transform(changed)
                made = mxmoe.compile(changed, "eager", schemes=scheme, quantizer=quantizer, quiet=True)
                found = perplexity(made, text).perplexity
                rows.append({"model": name, "scheme": scheme, "way": way, "perplexity": found})
    planting = {"channels": CHANNELS, "factor": FACTOR}
    write_result("smoothing", {"planted": planting, "largest_max_over_median": profiles, "rows": rows})


if __name__ == "__main__":
    main()
