"""
The GPU backend: one grouped launch for experts of any mix of schemes, from a tile schedule built on the device.

`layout` packs, `dispatch` and `schedule` say which program runs what, `launch` strings the launches of a call
together and `executable` holds a block. The product itself is one of two: `kernels` with the `bodies` of every
scheme, on any GPU; or the divided kernel of sm_90, `hopper` and `kernels_hopper*`; experts on INT4 units of sm_80 to
sm_89 have `native`. Which of them, in which tiles, is for `choose_ada` with what `tune` has measured; `profile`
measures costs. `carried` and `rehearsal` compile for a GPU that is not here. Nothing imports Triton before `compile`:
without a GPU it must be told to interpret first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.mode import choose_mode, has_triton
from mxmoe.errors import NoGpu, NoKernels, NotLowered, UnknownName, UnsupportedScheme, WrongCapability
from mxmoe.ir import ModuleOp, MoeOp, Scheme, banks, moe_ops, print_ir
from mxmoe.registry import near_names
from mxmoe.target import TARGETS, Executable, Kernel, Target, WeightSource

__all__ = ["HAS_INT4", "TritonBackend", "bench_tiles", "profile_launches", "profiled_launches"]

HAS_INT4 = {
    "89": True,
    # Hopper has no 4-bit integer matrix unit: emulating it costs more than 8 bits do
    "90": False,
}
"""Compute capability -> whether its matrix units multiply 4-bit integers. All multiply 8-bit integers and e4m3."""


@dataclass(frozen=True)
class TritonBackend:
    """
    Declares what a CUDA machine of one compute capability runs.

    Raises:
        UnknownName: a capability that no plan can be made for.
    """

    capability: str = "89"
    """`89` for Ada, `90` for Hopper."""

    name = "triton"

    def __post_init__(self) -> None:
        if self.capability not in HAS_INT4:
            near = near_names(self.capability, HAS_INT4)
            raise UnknownName(kind="compute capability", name=self.capability, near=near)

    def supports(self, scheme: Scheme) -> bool:
        """Say whether a kernel multiplies this scheme, on matrix units that the machine has."""
        return body_of(scheme) is not None and (scheme.act_bits > 4 or HAS_INT4[self.capability])

    def ready(self) -> None:
        """
        Say no if this machine cannot run the kernels: before Triton is imported, so that it may be interpreted.

        Raises:
            NoKernels: Triton is not installed.
            WrongCapability: the GPU has another compute capability.
        """
        if not has_triton():
            runnable = ", ".join(sorted(name for name, target in TARGETS.items() if target.backend != self.name))
            raise NoKernels(backend=self.name, runnable=runnable)
        choose_mode()
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            if 10 * major + minor < int(self.capability):
                found = f"{major}.{minor}"
                able = ", ".join(name for name, one in TARGETS.items() if _runs(one, major, minor))
                raise WrongCapability(wanted=self.capability, found=found, runnable=able)

    def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, Executable]:
        """
        Quantize, pack and upload every block's weights: block name -> executable.

        Without a CUDA device the executables run in Triton's interpreter: the same kernels and results, slowly.

        Raises:
            NotLowered: a block still has linears; nothing has been packed then.
            UnsupportedScheme: an expert has a scheme that no kernel multiplies.
            BadWeightShape: a weight is not what the module says.
        """
        self.ready()
        blocks = moe_ops(module)
        for moe in blocks:
            if moe.stage != "lowered":
                missing = "allocate-bits, lower-to-group-gemm"
                raise NotLowered(backend=self.name, block=moe.block, stage=moe.stage, missing=missing)
        for moe in blocks:
            self._check_schemes(moe)
        if not torch.cuda.is_available():
            from mxmoe.backends.triton.interpreter import mend_interpreter

            mend_interpreter()
        # kernels are decorated when they are imported: only now is it known how
        from mxmoe.backends.triton.backend import compile_blocks

        return compile_blocks(blocks, weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def carries(self) -> bool:
        """See `mxmoe.target.CompilesAhead`. For a Hopper only when asked: tiles are an H200's, not those of all."""
        return not torch.cuda.is_available() and self.capability == "89"

    def notice(self) -> str:
        """See `mxmoe.target.CompilesAhead`."""
        return "" if torch.cuda.is_available() else "is interpreted here, slowly: this machine has no CUDA device"

    def compile_ahead(self, module: ModuleOp, tokens: Sequence[int], *, quiet: bool) -> Mapping[str, Kernel]:
        """
        See `mxmoe.target.CompilesAhead`; equal kernels are compiled once, on all cores, and cached by Triton.

        Raises:
            AheadFailed: the compiler refuses a kernel.
        """
        choose_mode()
        from mxmoe.backends.triton.carried import Job, compile_calls

        return compile_calls(Job(print_ir(module, elide=None), tuple(tokens), int(self.capability)), quiet=quiet)

    def revive(self, stored: Mapping[str, bytes]) -> Mapping[str, Kernel]:
        """
        See `mxmoe.target.CompilesAhead`: on a GPU they go into Triton's cache, where calls find their own.

        Raises:
            BrokenCheckpoint: what is stored is no kernel.
        """
        choose_mode()
        from mxmoe.backends.triton.carried import Kernel, install

        kernels = {name: Kernel.from_bytes(data) for name, data in stored.items()}
        if torch.cuda.is_available():
            install(list(kernels.values()))
        return kernels

    def _check_schemes(self, moe: MoeOp) -> None:
        for bank in banks(moe).values():
            for gemm in bank.gemms:
                assert gemm.choice is not None, f"{gemm.role} of {moe.block} is lowered"
                for expert, index in enumerate(gemm.choice.array.tolist()):
                    scheme = moe.candidates[index]
                    if not self.supports(scheme):
                        known = ", ".join(str(one) for one in moe.candidates if self.supports(one)) or "none of these"
                        raise UnsupportedScheme(
                            backend=f"triton-sm{self.capability}", scheme=scheme, block=moe.block, expert=expert,
                            weight=gemm.weights[0], known=known,
                        )  # fmt: skip


def bench_tiles(out: Path, measured: Path, **limits: Any) -> str:  # noqa: ANN401  # of several types
    """
    Measure tiles on the present GPU, and write the fastest to `out`; see `tune.tune`, which gets the `limits`.

    Raises:
        NoGpu: there is none.
    """
    _need_gpu("the search for tiles")
    from mxmoe.backends.triton.tune import tune

    found = tune(out, measured, **limits)
    return f"{len(found.entries)} entries for {found.device}"


def profile_launches(measured: Path, tuned: Path | None, **limits: Any) -> str:  # noqa: ANN401  # as above
    """
    Measure launches on the present GPU for a cost model; see `profile.measure`, which gets the `limits`.

    A file of tiles, if given, is told whether its entries serve mixed launches.

    Raises:
        NoGpu: there is none.
    """
    _need_gpu("a profile")
    from mxmoe.backends.triton.profile import measure

    return measure(measured, tuned, **limits)


def profiled_launches(measured: Path, tuned: Path | None) -> list[tuple[int, int, dict[Scheme, dict[int, int]], float]]:
    """Read what `profile_launches` measured; see `profile.launches`."""
    choose_mode()
    from mxmoe.backends.triton.profile import launches

    return launches(measured, tuned)


def _need_gpu(what: str) -> None:
    if not torch.cuda.is_available():
        raise NoGpu(what=what)


def _runs(target: Target, major: int, minor: int) -> bool:
    """Whether a GPU of this compute capability runs a target."""
    return target.backend != "triton" or int(target.options["capability"]) <= 10 * major + minor
