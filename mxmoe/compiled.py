"""What `compile` returns: a module whose experts run compiled, its plan, its text at every stage; saved and loaded."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mxmoe.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from mxmoe.errors import NeedsBlock, NoSuchStage, NotCompiled, PlanMismatch
from mxmoe.frontend import BankRun, Lifted, LiftedBlock, lift, replace_banks
from mxmoe.ir import GroupGemmOp, Plan, moe_ops, parse_ir
from mxmoe.quant import Packed, PackedWeights
from mxmoe.registry import near_names
from mxmoe.report.compiled import CompileReport
from mxmoe.target import BACKENDS, Backend, Executable, Target, find_target


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

    def ir(self, stage: str) -> str:
        """
        Return the whole text of the module at the end of a stage.

        Raises:
            NoSuchStage: the stage was not passed through, or does not exist.
        """
        if stage not in self.stages:
            raise NoSuchStage(stage=stage, near=near_names(stage, self.stages))
        return self.stages[stage]


class CompiledMoE(nn.Module):
    """
    A block whose experts run compiled; called exactly like the block.

    Router, shared-expert gate and whatever else the block does stay torch; routed and shared experts are replaced.
    """

    def __init__(self, block: nn.Module, compilation: Compilation) -> None:
        """Wrap a block whose banks have been replaced."""
        super().__init__()
        self.block = block
        self.compilation = compilation

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # the block's own signature
        """Call the block."""
        return self.block(*args, **kwargs)

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

    def run(block: LiftedBlock, bank: str) -> BankRun:
        return partial(made.executables[block.name], bank)

    root = replace_banks(lifted, run).root
    if not is_model(lifted):
        return CompiledMoE(root, made)
    company = {"compilation": made, "plan": made.plan, "ir": made.ir, "report": lambda: made.report}
    for name, value in {**company, "save": partial(save, root)}.items():
        setattr(root, name, value)
    return root


def is_model(lifted: Lifted) -> bool:
    """Say whether the lifted blocks stand within the root, rather than being it."""
    parts = [block.block for block in lifted.blocks]
    parts += [bank.module for block in lifted.blocks for bank in block.banks.values()]
    return all(part is not lifted.root for part in parts)


def save(compiled: nn.Module, folder: str | os.PathLike[str]) -> None:
    """
    Write a compiled block or model to a folder, whole or not at all; `load` is the inverse.

    The folder holds the plan (JSON), the module at every stage (text), all tensors (safetensors: packed experts, and
    whatever else the module has), and a manifest with the SHA-256 of each file and each tensor.

    Raises:
        NotCompiled: `compiled` did not come from `compile`.
        FolderInUse: the folder holds something that is not a checkpoint.
    """
    made = getattr(compiled, "compilation", None)
    if not isinstance(made, Compilation):
        raise NotCompiled(cls=type(compiled).__name__)
    root = compiled.block if isinstance(compiled, CompiledMoE) else compiled
    tensors = {f"rest/{key}": tensor for key, tensor in root.state_dict().items()}
    texts = {"plan.json": made.plan.to_json(), **{f"{stage}.mlir": text for stage, text in made.stages.items()}}
    about = {"target": made.target.name, "report": made.report.to_dict(), **_describe(root)}
    write_checkpoint(folder, Checkpoint(about, texts, {**tensors, **dict(_expert_tensors(made))}))


def load(folder: str | os.PathLike[str], block: nn.Module | None = None, *, target: str | None = None) -> nn.Module:
    """
    Read a compiled block or model back; nothing is quantized or solved again.

    Args:
        folder: what `save` wrote.
        block: a module of the structure that was compiled; its own weights do not matter and are overwritten. It may
            be left out where a transformers class was compiled, which is then built from its saved config.
        target: run somewhere else than where it was compiled for.

    Raises:
        NoCheckpoint, BrokenCheckpoint: not a checkpoint, or something in it was changed or lost.
        NeedsBlock: the class cannot be built from what was saved.
        PlanMismatch: `block` has another structure.
    """
    stored = read_checkpoint(folder)
    root = _build(stored.about) if block is None else block
    goal = find_target(target or stored.about["target"])
    module = parse_ir(stored.texts["lowered.mlir"])
    executables = make_backend(goal).compile(module, _packed_weights(stored.texts["lowered.mlir"], stored.tensors))
    lifted = lift(root)
    known, given = [moe.block for moe in moe_ops(module)], [one.name for one in lifted.blocks]
    if known != given:
        raise PlanMismatch(reason=f"the checkpoint has blocks {', '.join(known)}, the module {', '.join(given)}")
    made = Compilation(
        target=goal,
        plan=Plan.from_json(stored.texts["plan.json"]),
        stages={name.removesuffix(".mlir"): text for name, text in stored.texts.items() if name.endswith(".mlir")},
        executables=executables,
        report=CompileReport.from_dict(stored.about["report"]),
    )
    compiled = install(lifted, made)
    inner = compiled.block if isinstance(compiled, CompiledMoE) else compiled
    rest = {key.removeprefix("rest/"): t for key, t in stored.tensors.items() if key.startswith("rest/")}
    inner.load_state_dict(rest, assign=True)
    if hasattr(inner, "tie_weights"):
        inner.tie_weights()  # pyright: ignore[reportCallIssue]  # a transformers model; assign=True unties
    return compiled


def _expert_tensors(made: Compilation) -> Iterator[tuple[str, Tensor]]:
    """Give every packed matrix and bias that the executables hold, by key."""
    for moe in moe_ops(parse_ir(made.stages["lowered"])):
        executable = made.executables[moe.block]
        for gemm in (op for op in moe.body.block.ops if isinstance(op, GroupGemmOp)):
            for name in gemm.weights:
                for expert in range(gemm.experts):
                    packed = executable.packed(name, expert)
                    for field in ("payload", "scale", "zero"):
                        if (tensor := getattr(packed, field)) is not None:
                            yield f"packed/{name}/{expert}/{field}", tensor
            for name in gemm.biases:
                yield f"bias/{name}", executable.bias(name)


def _packed_weights(text: str, tensors: Mapping[str, Tensor]) -> PackedWeights:
    """Put the packed matrices of a checkpoint together."""
    packed: dict[str, list[Packed]] = {}
    for moe in moe_ops(parse_ir(text)):
        for gemm in (op for op in moe.body.block.ops if isinstance(op, GroupGemmOp)):
            assert gemm.choice is not None, "the verifier demands a choice of a lowered block"
            schemes = [moe.candidates[index] for index in gemm.choice.array.tolist()]
            for name in gemm.weights:
                packed[name] = [
                    Packed(scheme, gemm.n, gemm.k, **_fields(tensors, f"packed/{name}/{expert}"))
                    for expert, scheme in enumerate(schemes)
                ]
    biases = {key.removeprefix("bias/"): tensor for key, tensor in tensors.items() if key.startswith("bias/")}
    return PackedWeights(packed, biases)


def _fields(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {field: tensors.get(f"{prefix}/{field}") for field in ("payload", "scale", "zero")}


def _describe(root: nn.Module) -> dict[str, Any]:
    """Say how to build the module again, where it is a transformers class made from a config."""
    config = getattr(root, "config", None) or _config_below(root)
    cls = type(root)
    if config is None or not cls.__module__.startswith("transformers."):
        return {"class": None, "config_class": None, "config": None}
    return {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "config_class": f"{type(config).__module__}:{type(config).__qualname__}",
        "config": json.loads(config.to_json_string(use_diff=False)),
    }


def _config_below(root: nn.Module) -> Any:  # noqa: ANN401  # a transformers config
    """Find the config of a block: its parts keep it."""
    return next((module.config for module in root.modules() if hasattr(module, "config")), None)


def _build(about: Mapping[str, Any]) -> nn.Module:
    """Build the module that was compiled; only classes of transformers are looked up."""
    if not about["class"]:
        raise NeedsBlock(cls="the compiled module", reason="it is no transformers class with a config")
    try:
        cls, config_class = (_find(about[key]) for key in ("class", "config_class"))
        return cls(config_class.from_dict(about["config"]))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise NeedsBlock(cls=about["class"], reason=f"{type(error).__name__}: {error}") from error


def _find(path: str) -> Any:  # noqa: ANN401  # a class
    module, _, name = path.partition(":")
    if not module.startswith("transformers."):
        raise ImportError(f"{module} is not part of transformers")
    return getattr(importlib.import_module(module), name)
