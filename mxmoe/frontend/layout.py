"""
Canonical views of expert weights: [experts, n, k] for gate, up and down, whatever way they are stored.

transformers stores one stack per experts module, in four ways that its flags tell apart: gate and up concatenated along
the output ([gate; up]) or interleaved (gate0, up0, gate1, ...), and each matrix as [n, k] or transposed as [k, n].
All views of a stack share its storage; a list of MLPs is stacked when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mxmoe.errors import BadExperts, MetaWeights
from mxmoe.frontend.structure import Naming, naming_of
from mxmoe.ir import ROLES

Loader = Callable[[], Tensor]

DTYPES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp32",  # what its values are quantized from and multiplied in
}
"""Element types that can be lifted -> their names in the IR."""


@dataclass(frozen=True)
class Layout:
    """The weights of one bank, by role, as functions that give canonical views."""

    experts: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    weights: Mapping[str, Loader]
    """Role -> [experts, n, k]; gate is absent in experts without one."""
    biases: Mapping[str, Loader] = field(default_factory=dict[str, Loader])
    """Role -> [experts, n]."""
    parameters: tuple[nn.Parameter, ...] = ()
    """Everything that the views cover, once each."""

    @property
    def is_gated(self) -> bool:
        """Whether there is a gate beside up."""
        return "gate" in self.weights

    @property
    def is_meta(self) -> bool:
        """Whether the weights were never loaded."""
        return any(p.is_meta for p in self.parameters)

    def expert(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Give the weights [n, k] and biases [n] of one expert by role, in float32."""
        return (
            {role: load()[index].float() for role, load in self.weights.items()},
            {role: load()[index].float() for role, load in self.biases.items()},
        )


def halves(fused: Tensor, *, is_concatenated: bool) -> tuple[Tensor, Tensor]:
    """
    Split [experts, 2 * intermediate, ...] into its gate and up [experts, intermediate, ...], as views.

    Concatenated rows 0 1 2 3 give gate 0 1 and up 2 3; interleaved ones give gate 0 2 and up 1 3.
    """
    if is_concatenated:
        width = fused.shape[1] // 2
        return fused[:, :width], fused[:, width:]
    return fused[:, 0::2], fused[:, 1::2]


def stack_layout(module: nn.Module, path: str, extra: Sequence[str] = ()) -> Layout:
    """
    Read a module whose own 3-D parameters hold all experts; `extra` names parameters that are left where they are.

    Raises:
        BadExperts: shapes, element types or further parameters that the flags do not explain.
    """
    own = dict(module.named_parameters())
    is_transposed = bool(getattr(module, "is_transposed", False))
    is_concatenated = bool(getattr(module, "is_concatenated", True))

    def view(name: str) -> Tensor:
        tensor = own[name].detach()
        return tensor.transpose(1, 2) if is_transposed and tensor.dim() == 3 else tensor

    def half(name: str, which: int) -> Loader:
        return lambda: halves(view(name), is_concatenated=is_concatenated)[which]

    names = {"up": "up_proj", "down": "down_proj"}
    if "gate_up_proj" in own:
        names = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
    elif "gate_proj" in own:
        names = {"gate": "gate_proj", **names}

    def loaders(suffix: str) -> dict[str, Loader]:
        fused = {"gate": 0, "up": 1} if names["up"] == "gate_up_proj" else {}
        held = {role: name + suffix for role, name in names.items() if name + suffix in own}
        return {
            role: half(name, fused[role]) if role in fused else lambda name=name: view(name)
            for role, name in held.items()
        }

    covered = {name + suffix for name in names.values() for suffix in ("", "_bias")}
    further = [n for n in own if n not in covered and not any(n == e or n.startswith(e + ".") for e in extra)]
    if further:
        raise _bad(module, path, f"it has further parameters: {', '.join(further)}")
    parameters = tuple(p for name, p in own.items() if name in covered)
    return _checked(module, path, loaders(""), loaders("_bias"), parameters)


def list_layout(entries: Sequence[nn.Module], path: str) -> Layout:
    """
    Read a list of MLPs of one class, one per expert; a single shared MLP is a list of one.

    Raises:
        BadExperts: entries that differ, or parameters that are not in their linears.
    """
    first = entries[0]
    naming = naming_of(first)
    assert naming is not None, f"{path} holds no MLP"
    alike = {(type(e), naming_of(e), tuple((n, p.shape, p.dtype) for n, p in e.named_parameters())) for e in entries}
    if len(alike) > 1:
        raise _bad(first, path, "its entries differ in class, sizes or element types")
    known = {f"{linear}.{kind}" for linear in naming.linears for kind in ("weight", "bias")}
    further = [name for name, _ in first.named_parameters() if name not in known]
    if further:
        raise _bad(first, path, f"it has further parameters: {', '.join(further)}")

    # checked on one entry: asking for the whole bank copies it
    one = _checked(
        first,
        path,
        _linear_loaders(naming, entries[:1], "weight"),
        _linear_loaders(naming, entries[:1], "bias"),
        tuple(p for entry in entries for p in entry.parameters()),
    )
    weights, biases = (_linear_loaders(naming, entries, kind) for kind in ("weight", "bias"))
    return replace(one, experts=len(entries), weights=weights, biases=biases)


def _linear_loaders(naming: Naming, entries: Sequence[nn.Module], kind: Literal["weight", "bias"]) -> dict[str, Loader]:
    def stacked(linear: str) -> Tensor:
        tensors = [entry.get_parameter(f"{linear}.{kind}").detach() for entry in entries]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    def half(linear: str, which: int) -> Loader:
        return lambda: halves(stacked(linear), is_concatenated=True)[which]

    found: dict[str, Loader] = {}
    for role, linear in zip(ROLES[-len(naming.linears) :], naming.linears, strict=True):
        if getattr(entries[0].get_submodule(linear), kind) is None:
            continue
        if naming.is_fused and role == "up":
            found |= {"gate": half(linear, 0), "up": half(linear, 1)}
        else:
            found[role] = lambda linear=linear: stacked(linear)
    return found


def _checked(
    module: nn.Module,
    path: str,
    weights: Mapping[str, Loader],
    biases: Mapping[str, Loader],
    parameters: tuple[nn.Parameter, ...],
) -> Layout:
    dtypes = {p.dtype for p in parameters}
    dtype = parameters[0].dtype
    if dtypes != {dtype} or dtype not in DTYPES:
        named = ", ".join(sorted(str(d) for d in dtypes))
        known = ", ".join(str(d) for d in DTYPES)
        way = "convert the module with .to(torch.bfloat16); unpack a quantized model first"
        raise _bad(module, path, f"its weights are {named}; one of {known} is needed ({way})")
    shapes = {role: tuple(load().shape) for role, load in weights.items()}
    experts, hidden, intermediate = shapes["down"]
    fits = {"gate": (experts, intermediate, hidden), "up": (experts, intermediate, hidden), "down": shapes["down"]}
    if any(shape != fits[role] for role, shape in shapes.items()):
        spelled = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
        raise _bad(module, path, f"read as [experts, n, k] its weights do not fit together: {spelled}")
    if any(tuple(load().shape) != fits[role][:2] for role, load in biases.items()):
        raise _bad(module, path, "its biases do not fit its weights")
    return Layout(experts, hidden, intermediate, dtype, weights, biases, parameters)


def guarded(name: str, load: Loader) -> Loader:
    """
    Wrap a loader so that asking for weights that were never loaded says so.

    Raises:
        MetaWeights: when called, if the weights are on the meta device.
    """

    def read() -> Tensor:
        tensor = load()
        if tensor.is_meta:
            raise MetaWeights(name=name)
        return tensor

    return read


def _bad(module: nn.Module, path: str, reason: str) -> BadExperts:
    return BadExperts(cls=type(module).__name__, path=path, reason=reason)
