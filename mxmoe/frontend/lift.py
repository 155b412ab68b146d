"""`lift`: from a torch module to IR, weights and places; nothing of the module is changed or copied."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mxmoe.errors import NoMoeBlock, NotAModule, UnknownTopK
from mxmoe.frontend.activation import describe_activation
from mxmoe.frontend.layout import DTYPES, Layout, Loader, guarded, list_layout, stack_layout
from mxmoe.frontend.lifted import BankKind, Lifted, LiftedBank, LiftedBlock
from mxmoe.frontend.report import SkipKind, Skipped
from mxmoe.frontend.structure import Site, Survey, entries_of, survey
from mxmoe.frontend.verify import check_gate, check_mlps, check_stack
from mxmoe.ir import BankShape, BlockShape, Scheme, build_module
from mxmoe.quant import Weights

ROOT_NAME = "moe"
"""Name of the block where the root itself is the block or its experts."""

_TOP_K_OF_MODULES = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "topk", "moe_k")
_TOP_K_OF_CONFIGS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


def lift(module: nn.Module, *, candidates: Sequence[Scheme] | None = None, top_k: int | None = None) -> Lifted:
    """
    Find every MoE block in a module and describe it in the IR.

    Args:
        module: a whole model, an MoE block, or the experts of one: a module with 3-D parameters [experts, n, k] as in
            transformers 5, or a list of MLPs. Shared MLPs beside the experts become the bank `shared`.
        candidates: schemes to choose from; bf16 alone if not given.
        top_k: experts per token, where neither the block nor its router nor its config says it.

    Returns:
        The lifted module. What is read off the structure is compared with what the module computes on a few random
        tokens, unless its weights are on the meta device: those can be described, and raise MetaWeights when read.

    Raises:
        NotAModule: not a torch module.
        NoMoeBlock: nothing in it is a bank of experts.
        RefusedFamily, BadExperts, UnknownGate, UnknownActivation, UnknownTopK: experts that cannot be lifted.
        LiftMismatch: the module computes something else than its structure says.
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
        raise NotAModule(what=type(module).__name__)
    found = survey(module)
    owners = _owners(module, found)
    if not owners:
        raise NoMoeBlock(cls=type(module).__name__, found=_what_is_there(found))
    loaders: dict[str, Loader] = {}
    blocks = tuple(_lift_block(module, name, sites, top_k, loaders) for name, sites in owners.items())
    used = {site.path for sites in owners.values() for site in sites}
    ir = build_module([block.shape for block in blocks], tuple(candidates or (Scheme.parse("bf16"),)))
    return Lifted(ir, Weights(loaders), blocks, module, _skipped(blocks, found, used))


def _owners(root: nn.Module, found: Survey) -> dict[str, list[Site]]:
    """Block name -> its routed site, then its shared site; shared sites without a single owner are blocks alone."""
    routed = [site for site in found.sites if site.form != "mlp" and not site.is_shared]
    alone = {p for p in (s.parent for s in routed) if sum(s.parent == p for s in routed) == 1}
    names = {site.path: (site.parent if site.parent in alone else site.path) or ROOT_NAME for site in routed}
    owners = {names[site.path]: [site] for site in routed}
    for site in (s for s in found.sites if s.is_shared):
        beside = [r for r in routed if r.path and r.parent == site.parent]
        above = [r for r in routed if r.parent and r.parent.rpartition(".")[0] == site.parent]
        near = beside or above
        if not near:
            continue  # e.g. the MLP of a dense layer, in a model that calls it shared in its MoE layers
        group = owners[names[near[0].path]]
        if len(near) == 1 and len(group) == 1 and _hidden(near[0]) == _hidden(site):
            group.append(site)
        else:
            owners[site.path] = [site]
    order = {name: index for index, (name, _) in enumerate(root.named_modules())}
    return dict(sorted(owners.items(), key=lambda item: order[item[1][0].path]))


def _hidden(site: Site) -> int:
    return _layout(site).hidden


def _layout(site: Site) -> Layout:
    if site.form == "stack":
        extra = ("post_expert_norm",) if getattr(site.module, "has_post_expert_norm", False) else ()
        return stack_layout(site.module, site.path, extra)
    return list_layout(entries_of(site.module) if site.form == "list" else (site.module,), site.path)


def _lift_block(
    root: nn.Module, name: str, sites: Sequence[Site], top_k: int | None, loaders: dict[str, Loader]
) -> LiftedBlock:
    first = sites[0]
    block = root.get_submodule(first.parent) if first.path else first.module
    layouts = {site.path: _layout(site) for site in sites}
    banks: dict[str, LiftedBank] = {}
    for site in sites:
        layout, bank = layouts[site.path], "shared" if site.is_shared else "routed"
        taken = layout.experts if site.is_shared else top_k or _top_k(root, block, first, layout.experts)
        banks[bank] = _lift_bank(site, layout, f"{name}.{bank}", bank, taken, loaders)
    layout = layouts[first.path]
    shape = BlockShape(name, layout.hidden, tuple(bank.shape for bank in banks.values()), DTYPES[layout.dtype])
    return LiftedBlock(name, shape, block, banks)


def _lift_bank(
    site: Site, layout: Layout, prefix: str, bank: str, top_k: int, loaders: dict[str, Loader]
) -> LiftedBank:
    entries = entries_of(site.module) if site.form == "list" else (site.module,)
    act = describe_activation(entries[0], site.path)
    if site.form == "stack":
        is_concatenated = bool(getattr(site.module, "is_concatenated", True))
        check_gate(site.module, site.path, act, is_gated=layout.is_gated, is_concatenated=is_concatenated)
    if not layout.is_meta:
        if site.form == "stack":
            check_stack(site.module, site.path, layout, act, is_shared=site.is_shared)
        else:
            check_mlps(entries, site.path, act)
    weights = {role: f"{prefix}.{role}" for role in layout.weights}
    biases = {role: f"{prefix}.{role}.bias" for role in layout.biases}
    for names, held in ((weights, layout.weights), (biases, layout.biases)):
        loaders.update({name: guarded(name, held[role]) for role, name in names.items()})
    shape = BankShape(
        name=bank,
        experts=layout.experts,
        top_k=top_k,
        intermediate=layout.intermediate,
        act=act.kind,
        gated=layout.is_gated,
        weights=weights,
        biases=biases,
        act_params=act.params,
    )
    return LiftedBank(site.path, site.module, _kind(site), shape)


def _kind(site: Site) -> BankKind:
    if site.form == "list":
        return "module_list"
    if site.form == "mlp":
        return "shared"
    if site.is_shared:
        return "shared_stack"
    return "routed_norm" if getattr(site.module, "has_post_expert_norm", False) else "routed"


def _top_k(root: nn.Module, block: nn.Module, site: Site, experts: int) -> int:
    """Look at the block, then at what it holds beside the experts (the router), at the experts, then at configs."""
    modules = [block, *(child for child in block.children() if child is not site.module), site.module]
    configs = [getattr(module, "config", None) for module in (site.module, block, root)]
    holders = [(m, _TOP_K_OF_MODULES) for m in modules] + [(c, _TOP_K_OF_CONFIGS) for c in configs]
    values = (getattr(holder, name, None) for holder, names in holders for name in names)
    fitting = (v for v in values if isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= experts)
    value = next(fitting, None)
    if value is None:
        raise UnknownTopK(path=site.path)
    return value


def _skipped(blocks: Sequence[LiftedBlock], found: Survey, used: set[str]) -> tuple[Skipped, ...]:
    left = [_skip(p, m, "experts", "called experts, in a structure that is not known") for p, m in found.lookalikes]
    left += [_skip(s.path, s.module, "dense", "a dense MLP, no expert") for s in found.sites if s.path not in used]
    known = {site.module for site in found.sites} | {module for _, module in found.lookalikes}
    for block in blocks:
        path = next(iter(block.banks.values())).path
        if block.block in known:
            continue  # the experts themselves: nothing is beside them
        for name, child in block.block.named_children():
            if known.isdisjoint(child.modules()) and any(True for _ in child.parameters()):
                known.add(child)
                beside = f"{path.rpartition('.')[0]}.{name}".lstrip(".")
                left.append(_skip(beside, child, "torch", "part of the block that stays torch"))
    return tuple(left)


def _skip(path: str, module: nn.Module, kind: SkipKind, reason: str) -> Skipped:
    return Skipped(path, type(module).__name__, kind, sum(p.nbytes for p in module.parameters()), reason)


def _what_is_there(found: Survey) -> str:
    dense = [site.path or "the module itself" for site in found.sites]
    odd = [f"{path} ({type(module).__name__})" for path, module in found.lookalikes]
    lines = [f"It has {len(dense)} dense MLPs, the first at {dense[0]}."] if dense else []
    lines += [f"These are called experts, in a structure that is not known: {', '.join(odd)}."] if odd else []
    return " ".join(lines) or "It has no MLP that is known, either."
