"""What stands around a block: the norm that makes its input, and every linear that reads it, found by running once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxmoe.calib import Feed, Inputs, evaluating
from mxmoe.errors import NotTraceable
from mxmoe.frontend import ExpertViews, Lifted, LiftedBlock, expert_views

_TOKENS = 32
"""Tokens that are traced: enough that no two inputs are equal by chance."""
_RECENT = 8
"""Norms whose outputs are remembered while tracing: readers come soon after, and a layer has no more."""
_PRESERVED = 1e-4
"""Relative change of the output of half of the tokens; a forgotten reader is off by tenths."""


@dataclass(frozen=True, eq=False)
class Gain:
    """The norm in front of a block, as far as scales are concerned: its output is `(offset + weight) * x + bias`."""

    path: str
    norm: nn.Module
    offset: float
    """0, or 1 where the weight is stored as the difference to one, as in Gemma."""

    @property
    def weight(self) -> Tensor:
        """[hidden]."""
        return self.norm.get_parameter("weight").detach()

    @property
    def bias(self) -> Tensor | None:
        """[hidden]."""
        bias = getattr(self.norm, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


@dataclass(frozen=True, eq=False)
class Edge:
    """The input of one block: who makes it and who reads it."""

    block: LiftedBlock
    experts: Mapping[str, tuple[ExpertViews, ...]]
    """Bank -> the experts' own storage."""
    gain: Gain | None = None
    """None where no norm was found, or where folding into it would change the function."""
    readers: Mapping[str, Tensor] | None = None
    """Path -> weight [n, hidden] of every linear besides the experts that reads it: router, shared gate, ..."""
    problem: str = ""
    """Why there is no gain."""

    @property
    def router(self) -> Tensor | None:
        """The reader that scores experts: one row for each routed one; None where there is none, or several."""
        rows = self.block.banks["routed"].shape.experts if "routed" in self.block.banks else 0
        fitting = [weight for weight in (self.readers or {}).values() if len(weight) == rows]
        return fitting[0] if len(fitting) == 1 else None


def find_edges(lifted: Lifted, inputs: Inputs | None = None) -> tuple[Edge, ...]:
    """
    Find the input of every block of a lifted module, by running a few tokens through it.

    The norm is the module with one weight per channel whose output is what the experts read; readers are the modules
    with a matrix over these channels that are given the same values, within the block and outside of it. That these are
    all is proved by doing: half of the channels are halved in the norm and doubled in all that reads them, which is
    exact in every float type, and the output has to stay; then everything is put back.

    Args:
        inputs: what to trace with, as for `mxmoe.observe`; its first batch is cut to a few tokens. Random token ids if
            not given.

    Raises:
        NotTraceable: no inputs, and the module does not take token ids.
        MetaWeights: experts that were never loaded.
        BadCalibration, EmptyCalibration, NonFiniteCalibration: inputs that the module does not take.
    """
    views = {b.name: {name: expert_views(bank) for name, bank in b.banks.items()} for b in lifted.blocks}
    if all(block.block is lifted.root for block in lifted.blocks):
        why = "it was given alone, without the norm in front of it"
        return tuple(Edge(block, views[block.name], problem=why) for block in lifted.blocks)
    run = _runner(lifted, inputs)
    seen = _Seen(lifted)
    with seen.hooked():
        before = run()
    edges = [seen.edge(block, views[block.name]) for block in lifted.blocks]
    if not _is_preserved(edges, run, before):
        edges = [edge if _is_preserved([edge], run, before) else _without(edge) for edge in edges]
    return tuple(edges)


def _without(edge: Edge) -> Edge:
    if edge.gain is None:
        return edge
    return Edge(edge.block, edge.experts, problem=f"something else reads {edge.gain.path} too, not as a linear does")


def _runner(lifted: Lifted, inputs: Inputs | None) -> Callable[[], Tensor]:
    """Give a function that runs the same few tokens each time and returns the module's output [tokens, ...]."""
    feed = Feed(lifted)
    if inputs is None:
        if feed.vocabulary is None:
            raise NotTraceable(cls=type(lifted.root).__name__)
        inputs = torch.randint(feed.vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    batches, _ = feed.batches(inputs)
    batch = next(batches)
    if isinstance(batch, Tensor):
        batch = batch[:1, :_TOKENS] if batch.dim() > 1 + feed.is_block else batch[:_TOKENS]
    outputs: list[Any] = []

    def run() -> Tensor:
        handle = lifted.root.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            with torch.no_grad(), evaluating(lifted.root):
                feed.run(batch)
        finally:
            handle.remove()
        return _largest(outputs.pop())

    return run


def _largest(output: object) -> Tensor:
    """The tensor of an output with the most numbers: logits before a loss, hidden states before anything."""
    if isinstance(output, Tensor):
        return output.double()
    items: Sequence[Any] = tuple(output.values() if isinstance(output, Mapping) else output)  # type: ignore[arg-type]
    return max((item for item in items if isinstance(item, Tensor)), key=Tensor.numel).double()


class _Seen:
    """What modules were given and gave in one run, as far as they have to do with a block's channels."""

    def __init__(self, lifted: Lifted) -> None:
        self.lifted = lifted
        self.widths = {block.shape.hidden for block in lifted.blocks}
        inside = {m for b in lifted.blocks for bank in b.banks.values() for e in bank.entries for m in e.modules()}
        outside = {path: m for path, m in lifted.root.named_modules() if m not in inside}
        self.norms = {path: m for path, m in outside.items() if self._is_norm(m)}
        self.linears = {path: w for path, m in outside.items() if (w := self._matrix(m)) is not None}
        self.recent: deque[tuple[str, Tensor]] = deque(maxlen=_RECENT)
        """Norms and what they gave, the latest last."""
        self.sources: dict[str, Tensor] = {}
        """Norm -> some of the rows that it was given."""
        self.read: dict[str, str | None] = {}
        """Linear -> norm that made its input."""
        self.given: dict[tuple[str, str], str | None] = {}
        """(block, bank or "" for the block itself) -> the same."""

    def _is_norm(self, module: nn.Module) -> bool:
        own = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
        return (
            "weight" in own
            and set(own) <= {"weight", "bias"}
            and all(len(shape) == 1 and shape[0] in self.widths for shape in own.values())
        )

    def _matrix(self, module: nn.Module) -> Tensor | None:
        own = [p for p in module.parameters(recurse=False) if p.dim() == 2 and p.shape[-1] in self.widths]
        return own[0].detach() if len(own) == 1 and not isinstance(module, nn.Embedding) else None

    def hooked(self) -> ExitStack:
        stack = ExitStack()
        named = dict(self.lifted.root.named_modules())

        def record(into: dict[Any, str | None], key: object) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
                if tensors and tensors[0].is_floating_point():
                    into[key] = self._maker(tensors[0])

            return hook

        def made(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    self.recent.append((path, output.detach().clone()))
                    self.sources[path] = args[0].detach().reshape(-1, args[0].shape[-1])[:_TOKENS].clone()

            return hook

        handles = [self.norms[path].register_forward_hook(made(path)) for path in self.norms]
        handles += [
            named[path].register_forward_pre_hook(record(self.read, path), with_kwargs=True) for path in self.linears
        ]
        for block in self.lifted.blocks:
            watched = {name: bank.module for name, bank in block.banks.items() if bank.kind != "module_list"}
            for key, module in {"": block.block, **watched}.items():
                hook = record(self.given, (block.name, key))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for handle in handles:
            stack.callback(handle.remove)
        return stack

    def edge(self, block: LiftedBlock, experts: Mapping[str, tuple[ExpertViews, ...]]) -> Edge:
        """Put together what was seen of one block."""
        makers: list[str | None] = []
        for name, bank in block.banks.items():
            key = (block.name, "" if bank.kind == "module_list" else name)
            if key not in self.given:
                return Edge(block, experts, problem=f"its bank {name} was not reached by the tokens that were traced")
            makers.append(self.given[key])
        path = makers[0]
        if any(maker != path for maker in makers):
            return Edge(block, experts, problem="its banks read different inputs")
        if path is None:
            return Edge(block, experts, problem="no norm makes its input")
        readers = {where: self.linears[where] for where, maker in self.read.items() if maker == path}
        norm = self.norms[path]
        return Edge(block, experts, Gain(path, norm, _offset(norm, self.sources[path])), readers)

    def _maker(self, x: Tensor) -> str | None:
        """The latest norm that gave these values."""
        return next((path for path, output in reversed(self.recent) if _same(output, x)), None)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    return torch.equal(a.flatten().float(), b.flatten().float())


def _offset(norm: nn.Module, source: Tensor) -> float:
    """0 for a norm that gives its bias alone when its weight is zero, else 1."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        try:
            output: Tensor = norm(source)
        finally:
            weight.copy_(kept)
    rest = output if bias is None else output - bias
    return 0.0 if not rest.any() else 1.0


def _is_preserved(edges: Sequence[Edge], run: Callable[[], Tensor], before: Tensor) -> bool:
    """Whether scales that no float type rounds can go through all of these edges without changing the output."""
    folding = [edge for edge in edges if edge.gain is not None]
    kept: list[tuple[nn.Parameter, Tensor]] = []
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for number, edge in enumerate(folding):
            scale = _ones_and_twos(edge, number)
            assert edge.gain is not None, "only those with a gain are here"
            for name, offset in (("weight", edge.gain.offset), ("bias", 0.0)):
                parameter = getattr(edge.gain.norm, name, None)
                if isinstance(parameter, nn.Parameter):
                    kept.append((parameter, parameter.data))
                    # a difference to one is rounded by halving, and such norms compute in float32 in any case
                    wide = parameter.data.double() if offset == 0 else parameter.data.float()
                    halved = (wide + offset) / scale.to(wide) - offset
                    parameter.data = halved.to(parameter.dtype) if offset == 0 else halved
            for matrix in matrices_of(edge).values():
                matrix.mul_(scale.to(matrix))
                done.append((matrix, scale))
        after = run()
    finally:
        for parameter, data in reversed(kept):  # two blocks may share a norm
            parameter.data = data
        for matrix, scale in done:
            matrix.div_(scale.to(matrix))
    width = before.shape[-1]
    change = (after - before).reshape(-1, width).norm(dim=-1) / before.reshape(-1, width).norm(dim=-1).clamp(min=1e-30)
    return bool(change.median() <= _PRESERVED)


def _ones_and_twos(edge: Edge, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.0 + torch.randint(2, (edge.block.shape.hidden,), generator=generator)


def matrices_of(edge: Edge) -> dict[str, Tensor]:
    """Name -> matrix [n, hidden] of all that reads the input of a block: the experts' gate and up, then the others."""
    block = edge.block.name
    inside = {
        f"{block}.{bank}[{index}].{role}": one.weights[role]
        for bank, experts in edge.experts.items()
        for index, one in enumerate(experts)
        for role in ("gate", "up")
        if role in one.weights
    }
    return inside | {f"{path}.weight": weight for path, weight in (edge.readers or {}).items()}
