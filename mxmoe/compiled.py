"""What `compile` returns: a module whose experts run compiled, its plan, its text at every stage; saved and loaded."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from mxmoe.carried import Carried, expert_tensors, gemms_in, packed_weights, revive
from mxmoe.checkpoint import Checkpoint, Origin, read_checkpoint, write_checkpoint
from mxmoe.errors import (
    NeedsBlock,
    NoSuchStage,
    NotAModule,
    NotCompiled,
    NotSavedHere,
    StructureMismatch,
    UnsupportedScheme,
)
from mxmoe.frontend import BankRun, JoinedCalls, Lifted, LiftedBlock, join_calls, lift, places_of, replace_banks
from mxmoe.ir import ModuleOp, Plan, Scheme, banks, moe_ops, parse_ir
from mxmoe.registry import near_names
from mxmoe.report.compiled import CompileReport
from mxmoe.target import BACKENDS, Backend, Executable, Kernel, Target, find_target


@dataclass(frozen=True, eq=False)
class Compilation:
    """What was compiled, and how it came about."""

    target: Target
    plan: Plan
    stages: Mapping[str, str]
    """Stage -> whole text of the module at its end."""
    executables: Mapping[str, Executable]
    """Block name -> what runs it."""
    report: CompileReport
    origin: Origin | None
    """How to build the module again; None where that is not known."""
    carried: Carried = field(default_factory=Carried)
    """Kernels that were compiled ahead."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give itself: nothing in it changes, so copies of a module share it, packed weights included."""
        return self

    def ir(self, stage: str) -> str:
        """
        Return the whole text of the module at the end of a stage.

        Raises:
            NoSuchStage: the stage was not passed through, or does not exist.
        """
        if stage not in self.stages:
            raise NoSuchStage(stage=stage, near=near_names(stage, self.stages))
        return self.stages[stage]


class CompiledBank:
    """One bank of a compiled block, in the form in which a bank is put in place of its experts."""

    def __init__(
        self, executable: Executable, bank: str, joined: JoinedCalls | None = None, places: Tensor | None = None
    ) -> None:
        """Bind a bank; `joined` may run it with another, `places` says where experts are if some were dropped."""
        self.executable, self.bank, self.joined, self.places = executable, bank, joined, places

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the bank: [tokens, hidden] -> [tokens, hidden]; see `Executable`."""
        if self.places is not None:
            self.places = self.places.to(top_k_index.device)
            top_k_index = self.places[top_k_index]
        if torch.compiler.is_dynamo_compiling():
            if hasattr(self.executable, "op"):  # a torch operator with a known shape
                return self.executable.op(self.bank, hidden, top_k_index, top_k_weights)  # pyright: ignore
            # kernels are no torch: the graph breaks around them
            opaque: Executable = torch.compiler.disable(self.executable)  # pyright: ignore[reportAssignmentType]
            return opaque(self.bank, hidden, top_k_index, top_k_weights)
        if self.joined is not None and self.bank == "routed":
            return self.joined.routed(hidden, top_k_index, top_k_weights)
        return self.executable(self.bank, hidden, top_k_index, top_k_weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give itself: nothing in it changes."""
        return self


class CompiledMoE(nn.Module):
    """
    A block whose experts run compiled; called exactly like the block.

    Router, shared-expert gate and whatever else the block does stay torch; routed and shared experts are replaced. The
    compiled experts are no parameters: they have no gradient, and `to` and `state_dict` pass them by.
    """

    def __init__(self, block: nn.Module, compilation: Compilation) -> None:
        """Wrap a block whose banks have been replaced."""
        super().__init__()
        self.block = block
        self.compilation = compilation
        self.training = block.training
        # experts alone are replaced by something that is called alike and says so itself
        own: inspect.Signature | None = getattr(block, "__signature__", None)
        self.__signature__ = own or inspect.signature(block.forward)

    @property
    def forward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]  # called alike
        """The block's call, with the block's own signature: as a property, since that is known only with the block."""

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the block's own signature
            return self.block(*args, **kwargs)

        forward.__signature__ = self.__signature__  # pyright: ignore[reportFunctionMemberAccess]  # inspect looks there
        return forward

    @property
    def plan(self) -> Plan:
        """One scheme per (block, bank, role, expert)."""
        return self.compilation.plan

    def ir(self, stage: str) -> str:
        """Whole text of the module at the end of `stage`: lifted, annotated, allocated or lowered."""
        return self.compilation.ir(stage)

    def report(self) -> CompileReport:
        """Say what was found, quantized and predicted."""
        return self.compilation.report

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """Kernels that were compiled ahead for the target's GPU: machine code, its facts, and which calls launch it."""
        return self.compilation.carried.kernels

    def extra_repr(self) -> str:
        """Target, and how it runs here: a part of `repr`."""
        return ": ".join(filter(None, (self.compilation.target.name, str(self.compilation.carried))))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write everything that `mxmoe.load` needs to a folder, whole or not at all."""
        save(self, folder)


def make_backend(target: Target) -> Backend:
    """Make the backend of a target and check that this machine and build can run it."""
    backend: Backend = BACKENDS[target.backend](**target.options)
    backend.ready()
    return backend


def install(lifted: Lifted, made: Compilation) -> nn.Module:
    """Replace the banks of a lifted module by executables, and give the plan and its company to what is returned."""
    joined, gone = join_calls(lifted, made.executables), made.plan.dropped

    def run(block: LiftedBlock, bank: str) -> BankRun:
        places = places_of(block.banks[bank].shape.experts, gone.get((block.name, bank), ()))
        return CompiledBank(made.executables[block.name], bank, joined.get(block.name), places)

    root = replace_banks(lifted, run).root
    if not is_model(lifted):
        return CompiledMoE(root, made)
    company: dict[str, Any] = {
        "compilation": made,
        "plan": made.plan,
        "ir": made.ir,
        "report": lambda: made.report,
        "kernels": made.carried.kernels,
        "save": partial(save, root),
    }
    if hasattr(root, "save_pretrained"):
        company["save_pretrained"] = partial(_refuse_save, type(root).__name__)
    for name, value in company.items():
        setattr(root, name, value)
    return root


def _refuse_save(cls: str, *args: object, **kwargs: object) -> NoReturn:
    """Take the place of `save_pretrained`, which sees parameters only and would leave the experts out silently."""
    raise NotSavedHere(cls=cls)


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module is, or holds, anything that `compile` made."""
    parts = tuple(module.modules())
    return any(hasattr(part, "compilation") or isinstance(getattr(part, "run", None), CompiledBank) for part in parts)


def is_model(lifted: Lifted) -> bool:
    """Say whether the lifted blocks stand within the root, rather than being it."""
    parts = [block.block for block in lifted.blocks]
    parts += [bank.module for block in lifted.blocks for bank in block.banks.values()]
    return all(part is not lifted.root for part in parts)


def copy_modules(module: nn.Module, *, is_meta: bool = False) -> nn.Module:
    """
    Copy a tree of modules; parameters and buffers are shared with the original, or have no values (`is_meta`).

    Raises:
        NotAModule: it is none.
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may not check
        raise NotAModule(what=type(module).__name__)
    shared: dict[int, Tensor] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    if is_meta:
        shared = {key: _without_values(tensor) for key, tensor in shared.items()}
    return copy.deepcopy(module, shared)


def _without_values(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def lifted_in(lifted: Lifted, root: nn.Module) -> Lifted:
    """Give what was lifted, its places taken to be those of another module of the same structure."""

    def moved(block: LiftedBlock) -> LiftedBlock:
        found = {name: replace(bank, module=root.get_submodule(bank.path)) for name, bank in block.banks.items()}
        first = next(iter(block.banks.values())).path
        return replace(block, block=root.get_submodule(first.rpartition(".")[0]), banks=found)

    return replace(lifted, root=root, blocks=tuple(map(moved, lifted.blocks)))


def save(compiled: nn.Module, folder: str | os.PathLike[str]) -> None:
    """
    Write a compiled block or model to a folder, whole or not at all; `load` is the inverse.

    The folder holds the plan (JSON), the module at every stage (text), all tensors (safetensors: packed experts, the
    bytes of kernels, and whatever else the module has), and a manifest with the SHA-256 of each file and each tensor.

    Raises:
        NotCompiled: `compiled` did not come from `compile`.
        FolderInUse: the folder holds something that is not a checkpoint.
    """
    made = getattr(compiled, "compilation", None)
    if not isinstance(made, Compilation):
        raise NotCompiled(cls=type(compiled).__name__)
    root = _inner(compiled)
    texts = {"plan.json": made.plan.to_json(), **{f"{stage}.mlir": text for stage, text in made.stages.items()}}
    about = {
        "target": made.target.name,
        "report": made.report.to_dict(),
        "origin": None if made.origin is None else asdict(made.origin),
        "training": root.training,
    }
    experts = dict(expert_tensors(made.stages["lowered"], made.executables))
    write_checkpoint(
        folder, Checkpoint(about, texts, {**_torch_tensors(root), **experts, **dict(made.carried.tensors())})
    )


def load(folder: str | os.PathLike[str], block: nn.Module | None = None, *, target: str | None = None) -> nn.Module:
    """
    Read a compiled block or model back; nothing is quantized or solved again.

    Args:
        folder: what `save` wrote.
        block: a module of the structure that was compiled; its own weights do not matter, and it becomes the inside of
            what is returned. It may be left out where a transformers class was compiled, which is then built from its
            saved config, without ever holding dense experts.
        target: run somewhere else than where it was compiled for.

    Raises:
        UnknownName, NoKernels: a target that is not there, or cannot run here.
        NoCheckpoint, BrokenCheckpoint: not a checkpoint, or something in it was changed or lost.
        NeedsBlock: the class cannot be built from what was saved.
        UnsupportedScheme: a scheme that the target cannot run.
        NotAModule, StructureMismatch: `block` is no module, or has another structure.
    """
    goal = None if target is None else find_target(target)
    stored = read_checkpoint(folder)
    goal = goal or find_target(stored.about["target"])
    backend = make_backend(goal)
    origin = None if stored.about["origin"] is None else Origin(**stored.about["origin"])
    root = _build(origin).train(stored.about["training"]) if block is None else block
    # without values: those of a module made for this purpose may be anything, even NaN
    lifted = lifted_in(lift(copy_modules(root, is_meta=True)), root)
    _check_structure(parse_ir(stored.texts["lifted.mlir"]), lifted.module)
    module = parse_ir(stored.texts["lowered.mlir"])
    _check_schemes(module, goal, backend)
    executables = backend.compile(module, packed_weights(module, stored.tensors))
    carried = revive(backend, stored.tensors, is_same=goal.name == stored.about["target"])
    report = CompileReport.from_dict(stored.about["report"])
    held = sum(executable.nbytes for executable in executables.values())
    made = Compilation(
        target=goal,
        plan=Plan.from_json(stored.texts["plan.json"]),
        stages={name.removesuffix(".mlir"): text for name, text in stored.texts.items() if name.endswith(".mlir")},
        executables=executables,
        report=replace(report, target=goal.name, held_bytes=held, runs=str(carried)),
        origin=origin,
        carried=carried,
    )
    compiled = install(lifted, made)
    _fill(_inner(compiled), stored.tensors)
    return compiled


def _inner(compiled: nn.Module) -> nn.Module:
    return compiled.block if isinstance(compiled, CompiledMoE) else compiled


def _build(origin: Origin | None) -> nn.Module:
    if origin is None:
        raise NeedsBlock(cls="the compiled module", reason="it is no transformers class with a config")
    return origin.build()


def _torch_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Give what is not compiled, by key; buffers too that a state dict leaves out, which a config may not give back."""
    state = root.state_dict()
    others = {name: buffer for name, buffer in root.named_buffers(remove_duplicate=False) if name not in state}
    return {f"rest/{name}": t for name, t in state.items()} | {f"buffer/{name}": t for name, t in others.items()}


def _fill(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """
    Put back what `_torch_tensors` gave, on the devices of what it replaces; on the CPU where that is on none.

    Raises:
        StructureMismatch: the module has other parameters.
        NeedsBlock: something was built without values and was not saved.
    """
    homes = {key: held.device for key, held in _torch_tensors(root).items() if held.device.type != "meta"}
    tensors = {key: tensor.to(homes.get(key, tensor.device)) for key, tensor in tensors.items()}
    rest = {key.removeprefix("rest/"): tensor for key, tensor in tensors.items() if key.startswith("rest/")}
    try:
        root.load_state_dict(rest, assign=True)
    except RuntimeError as error:
        raise StructureMismatch(reason=str(error).strip().splitlines()[-1].strip()) from error
    for key, tensor in tensors.items():
        if key.startswith("buffer/"):
            owner, _, name = key.removeprefix("buffer/").rpartition(".")
            root.get_submodule(owner).register_buffer(name, tensor, persistent=False)
    if hasattr(root, "tie_weights"):
        root.tie_weights()  # pyright: ignore[reportCallIssue]  # a transformers model; assign=True unties
    for path, part in root.named_modules():
        held = {**vars(part), **dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
        for name, value in held.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise NeedsBlock(cls=type(root).__name__, reason=f"the tensor {path}.{name} is not part of its state")


def _check_structure(wanted: ModuleOp, given: ModuleOp) -> None:
    """Compare sizes of lifted modules; element types may differ."""
    ours, theirs = _sizes(wanted), _sizes(given)
    for block in (*ours, *theirs):
        if ours.get(block) != theirs.get(block):
            reason = f"{block} is {theirs.get(block, 'missing')}, it was {ours.get(block, 'missing')}"
            raise StructureMismatch(reason=reason)


def _check_schemes(module: ModuleOp, target: Target, backend: Backend) -> None:
    """Raise UnsupportedScheme unless the backend runs everything that was chosen."""
    for block, gemm, schemes in gemms_in(module):
        for expert, scheme in enumerate(schemes):
            if not backend.supports(scheme):
                known = ", ".join(text for text in target.candidates if backend.supports(Scheme.parse(text)))
                where = {"block": block, "expert": expert, "weight": gemm.weights[0]}
                raise UnsupportedScheme(backend=target.name, scheme=scheme, known=known, **where)


def _sizes(module: ModuleOp) -> dict[str, str]:
    """Block -> its banks with their sizes."""
    return {
        moe.block: "; ".join(
            f"{name}: {bank.experts} experts, top {bank.top_k}, {bank.act.kind}, "
            + ", ".join(f"{role} {op.n} x {op.k}" for role, op in bank.linears.items())
            for name, bank in banks(moe).items()
        )
        for moe in moe_ops(module)
    }
