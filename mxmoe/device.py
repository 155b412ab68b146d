"""Device rows: the hardware numbers that a cost model starts from, each with its source. No row holds a measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from mxmoe.errors import BadDevice, UnknownName
from mxmoe.ir import Scheme
from mxmoe.registry import near_names

Unit = Literal["fp16", "bf16", "int8", "fp8", "int4"]
"""A kind of matrix instruction; floats accumulate in fp32, integers in int32."""
UNITS: tuple[Unit, ...] = ("fp16", "bf16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class Device:
    """
    One kind of GPU, by its published peaks.

    `DEVICES["rtx4090"].peak_tops("int8")` is 660.6; a unit that the chip lacks is absent from `tops` and has a peak
    of 0. A W4A4 scheme is then impossible there and costs `inf`, rather than being costed as an emulation.

    Raises:
        BadDevice: a figure that is not a positive number, an unknown unit, or a figure without a source.
    """

    name: str
    """Key in `DEVICES`: lower case, no spaces."""
    title: str
    """The maker's name for the product."""
    compute_capability: int
    """CUDA compute capability times ten: 89 is sm_89."""
    sms: int
    """Streaming multiprocessors that are switched on."""
    boost_ghz: float
    """The clock at which the published peaks hold."""
    dram_gb_s: float
    """Peak memory bandwidth, 10^9 bytes per second."""
    l2_mb: float
    """Level-two cache, MiB."""
    smem_kb_per_sm: float
    """Shared memory that the blocks of one SM can have together, KiB."""
    tops: Mapping[str, float]
    """Matrix unit -> dense peak, 10^12 operations per second (a multiply-add counts as two)."""
    source: Mapping[str, str] = field(repr=False)
    """Field, or `tops.<unit>` -> where the figure is from."""

    def __post_init__(self) -> None:
        figures = {name: getattr(self, name) for name in FIGURES} | {f"tops.{u}": t for u, t in self.tops.items()}
        for name, value in figures.items():
            if not (math.isfinite(value) and value > 0):
                raise BadDevice(device=self.name, reason=f"{name} is {value}, not a positive number")
            if not self.source.get(name) and not (name.startswith("tops.") and self.source.get("tops")):
                raise BadDevice(device=self.name, reason=f"{name} has no source")
        for unit in self.tops:
            if unit not in UNITS:
                raise BadDevice(device=self.name, reason=f"{unit!r} is no matrix unit ({', '.join(UNITS)})")

    def __hash__(self) -> int:
        return hash(self.name)

    def peak_tops(self, unit: str) -> float:
        """Dense peak of a matrix unit in 10^12 operations per second; 0 where the chip has none."""
        return self.tops.get(unit, 0.0)

    def runs(self, scheme: Scheme) -> bool:
        """Whether the chip has the matrix unit that the scheme multiplies on."""
        return self.peak_tops(unit_of(scheme)) > 0


FIGURES = ("compute_capability", "sms", "boost_ghz", "dram_gb_s", "l2_mb", "smem_kb_per_sm")


def unit_of(scheme: Scheme) -> Unit:
    """
    Name the matrix unit that multiplies this scheme's operands.

    The activations decide, narrower weights are widened on the way: w4a16 -> bf16 (or fp16), w4a8 -> int8,
    w8a8_e4m3 -> fp8, w4a4 -> int4, w8a4 -> int8 (the weights do not fit four bits), w5a5 -> int8.
    """
    if scheme.act_format == "fp16":
        return "fp16"
    if scheme.act_format == "bf16":
        return "bf16"
    if scheme.act_format == "e4m3":
        return "fp8"
    return "int4" if max(scheme.act_bits, scheme.weight_bits) <= 4 else "int8"


_ADA = "NVIDIA Ada GPU Architecture whitepaper v2, appendix A"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2, appendix A"
_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper, tables 1 and 4; A100 80GB datasheet for the memory"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5 column"
_GUIDE = "CUDA C++ Programming Guide, technical specifications per compute capability"


def _sources(paper: str, **others: str) -> dict[str, str]:
    guide = {"smem_kb_per_sm": _GUIDE, "compute_capability": _GUIDE}
    return {**dict.fromkeys((*FIGURES, "tops"), paper), **guide, **others}


_ROWS = (
    Device(
        "rtx4090", "GeForce RTX 4090", 89, sms=128, boost_ghz=2.52, dram_gb_s=1008, l2_mb=72, smem_kb_per_sm=100,
        tops={"fp16": 165.2, "bf16": 165.2, "int8": 660.6, "fp8": 330.3, "int4": 1321.2},
        source=_sources(_ADA),
    ),
    Device(
        "rtx3090", "GeForce RTX 3090", 86, sms=82, boost_ghz=1.695, dram_gb_s=936, l2_mb=6, smem_kb_per_sm=100,
        tops={"fp16": 71, "bf16": 71, "int8": 284, "int4": 568},
        source=_sources(_GA102),
    ),
    Device(
        "a100", "A100 SXM 80GB", 80, sms=108, boost_ghz=1.41, dram_gb_s=2039, l2_mb=40, smem_kb_per_sm=164,
        tops={"fp16": 312, "bf16": 312, "int8": 624, "int4": 1248},
        source=_sources(_A100),
    ),
    Device(
        "h100", "H100 SXM", 90, sms=132, boost_ghz=1.83, dram_gb_s=3350, l2_mb=50, smem_kb_per_sm=228,
        tops={"fp16": 989.4, "bf16": 989.4, "int8": 1978.9, "fp8": 1978.9},
        source=_sources(_H100, boost_ghz="the clock at which 132 SMs x 4096 fp16 operations give the published 989.4"),
    ),
    Device(
        "h200", "H200 SXM", 90, sms=132, boost_ghz=1.83, dram_gb_s=4800, l2_mb=50, smem_kb_per_sm=228,
        tops={"fp16": 989.4, "bf16": 989.4, "int8": 1978.9, "fp8": 1978.9},
        source=_sources(_H100 + " (the same chip)", dram_gb_s="NVIDIA H200 datasheet"),
    ),
    Device(
        "l40s", "L40S", 89, sms=142, boost_ghz=2.52, dram_gb_s=864, l2_mb=96, smem_kb_per_sm=100,
        # the datasheet gives int4 no more than int8, unlike the L40's; it is taken at its word
        tops={"fp16": 362.05, "bf16": 362.05, "int8": 733, "fp8": 733, "int4": 733},
        source=_sources("NVIDIA L40S datasheet", l2_mb="full AD102, " + _ADA, boost_ghz=_ADA + ", AD102 boards"),
    ),
)  # fmt: skip

DEVICES: Mapping[str, Device] = MappingProxyType({row.name: row for row in _ROWS})
"""Every device that has a row."""


def device(name: str) -> Device:
    """
    Return the row of a device by its key in any case and with blanks, e.g. `device("rtx4090")`, `device("RTX 4090")`.

    Raises:
        UnknownName: no such row; the message has the nearest names.
    """
    key = "".join(name.lower().split())
    if key not in DEVICES:
        raise UnknownName(kind="device", name=name, near=near_names(key, DEVICES))
    return DEVICES[key]
