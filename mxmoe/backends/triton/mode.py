"""Whether kernels run on a GPU or in Triton's interpreter: decided once, before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache

import torch

INTERPRET = "TRITON_INTERPRET"


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
def programs_at_once(device: torch.device) -> int:
    """SMs of a device; the interpreter runs one program at a time."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
