"""
Compiling kernels for a GPU that is not here: Triton's compiler and ptxas need none.

    binary = compile_ahead(kernel, {"x": "*bf16", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 128}, arch=89)
    binary.facts().count("HMMA.16816.F32.BF16"), occupancy(binary.facts(), binary.num_warps)

Results lie in Triton's own cache on disk, keyed by source, arguments, options and versions: compiling again costs
milliseconds. Where the process interprets kernels (`TRITON_INTERPRET=1`), whose Python then are not compilable
functions, a child process without that variable compiles them.

**A code path on another machine.** `code_path=89, arch=90` takes the compiler's decisions for sm_89 (mma.sync instead
of wgmma, cp.async, no tensor memory access) and lets ptxas translate the resulting PTX for sm_90: what an RTX 4090
would run, made to run on a Hopper. At a launch the same is asked for by a keyword,
`kernel[grid](..., **code_path_option(89))`: an option of Triton's CUDA backend, part of all its cache keys.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from mxmoe.backends.triton.cubin import CubinFacts, find_limits, read_cubin
from mxmoe.errors import AheadFailed

ALIGNMENT = 16
"""Bytes that addresses are multiples of, and that integers so marked are: what wide loads and copies need."""


Kind = str | tuple[str, ...]
"""Type of an argument, or of the parts of a tuple."""


@dataclass(frozen=True)
class Request:
    """One kernel with everything that its machine code depends on."""

    kernel: Any
    """A function decorated with `triton.jit` or `gluon.jit`."""
    signature: Mapping[str, Kind]
    """Argument, in order -> its type: `*bf16`, `*i8`, `*fp8e4nv`, `i32`, `fp32`, a tuple of these, or `constexpr`."""
    constexprs: Mapping[str, Any]
    """Value of every argument of type `constexpr`."""
    arch: int
    """Compute capability times ten that the machine code is for: 80, 86, 89 or 90."""
    num_warps: int = 4
    num_stages: int = 3
    divisible: Collection[str] | None = None
    """Arguments that are multiples of 16; None means every pointer, those in tuples too, and nothing else."""
    code_path: int | None = None
    """Compute capability whose instructions are chosen; None means that of `arch`."""
    registers: int | None = None
    """Most registers of a thread; None leaves it to the compiler."""

    @property
    def name(self) -> str:
        """Name of the kernel's function."""
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: what a launch needs to know of it, and what it was made from."""

    name: str
    """Symbol in the cubin."""
    arch: int
    num_warps: int
    shared_bytes: int
    """Dynamic shared memory that a launch asks for."""
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)

    def facts(self) -> CubinFacts:
        """
        Read the machine code.

        Raises:
            MissingTool: no cuobjdump.
        """
        return read_cubin(self.cubin, dynamic_shared_bytes=self.shared_bytes)


def compile_ahead(
    kernel: Any,  # noqa: ANN401  # triton.jit returns a JITFunction, or an InterpretedFunction where it interprets
    signature: Mapping[str, Kind],
    constexprs: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Collection[str] | None = None,
    code_path: int | None = None,
) -> Binary:
    """
    Compile one kernel for a compute capability, without a GPU; the arguments are those of `Request`.

    Raises:
        UnknownName: an unknown capability.
        AheadFailed: the compiler refuses the kernel; the message has its reason.
    """
    request = Request(kernel, signature, constexprs, arch, num_warps, num_stages, divisible, code_path)
    return compile_all([request])[0]


def compile_all(requests: Sequence[Request]) -> list[Binary]:
    """Compile many kernels, as `compile_ahead` does; a process that interprets starts one child for all of them."""
    for request in requests:
        find_limits(request.arch)
        find_limits(request.code_path or request.arch)
    if knobs.runtime.interpret or not all(isinstance(request.kernel, JITFunction) for request in requests):
        return _compile_in_child(requests)
    return [_compile(request) for request in requests]


def code_path_option(code_path: int | None) -> dict[str, str]:
    """
    Give the launch option that compiles a kernel with the instructions of another capability, `{"arch": "sm89"}`.

    None gives no option: the capability of the machine. The GPU has to be at least as new.

    Raises:
        UnknownName: an unknown capability.
    """
    if code_path is None:
        return {}
    find_limits(code_path)
    return {"arch": f"sm{code_path}"}


def _compile(request: Request) -> Binary:
    attributes = {place: [["tt.divisibility", ALIGNMENT]] for place in _aligned(request)}
    source = GluonASTSource if request.kernel.is_gluon() else ASTSource
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages, **code_path_option(request.code_path)}
    if request.registers is not None:
        options["maxnreg"] = request.registers
    try:
        made = source(request.kernel, dict(request.signature), dict(request.constexprs), attributes)
        built = triton.compile(made, target=GPUTarget("cuda", request.arch, 32), options=options)
    except Exception as error:  # whatever its passes raise: the caller needs the kernel and the reason
        raise AheadFailed(kernel=request.name, arch=request.arch, reason=_innermost(error)) from error
    meta, asm = built.metadata, built.asm
    return Binary(meta.name, request.arch, meta.num_warps, meta.shared, asm["cubin"], asm["ptx"])


def _aligned(request: Request) -> Iterator[tuple[int, ...]]:
    """Places of what is a multiple of 16: of arguments, and of parts of tuples."""
    for index, (name, kind) in enumerate(request.signature.items()):
        parts = [((index,), kind)] if isinstance(kind, str) else [((index, at), part) for at, part in enumerate(kind)]
        for place, part in parts:
            if part.startswith("*") if request.divisible is None else name in request.divisible:
                yield place


def _innermost(error: BaseException) -> BaseException:
    """Find what a chain of compilation errors, one for each function inlined, began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _compile_in_child(requests: Sequence[Request]) -> list[Binary]:
    """Compile in a process that does not interpret; kernels travel by name, all else by pickle."""
    jobs = [(_whereabouts(request), _without_kernel(request)) for request in requests]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "requests", Path(folder) / "binaries"
        given.write_bytes(pickle.dumps(jobs))
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", __name__, str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            names = ", ".join(sorted({request.name for request in requests}))
            archs = "/".join(sorted({str(request.arch) for request in requests}))
            raise AheadFailed(kernel=names, arch=archs, reason=done.stderr.strip()[-2000:])
        return pickle.loads(made.read_bytes())


def _whereabouts(request: Request) -> tuple[str, str, str]:
    """Name module, file and function of a kernel."""
    function = request.kernel.fn
    return function.__module__, inspect.getsourcefile(function) or "", function.__qualname__


def _without_kernel(request: Request) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__ if name != "kernel"}
    return {**fields, "signature": dict(request.signature), "constexprs": dict(request.constexprs)}


def _find_kernel(module: str, file: str, name: str) -> Any:  # noqa: ANN401  # as in compile_ahead
    """Import a kernel by the name of its module, or from its file where the module is on no path, as of a test."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None, f"{file=} is no Python file"
        assert spec.loader is not None, f"{file=} has no loader"
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        spec.loader.exec_module(found)
        return getattr(found, name)


def _main(given: str, made: str) -> None:
    """Compile the pickled requests of the parent."""
    jobs = pickle.loads(Path(given).read_bytes())
    # by its name, not __main__: the parent unpickles the classes of the module that it knows
    own = importlib.import_module("mxmoe.backends.triton.ahead")
    binaries = own.compile_all([own.Request(kernel=_find_kernel(*where), **fields) for where, fields in jobs])
    Path(made).write_bytes(pickle.dumps(binaries))


if __name__ == "__main__":
    _main(*sys.argv[1:])
