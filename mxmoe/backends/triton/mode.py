"""Whether kernels run on a GPU or in Triton's interpreter: decided once, before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache

import torch

INTERPRET = "TRITON_INTERPRET"
HOPPER = 90
"""Compute capability, times ten, that has a divided kernel, and measured tiles."""
NO_PTX, ANY_PTX, HOPPER_PTX = 0, 1, 2
"""What kernels may say in the GPU's own language: nothing, what sm_80 knows, what sm_90 knows."""
MOST_EARLY = 1024
"""Programs of a small launch that begins early; with 2048 rows of Qwen1.5-MoE a block took 2 us longer so."""


def choose_mode() -> None:
    """
    Without a CUDA device, have kernels interpreted.

    Triton decides when it is imported, and other libraries import it early: it is then imported anew. What others hold
    of the former copy stays as it was.
    """
    if torch.cuda.is_available() or os.environ.get(INTERPRET) == "1":
        return
    os.environ[INTERPRET] = "1"
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        if not name.startswith("triton._C"):  # a compiled extension is loaded once in a process
            del sys.modules[name]


def interpreting() -> bool:
    """Say whether kernels run as Python over numpy arrays."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def has_triton() -> bool:
    """Say whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> int:
    """Compute capability that Triton decides for: what it is told, or the device's; of the interpreter, Hopper's."""
    from triton import knobs

    told = knobs.runtime.override_arch
    if told:
        return int(told.removeprefix("sm"))
    if device.type != "cuda":
        return HOPPER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=16)
def ptx_of(device: torch.device) -> int:
    """Say how much of the GPU's own language kernels on a device may speak, one of the three above."""
    return NO_PTX if interpreting() else ptx_for(arch_of(device))


def ptx_for(arch: int) -> int:
    """Say the same of a compute capability, times ten."""
    return HOPPER_PTX if arch == HOPPER else ANY_PTX


def overlap(device: torch.device, programs: int = 1) -> dict[str, bool]:
    """
    Options of a launch that may begin while the one before it ends: its kernel waits (`kernels_chain`).

    More than MOST_EARLY `programs` would crowd on the SMs that are done first, and begin after the last.
    """
    return {"launch_pdl": True} if ptx_of(device) == HOPPER_PTX and programs <= MOST_EARLY else {}


@lru_cache(maxsize=16)
def programs_at_once(device: torch.device) -> int:
    """SMs of a device; the interpreter runs one program at a time."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
