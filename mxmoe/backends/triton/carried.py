"""
Kernels that a compiled module carries: compiled for a GPU that need not be here, kept with it, put where Triton looks.

Triton keeps what it compiles in a cache on disk, under a hash of source, arguments, options and versions. A kernel
knows its key: on another machine `install` puts it into the cache there, and a call that asks for the same key finds
it. What was made by another version of Triton or of ours has another key and is never found, which is as it should be.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from triton.runtime.cache import get_cache_manager

from mxmoe.backends.triton.ahead import Binary
from mxmoe.backends.triton.mode import HOPPER
from mxmoe.errors import AheadFailed, BrokenCheckpoint


@dataclass(frozen=True)
class Kernel(Binary):
    """A kernel that calls of some blocks launch."""

    calls: tuple[str, ...] = ()
    """Which: block and number of tokens."""
    key: str = ""
    """Under which Triton looks for it."""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What Triton keeps beside it."""

    def to_bytes(self) -> bytes:
        """Write as a line of JSON and the machine code."""
        head = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "cubin"}
        return json.dumps(head).encode() + b"\n" + self.cubin

    @classmethod
    def from_bytes(cls, data: bytes) -> Kernel:
        """
        Undo `to_bytes`.

        Raises:
            BrokenCheckpoint: the bytes are no kernel.
        """
        head, _, cubin = data.partition(b"\n")
        try:
            fields: dict[str, Any] = json.loads(head)
            calls: Any = tuple(fields.pop("calls"))
            return cls(**fields, calls=calls, cubin=cubin)
        except (ValueError, TypeError, KeyError) as error:
            raise BrokenCheckpoint(what="a kernel", reason=str(error)) from error


@dataclass(frozen=True)
class Job:
    """What is to be compiled: the launches of some calls."""

    module: str
    """Text of the lowered module."""
    tokens: tuple[int, ...]
    """Of each call."""
    arch: int
    """Compute capability times ten."""


def compile_calls(job: Job, *, quiet: bool = False) -> Mapping[str, Kernel]:
    """
    Compile, in a process of its own, everything that calls of a module launch: name -> kernel.

    Equal kernels are compiled once, on all cores; what Triton has in its cache is not compiled again. Tiles are chosen
    by the rule of the capability; on sm_90 as an H200 chooses them, the divided kernel where it takes a launch.

    Raises:
        AheadFailed: the compiler refuses a kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "job", Path(folder) / "kernels"
        given.write_bytes(pickle.dumps(job))
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            # where it is set no measured tiles count; the rehearsal stands for sm_90 without it
            "TRITON_OVERRIDE_ARCH": "" if job.arch == HOPPER else f"sm{job.arch}",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-m", "mxmoe.backends.triton.rehearsal", str(given), str(made)]
        with (
            open(Path(folder) / "errors", "w+", encoding="utf-8") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
        ):
            assert child.stdout is not None, "a pipe was asked for"
            _show(child.stdout, job.arch, quiet=quiet)
            if child.wait():
                errors.seek(0)
                raise AheadFailed(kernel="a call", arch=job.arch, reason=errors.read().strip()[-2000:])
        return pickle.loads(made.read_bytes())


def _show(lines: Iterator[str], arch: int, *, quiet: bool) -> None:
    """Follow what the child prints with a bar."""
    with tqdm(desc=f"kernels for sm_{arch}", unit="kernel", disable=quiet) as bar:
        for line in lines:
            word, _, number = line.partition(" ")
            if word == "total":
                bar.total = int(number)
                bar.refresh()
            elif word.strip() == "done":
                bar.update()


def install(kernels: Sequence[Kernel]) -> None:
    """Put kernels into Triton's cache on disk, where calls that launch them find them."""
    for kernel in kernels:
        cache, stem = get_cache_manager(kernel.key), kernel.name[:150]
        parts = {
            f"{stem}.cubin": (kernel.cubin, True),
            f"{stem}.ptx": (kernel.ptx, False),
            f"{stem}.json": (json.dumps(dict(kernel.metadata)), False),
        }
        group = {name: cache.put(data, name, binary=is_binary) for name, (data, is_binary) in parts.items()}
        cache.put_group(f"{stem}.json", group)
