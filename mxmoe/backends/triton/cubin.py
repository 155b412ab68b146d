"""
What a compiled kernel is made of, read from its machine code: no GPU is needed, and nothing is estimated.

`read_cubin` asks cuobjdump, which comes with Triton; `occupancy` counts the programs that fit one multiprocessor.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from triton import knobs

from mxmoe.errors import BrokenCubin, MissingTool, UnknownName
from mxmoe.registry import near_names


@dataclass(frozen=True)
class Limits:
    """What the programs on one multiprocessor share."""

    shared_kb: int
    """Shared memory of all its programs together, KiB."""
    warps: int
    programs: int


LIMITS: Mapping[int, Limits] = MappingProxyType(
    {80: Limits(164, 64, 32), 86: Limits(100, 48, 16), 89: Limits(100, 48, 24), 90: Limits(228, 64, 32)}
)
"""Compute capability -> limits (CUDA C++ Programming Guide, technical specifications per compute capability)."""
REGISTERS = 65536
"""32-bit registers of one multiprocessor, for every capability in `LIMITS`."""
LARGEST_PROGRAM_BYTES: Mapping[int, int] = MappingProxyType(
    {arch: (limits.shared_kb - 1) * 1024 for arch, limits in LIMITS.items()}
)
"""Compute capability -> shared memory that one program may ask for: all but the reserved KiB; 99 KiB on 89."""

RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes of every program."""
_SHARED_STEP, _REGISTER_STEP, _PARTITIONS = 128, 256, 4

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_ARCH = re.compile(r"code for sm_(\d+)")


@dataclass(frozen=True)
class CubinFacts:
    """Resources and instructions of one kernel; `facts.count("HMMA")` counts its mma.sync on 16-bit floats."""

    arch: int
    """Compute capability that the machine code is for, times ten."""
    registers: int
    """32-bit registers of a thread."""
    stack_bytes: int
    """Local memory of a thread: spilled registers and arrays that no register holds."""
    shared_bytes: int
    """Shared memory of a program, static and dynamic, without what the system reserves."""
    instructions: Mapping[str, int] = field(repr=False)
    """Opcode with its modifiers, e.g. `IMMA.16832.S8.S8.SAT` -> how often it stands in the code."""

    def count(self, stem: str) -> int:
        """Count instructions by their first parts: "IMMA" and "IMMA.16832.S8.S8" both take IMMA.16832.S8.S8.SAT."""
        return sum(n for opcode, n in self.instructions.items() if f"{opcode}.".startswith(f"{stem}."))

    @property
    def spill_loads(self) -> int:
        """Loads from local memory; on a kernel without local arrays each is a register that did not fit."""
        return self.count("LDL")

    @property
    def spill_stores(self) -> int:
        """Stores to local memory."""
        return self.count("STL")


def read_cubin(cubin: bytes, *, dynamic_shared_bytes: int = 0) -> CubinFacts:
    """
    Read one kernel's resources and count its instructions.

    `dynamic_shared_bytes` is what the launch asks for; it is not in the machine code.

    Raises:
        MissingTool: no cuobjdump.
        BrokenCubin: the bytes are no cubin.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_tool("cuobjdump"), "-res-usage", "-sass", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    usage, arch = _USAGE.search(text), _ARCH.search(text)
    if done.returncode or usage is None or arch is None:
        raise BrokenCubin(size=len(cubin), reason=(text.strip() or "no code in it").splitlines()[-1])
    registers, stack, static = map(int, usage.groups())
    capability = int(arch[1])
    # from sm_90 on the tool counts the reserved memory as the kernel's own
    static -= RESERVED_SHARED_BYTES if capability >= 90 else 0
    instructions = Counter(_INSTRUCTION.findall(done.stdout))
    return CubinFacts(capability, registers, stack, static + dynamic_shared_bytes, MappingProxyType(instructions))


def occupancy(facts: CubinFacts, num_warps: int) -> int:
    """
    Count the programs of `num_warps` warps that one multiprocessor holds at once; 0 where not even one fits.

    Registers are given out to warps in steps of 256, a quarter of them in each of four partitions; shared memory to
    programs in steps of 128 bytes, beside the KiB that the system reserves of each. 128 registers a thread, 4 warps
    and 40 KiB on sm_89: 4 by registers, 2 by shared memory, 12 by warps -> 2.

    Raises:
        UnknownName: no limits are known for the capability of the machine code.
    """
    limits = find_limits(facts.arch)
    per_warp = -(-facts.registers * 32 // _REGISTER_STEP) * _REGISTER_STEP
    by_registers = REGISTERS // _PARTITIONS // per_warp * _PARTITIONS if per_warp else limits.warps
    shared = -(-(facts.shared_bytes + RESERVED_SHARED_BYTES) // _SHARED_STEP) * _SHARED_STEP
    return min(
        limits.programs,
        min(limits.warps, by_registers) // num_warps,
        limits.shared_kb * 1024 // shared,
    )


def find_limits(arch: int) -> Limits:
    """
    Look up the limits of a compute capability, e.g. `find_limits(89)`.

    Raises:
        UnknownName: a capability that this backend does not compile for.
    """
    if arch not in LIMITS:
        raise UnknownName(kind="compute capability", name=str(arch), near=near_names(str(arch), map(str, LIMITS)))
    return LIMITS[arch]


def _tool(name: str) -> str:
    try:
        return getattr(knobs.nvidia, name).path
    except RuntimeError as error:
        raise MissingTool(tool=name, variable=f"TRITON_{name.upper()}_PATH") from error
