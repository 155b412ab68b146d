"""Finding experts in a tree of modules, by their structure: stacks of 3-D parameters, lists of MLPs, shared MLPs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mxmoe.errors import RefusedFamily
from mxmoe.frontend.families import refusal_of

_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_SHARED = re.compile(r"shared|share_expert", re.IGNORECASE)

LOOKED_FOR = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of a stack of experts."""


@dataclass(frozen=True)
class Naming:
    """How an MLP of `nn.Linear` names them."""

    gate: str | None
    """None: no gate, or gate and up are one linear."""
    up: str
    down: str
    is_fused: bool = False
    """`up` holds the rows of the gate, then the rows of up."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears, in the order of roles."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


NAMINGS = (
    Naming("gate_proj", "up_proj", "down_proj"),
    Naming("w1", "w3", "w2"),  # Mixtral as first published
    Naming("wi_0", "wi_1", "wo"),  # T5 with a gate
    Naming(None, "gate_up_proj", "down_proj", is_fused=True),
    Naming(None, "input_linear", "output_linear", is_fused=True),  # Granite
    Naming(None, "up_proj", "down_proj"),
    Naming(None, "wi", "wo"),  # T5, Switch
    Naming(None, "fc1", "fc2"),  # NLLB
)
"""Known namings; one fits if the linears of the module are exactly these and their sizes form an MLP."""


def naming_of(module: nn.Module) -> Naming | None:
    """Give the naming that fits an MLP; None if the module is no MLP of linears that is known."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    return next((n for n in NAMINGS if set(n.linears) == set(linears) and _is_mlp(n, linears)), None)


def _is_mlp(naming: Naming, linears: Mapping[str, nn.Linear]) -> bool:
    up, down = linears[naming.up], linears[naming.down]
    gate = up if naming.gate is None else linears[naming.gate]
    width = up.out_features // 2 if naming.is_fused else up.out_features
    return (
        down.in_features == width
        and down.out_features == up.in_features
        and (gate.in_features, gate.out_features) == (up.in_features, up.out_features)
    )


def is_stack(module: nn.Module) -> bool:
    """Whether the module itself holds 3-D parameters down_proj and gate_up_proj or up_proj: all experts in one."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return "down_proj" in own and ("gate_up_proj" in own or "up_proj" in own)


def entries_of(module: nn.Module) -> Sequence[nn.Module]:
    """Give the modules with weights in a list or dictionary of modules, in order; empty for anything else."""
    held = module.children() if isinstance(module, nn.ModuleList | nn.ModuleDict) else ()
    return tuple(entry for entry in held if any(True for _ in entry.parameters()))


def _is_called_experts(path: str, module: nn.Module) -> bool:
    return bool(_EXPERTS.search(path.rpartition(".")[2]) or _EXPERTS.search(type(module).__name__))


def _is_list(path: str, module: nn.Module) -> bool:
    entries = entries_of(module)
    return bool(entries) and (not path or _is_called_experts(path, module)) and all(map(naming_of, entries))


@dataclass(frozen=True)
class Site:
    """A place in the tree with MLP weights."""

    path: str
    module: nn.Module
    form: Literal["stack", "list", "mlp"]
    is_shared: bool
    """Its name says that every token takes it."""

    @property
    def parent(self) -> str:
        """Path of the module that holds it; a site at the root is its own parent."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Survey:
    """Everything found in a tree."""

    sites: tuple[Site, ...]
    """Stacks, lists and MLPs, in module order; nothing within a site is a site."""
    lookalikes: tuple[tuple[str, nn.Module], ...]
    """Modules that are called experts and hold weights, in a structure that is not known."""


def survey(root: nn.Module) -> Survey:
    """
    Walk a tree of modules in order and sort what holds MLP weights.

    Raises:
        RefusedFamily: a family that is known and not supported is in the tree.
    """
    sites: list[Site] = []
    suspects: list[tuple[str, nn.Module]] = []
    for path, module in _outside(root, sites):
        reason = refusal_of(module)
        if reason:
            raise RefusedFamily(cls=type(module).__name__, path=path, reason=reason)
        is_shared = bool(_SHARED.search(path.rpartition(".")[2]))
        if is_stack(module):
            sites.append(Site(path, module, "stack", is_shared))
        elif _is_list(path, module):
            sites.append(Site(path, module, "list", is_shared))
        elif naming_of(module):
            sites.append(Site(path, module, "mlp", is_shared))
        elif _is_suspect(path, module):
            suspects.append((path, module))
    banks = [site.path for site in sites if site.form != "mlp"]
    lookalikes = tuple(s for s in suspects if not any(_within(path, s[0]) for path in banks))
    # an MLP in a list of experts that is not understood is no dense MLP
    apart = tuple(s for s in sites if not any(_within(s.path, path) for path, _ in lookalikes))
    return Survey(apart, lookalikes)


def _within(path: str, prefix: str) -> bool:
    return path == prefix or not prefix or path.startswith(prefix + ".")


def _outside(root: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, nn.Module]]:
    """All modules that are not within a site; sites may be added while walking."""
    for path, module in root.named_modules():
        # module order is depth first: only the last site can hold the next module
        if not sites or not _within(path, sites[-1].path):
            yield path, module


def _is_suspect(path: str, module: nn.Module) -> bool:
    has_stack = any(p.dim() >= 3 for p in module.parameters(recurse=False))
    return _is_called_experts(path, module) and (has_stack or bool(entries_of(module)))
