"""
What a call launches on a GPU that is not here: the call is rehearsed with a driver that launches nothing.

The launches are those of `executable.py` themselves, of blocks that hold no weights, so that what is compiled is what a
GPU would ask for, to the last bit of Triton's keys. Run as a program, in a process that does not interpret:

    TRITON_INTERPRET=0 TRITON_OVERRIDE_ARCH=sm89 python -m mxmoe.backends.triton.rehearsal JOB RESULT

For sm_90 the variable stays empty, and tiles are those that were measured on its GPU in `GPUS`.

JOB is a pickled `Job`; RESULT will be pickled `carried.Kernel`s. Writes `done` for every kernel that is compiled, and
once `total N`.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

from mxmoe.backends.triton import choose_ada
from mxmoe.backends.triton.backend import Outline
from mxmoe.backends.triton.carried import Job, Kernel
from mxmoe.backends.triton.executable import TritonExecutable
from mxmoe.backends.triton.mode import HOPPER
from mxmoe.backends.triton.tuned import for_device
from mxmoe.ir import MoeOp, banks, moe_ops, parse_ir

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
"""Type of tokens in the text of a module -> torch's."""
GPUS = {HOPPER: "NVIDIA H200"}
"""Capability -> the GPU that is rehearsed, as CUDA names it, where there are measured tiles."""


class Nowhere:
    """Triton's driver of a GPU that is not here."""

    def __init__(self, arch: int) -> None:
        """Stand for a GPU of a compute capability, times ten."""
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return device


@dataclass
class Launches:
    """Every kernel that was asked for, in order, with the calls that did."""

    call: str = ""
    """What is being rehearsed."""
    found: dict[int, tuple[str, Any, list[str]]] = field(default_factory=dict)
    """By identity: name of the function, the kernel or its future, calls."""

    def note(self, name: str, kernel: Any) -> None:  # noqa: ANN401  # Triton's, or its future
        """Add a launch."""
        calls = self.found.setdefault(id(kernel), (name, kernel, []))[2]
        if self.call not in calls:
            calls.append(self.call)

    def kernels(self) -> Iterator[tuple[str, Kernel]]:
        """Name and describe each, once it is compiled: `group_gemm.0`, `group_gemm.1`, .."""
        counts: dict[str, int] = {}
        for name, future, calls in self.found.values():
            kernel = future.result() if hasattr(future, "result") else future
            number = counts.setdefault(name, 0)
            counts[name] += 1
            yield f"{name}.{number}", describe(kernel, tuple(calls))


def describe(kernel: Any, calls: tuple[str, ...]) -> Kernel:  # noqa: ANN401  # Triton's
    """Take what is worth keeping of a kernel that Triton has compiled."""
    meta, group = kernel.metadata, kernel.metadata_group
    text = next(Path(path).read_text() for name, path in group.items() if name.endswith(".json"))
    arch = int(meta.target.arch)
    return Kernel(
        meta.name, arch, meta.num_warps, meta.shared, kernel.asm["cubin"], kernel.asm["ptx"],
        calls=calls, key=kernel.hash, metadata=json.loads(text),
    )  # fmt: skip


@contextmanager
def rehearsing(arch: int, launches: Launches) -> Generator[None]:
    """Let every launch compile only, on all cores, and note it."""
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ANN401  # as Triton's
        del warmup
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        launches.note(kernel.fn.__name__, made)
        return made

    knobs.compilation.listener = lambda **_: _say("done")
    driver.set_active(Nowhere(arch))  # pyright: ignore[reportArgumentType]  # as much of a driver as compiling takes
    setattr(JITFunction, "run", compile_only)  # noqa: B010  # not what the type checker takes for one
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
            yield
            _say(f"total {len(launches.found)}")
    finally:
        JITFunction.run = run


@contextmanager
def standing_in(arch: int) -> Generator[None]:
    """Choose tiles as the GPU of `GPUS` would: measured ones where they hold, and those of the divided kernel."""
    if arch not in GPUS:
        yield
        return
    stand_in = {"tuned_for": lambda _device: for_device(GPUS[arch]), "_divides": lambda _device: True}
    real = {name: getattr(choose_ada, name) for name in stand_in}
    for name, function in stand_in.items():
        setattr(choose_ada, name, function)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(choose_ada, name, function)


def rehearse(job: Job) -> Mapping[str, Kernel]:
    """Rehearse calls of every block with every number of tokens, and give what they launch."""
    launches, module = Launches(), parse_ir(job.module)
    with rehearsing(job.arch, launches), standing_in(job.arch):
        for moe in moe_ops(module):
            executable = Outline(moe, torch.device("cpu")).block()
            for tokens in job.tokens:
                launches.call = f"{moe.block} with {tokens} tokens"
                _call(moe, executable, tokens)
    return dict(launches.kernels())


def _call(moe: MoeOp, executable: TritonExecutable, tokens: int) -> None:
    """Call a block with tokens that have no values: together where banks are joined, else bank by bank."""
    dtype = DTYPES[str(moe.body.block.args[0].type.element_type)]  # pyright: ignore[reportAttributeAccessIssue]
    hidden, found = torch.zeros((tokens, executable.hidden), dtype=dtype), banks(moe)
    routing = {
        name: (torch.zeros((tokens, bank.top_k), dtype=torch.int64), torch.zeros((tokens, bank.top_k), dtype=dtype))
        for name, bank in found.items()
    }
    if executable.joins(tokens):
        executable.run_block(hidden, *routing["routed"])
        return
    for name in found:
        executable(name, hidden, *routing[name])


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _main(job: str, result: str) -> None:
    # by its name, not __main__: the parent unpickles the classes of the module that it knows
    own = importlib.import_module("mxmoe.backends.triton.rehearsal")
    kernels = own.rehearse(pickle.loads(Path(job).read_bytes()))
    Path(result).write_bytes(pickle.dumps(kernels))


if __name__ == "__main__":
    _main(*sys.argv[1:])
