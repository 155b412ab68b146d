"""
The GPU backend's seat: plans for it can be made, costed and saved; this build has no kernels to run them.

What is declared here is what the kernels will have to run: the schemes whose matrix units exist on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mxmoe.errors import NoKernels, UnknownName
from mxmoe.ir import ModuleOp, Scheme
from mxmoe.registry import near_names
from mxmoe.target import TARGETS, Executable, WeightSource

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
        """Say whether the machine has matrix units for this scheme; weights are decoded to the activations' type."""
        return scheme.act_format != "int" or scheme.act_bits > 4 or HAS_INT4[self.capability]

    def ready(self) -> None:
        """
        Refuse: there are no kernels in this build.

        Raises:
            NoKernels: always; the message names the targets that run.
        """
        runnable = ", ".join(sorted(name for name, target in TARGETS.items() if target.backend != self.name))
        raise NoKernels(backend=self.name, runnable=runnable)

    def compile(self, module: ModuleOp, weights: WeightSource) -> Mapping[str, Executable]:
        """Refuse, as `ready` does."""
        del module, weights
        self.ready()
        return {}
