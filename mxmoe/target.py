"""Targets: which backend runs a plan, which device it is costed for, and the protocols that a backend follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mxmoe.errors import UnknownName
from mxmoe.ir import ModuleOp, Scheme
from mxmoe.registry import Registry, near_names

if TYPE_CHECKING:  # torch is for those who run; a target is only a row of names
    from torch import Tensor


@dataclass(frozen=True)
class Target:
    """One row of `TARGETS`: what `mxmoe.compile(..., target=NAME)` means."""

    name: str
    backend: str
    """Name in `BACKENDS`."""
    device: str
    """Name of the Device row that costs are taken for."""
    options: Mapping[str, str]
    """Passed to the backend, e.g. the compute capability."""
    candidates: tuple[str, ...]
    """Schemes to choose from when the caller names none."""


_WEIGHT_ONLY = ("w2a16_g128_asym", "w3a16_g128_asym", "w4a16_g128_asym")
_ADA = ("w4a4_g128_sym", "w4a8_g128_sym", "w8a8_sym")
_HOPPER = ("w4a8_g128_sym", "w4a8_g128_sym_iscale", "w8a8_sym", "w8a8_e4m3")

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        # The CPU backends are the reference for plans made for the RTX 4090, so they are costed as one.
        Target("eager", "eager", "rtx4090", {}, (*_WEIGHT_ONLY, *_ADA)),
        Target("numba", "numba", "rtx4090", {}, (*_WEIGHT_ONLY, *_ADA)),
        Target("triton-sm89", "triton", "rtx4090", {"capability": "89"}, (*_WEIGHT_ONLY, *_ADA)),
        Target("triton-sm90", "triton", "h200", {"capability": "90"}, (*_WEIGHT_ONLY, *_HOPPER)),
    )
}

BACKENDS = Registry(
    kind="backend",
    group="mxmoe.backends",
    table={
        "eager": "mxmoe.backends.eager:EagerBackend",
        "numba": "mxmoe.backends.numba:NumbaBackend",
        "triton": "mxmoe.backends.triton:TritonBackend",
    },
)


def find_target(name: str) -> Target:
    """
    Look a target up by name.

    Raises:
        UnknownName: there is no such target; the message has the nearest names.
    """
    if not isinstance(name, str) or name not in TARGETS:  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may not check
        raise UnknownName(kind="target", name=name, near=near_names(str(name), TARGETS))
    return TARGETS[name]


class WeightSource(Protocol):
    """Where a backend gets weights: dense tensors by name, and quantized ones by name, expert and scheme."""

    def __getitem__(self, name: str) -> Tensor:
        """Dense weights [experts, n, k], or a bias [experts, n]."""
        ...

    def quantized(self, name: str, expert: int, scheme: Scheme) -> Any:  # noqa: ANN401  # quant.Quantized; a target knows no torch
        """Give one expert's weight [n, k] in the given scheme: a `mxmoe.quant.Quantized`."""
        ...


class Executable(Protocol):
    """A compiled block."""

    def __call__(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Run one bank of the block.

        Args:
            bank: `routed` or `shared`; a shared bank takes index 0 and weight 1.
            hidden: [tokens, hidden].
            top_k_index: [tokens, top_k] int64; an index equal to the number of experts is padding.
            top_k_weights: [tokens, top_k].

        Returns:
            [tokens, hidden], in the dtype of `hidden`.
        """
        ...

    def packed(self, name: str, expert: int) -> Any:  # noqa: ANN401  # quant.Packed; a target knows no torch
        """Give one expert's weight back, packed, for a checkpoint: a `mxmoe.quant.Packed`."""
        ...

    def bias(self, name: str) -> Tensor:
        """Give a bias [experts, n] back, for a checkpoint."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales, zero points and biases held."""
        ...


class Backend(Protocol):
    """Turns a module into something that runs."""

    name: str

    def __init__(self, **options: str) -> None: ...

    def ready(self) -> None:
        """Raise, before any long work, if this machine or this build cannot run the backend."""
        ...

    def supports(self, scheme: Scheme) -> bool:
        """Say whether a linear can run in this scheme."""
        ...

    def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, Executable]:
        """Compile every block of a module: block name -> executable."""
        ...


class Kernel(Protocol):
    """A kernel that was compiled ahead of any call."""

    @property
    def arch(self) -> int:
        """Compute capability that it is for, times ten."""
        ...

    @property
    def cubin(self) -> bytes:
        """Machine code."""
        ...

    @property
    def calls(self) -> tuple[str, ...]:
        """Calls that launch it: block and number of tokens."""
        ...

    def facts(self) -> Any:  # noqa: ANN401  # cubin.CubinFacts; a target knows no Triton
        """Read registers, spills, shared memory and instructions from the machine code."""
        ...

    def to_bytes(self) -> bytes:
        """Write it for a checkpoint."""
        ...


@runtime_checkable
class CompilesAhead(Protocol):
    """A backend whose kernels can be compiled where they cannot run."""

    @property
    def carries(self) -> bool:
        """Whether modules carry kernels without being asked to: those of a GPU that is not here."""
        ...

    def notice(self) -> str:
        """Say how modules run on this machine, if not as the target does; else nothing."""
        ...

    def compile_ahead(self, module: ModuleOp, tokens: Sequence[int], *, quiet: bool) -> Mapping[str, Kernel]:
        """Compile what calls of a lowered module with so many tokens launch: name -> kernel."""
        ...

    def revive(self, stored: Mapping[str, bytes]) -> Mapping[str, Kernel]:
        """Undo `Kernel.to_bytes` for kernels by name, and have calls use them where they can run."""
        ...
