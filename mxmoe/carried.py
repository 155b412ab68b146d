"""What a compiled module carries: packed experts, kernels for a GPU that need not be here, and how it runs here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxmoe.ir import GroupGemmOp, ModuleOp, Scheme, moe_ops, parse_ir
from mxmoe.quant import Packed, PackedWeights
from mxmoe.target import Backend, CompilesAhead, Executable, Kernel, Target

_PARTS = ("payload", "scale", "zero", "multipliers")
_KERNEL = "kernel/"
_LOG = logging.getLogger("mxmoe")


@dataclass(frozen=True)
class Carried:
    """Kernels that are compiled already, and what to say of a module that runs otherwise than its target would."""

    notice: str = ""
    """Why the module does not run as its target says; empty where it does."""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    """Function and number -> kernel."""

    def __str__(self) -> str:
        if not self.kernels:
            return self.notice
        size = sum(len(one.cubin) for one in self.kernels.values()) / 1024
        archs = ", ".join(sorted({f"sm_{one.arch}" for one in self.kernels.values()}))
        held = f"carries {len(self.kernels)} kernels for {archs}, {size:,.0f} KiB"
        return "; ".join(filter(None, (self.notice, held)))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Kernels as bytes, by key."""
        for name, kernel in self.kernels.items():
            yield f"{_KERNEL}{name}", torch.frombuffer(bytearray(kernel.to_bytes()), dtype=torch.uint8)


def carry(backend: Backend, target: Target, module: ModuleOp, tokens: Sequence[int] | None, usual: Sequence[int],
          *, quiet: bool) -> Carried:  # fmt: skip
    """
    Compile what calls of a lowered module will launch, where the backend can, and log how the module runs here.

    Args:
        backend: that of the target.
        target: what the module was compiled for.
        module: lowered.
        tokens: of each call; None takes `usual` where the GPU of the target is not here, and else none.
        usual: numbers of tokens that the module was compiled for.
        quiet: no progress bar.

    Raises:
        AheadFailed: the compiler refuses a kernel.
    """
    if not isinstance(backend, CompilesAhead):
        return Carried()
    wanted = (usual if backend.carries else ()) if tokens is None else tokens
    notice = backend.notice()
    if notice:
        _LOG.warning("%s %s", target.name, notice)
    return Carried(notice, backend.compile_ahead(module, wanted, quiet=quiet) if wanted else {})


def revive(backend: Backend, tensors: Mapping[str, Tensor], *, is_same: bool) -> Carried:
    """
    Undo `Carried.tensors` on the machine where the module is loaded; kernels of another target are left out.

    Raises:
        BrokenCheckpoint: what lies there is no kernel.
    """
    if not isinstance(backend, CompilesAhead):
        return Carried()
    stored = {key.removeprefix(_KERNEL): t.numpy().tobytes() for key, t in tensors.items() if key.startswith(_KERNEL)}
    return Carried(backend.notice(), backend.revive(stored) if is_same else {})


def expert_tensors(lowered: str, executables: Mapping[str, Executable]) -> Iterator[tuple[str, Tensor]]:
    """Give every packed matrix and bias that the executables of a lowered module hold, by key."""
    for block, gemm, schemes in gemms_in(parse_ir(lowered)):
        executable = executables[block]
        for name in gemm.weights:
            for expert in range(len(schemes)):
                packed = executable.packed(name, expert)
                for part in _PARTS:
                    if (tensor := getattr(packed, part)) is not None:
                        yield f"packed/{name}/{expert}/{part}", tensor
        for name in gemm.biases:
            yield f"bias/{name}", executable.bias(name)


def packed_weights(module: ModuleOp, tensors: Mapping[str, Tensor]) -> PackedWeights:
    """Undo `expert_tensors`."""
    packed = {
        name: [
            Packed(scheme, gemm.n, gemm.k, *(tensors.get(f"packed/{name}/{expert}/{part}") for part in _PARTS))  # pyright: ignore[reportArgumentType]
            for expert, scheme in enumerate(schemes)
        ]
        for _, gemm, schemes in gemms_in(module)
        for name in gemm.weights
    }
    biases = {key.removeprefix("bias/"): tensor for key, tensor in tensors.items() if key.startswith("bias/")}
    return PackedWeights(packed, biases)


def gemms_in(module: ModuleOp) -> Iterator[tuple[str, GroupGemmOp, list[Scheme]]]:
    """Give every group GEMM of a lowered module with its block and the scheme of each expert."""
    for moe in moe_ops(module):
        for gemm in (op for op in moe.body.block.ops if isinstance(op, GroupGemmOp)):
            assert gemm.choice is not None, "the verifier demands a choice of a lowered block"
            yield moe.block, gemm, [moe.candidates[index] for index in gemm.choice.array.tolist()]
