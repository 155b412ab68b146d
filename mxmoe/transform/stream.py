"""The residual stream of a model: who writes to it, who reads it behind which norm, found by structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mxmoe.errors import NoResidualStream, UnknownPart
from mxmoe.frontend import Lifted, LiftedBank, expert_views

ATTENTION, MLP, FINAL = "input_layernorm", "post_attention_layernorm", "norm"
"""The norms of a decoder layer, in front of its two parts, and the one behind the last layer."""

_READERS: Mapping[str, frozenset[str]] = {
    ATTENTION: frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"}),
    MLP: frozenset({"gate_proj", "up_proj", "gate_up_proj", "w1", "w3"}),
}
_WRITERS: Mapping[str, frozenset[str]] = {
    ATTENTION: frozenset({"o_proj"}),
    MLP: frozenset({"down_proj", "w2"}),
}
_INNER = frozenset({"q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm", "q_b_proj", "kv_b_proj", "sinks"})
"""Parts of attention that see neither what it reads nor what it writes; multi-head latent attention has most."""
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Stream:
    """Every parameter that has to do with the residual stream, as views that may be written to."""

    hidden: int
    """Width of the stream."""
    embedding: Tensor
    """[vocabulary, hidden]."""
    norms: list[nn.Module] = field(default_factory=list[nn.Module])
    """Those between the stream and its readers, each with one `weight` [hidden]."""
    readers: list[tuple[Tensor, nn.Module]] = field(default_factory=list[tuple[Tensor, nn.Module]])
    """Weights [n, hidden] of linears that read what a norm makes of the stream, and that norm."""
    writers: list[Tensor] = field(default_factory=list[Tensor])
    """Weights [hidden, k] of linears whose output is added to the stream."""
    biases: list[Tensor] = field(default_factory=list[Tensor])
    """[hidden], those of the writers."""

    def rows(self) -> Iterator[Tensor]:
        """Everything but norms and readers, with the channels of the stream last: embedding, writers, biases."""
        yield self.embedding
        yield from (weight.mT for weight in self.writers)
        yield from (bias[None] for bias in self.biases)


def rewrite(rows: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Put change(rows) in the place of rows [n, hidden], computed in float64, a few million numbers at a time."""
    for part in rows.split(max(1, _CHUNK // rows.shape[-1])):
        part.copy_(change(part.double()))


def find_stream(lifted: Lifted) -> Stream:
    """
    Sort the parameters of a causal language model of transformers into those of its residual stream and others.

    Its layers have an attention behind `input_layernorm` and an MLP or MoE block behind `post_attention_layernorm`, and
    add what both give to what they were given.

    Raises:
        NoResidualStream: no embedding, head or layers of this kind.
        UnknownPart: a parameter that no rule covers.
    """
    root = lifted.root
    embedding, head = (_weight_of(root, side) for side in ("input", "output"))
    path, layers = _layers(root)
    if embedding is None or head is None or layers is None:
        missing = "embedding" if embedding is None else "head" if head is None else "stack of decoder layers"
        raise NoResidualStream(cls=type(root).__name__, missing=missing)
    finder = _Finder(lifted, embedding)
    final = root.get_submodule(f"{path.rpartition('.')[0]}.{FINAL}".lstrip("."))
    finder.norm(final)
    finder.read(head, final)
    for number, layer in enumerate(layers):
        finder.layer(f"{path}.{number}", layer)
    # added to logits, and not to the stream
    finder.inner(getattr(root.get_output_embeddings(), "bias", None))  # pyright: ignore  # a model of transformers
    if finder.unknown:
        name = next(iter(finder.unknown.values()))
        raise UnknownPart(cls=type(root).__name__, name=name, shape=list(root.get_parameter(name).shape))
    return finder.found


def _weight_of(root: nn.Module, side: str) -> nn.Parameter | None:
    module = getattr(root, f"get_{side}_embeddings", lambda: None)()
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.dim() == 2 else None


def _layers(root: nn.Module) -> tuple[str, nn.ModuleList | None]:
    """Find the list of decoder layers with a norm behind it, and its path."""
    for path, module in root.named_modules():
        behind = root.get_submodule(path.rpartition(".")[0])
        if not isinstance(module, nn.ModuleList) or not len(module) or not hasattr(behind, FINAL):
            continue
        if all(hasattr(layer, ATTENTION) and hasattr(layer, MLP) for layer in module):
            return path, module
    return "", None


class _Finder:
    """Sorts parameters; those that no rule covers are left."""

    def __init__(self, lifted: Lifted, embedding: nn.Parameter) -> None:
        self.found = Stream(embedding.shape[-1], embedding.detach())
        self.unknown = {id(parameter): name for name, parameter in lifted.root.named_parameters()}
        self.banks = [bank for block in lifted.blocks for bank in block.banks.values()]
        self.inner(embedding)

    def inner(self, parameter: nn.Parameter | None) -> None:
        """Take a parameter that is known, and is not to be rotated."""
        self.unknown.pop(id(parameter), None)

    def norm(self, norm: nn.Module) -> None:
        """Take the gain of a norm; one without is all right, and anything else in it is unknown."""
        weight = getattr(norm, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.shape == (self.found.hidden,):
            self.found.norms.append(norm)
            self.inner(weight)

    def read(self, weight: nn.Parameter, norm: nn.Module) -> None:
        """Take the weight of a linear behind a norm."""
        self.found.readers.append((weight.detach(), norm))
        self.inner(weight)

    def layer(self, path: str, layer: nn.Module) -> None:
        """Sort what is in one decoder layer."""
        for name, parts in ((ATTENTION, ("self_attn",)), (MLP, ("mlp", "block_sparse_moe"))):
            norm = layer.get_submodule(name)
            self.norm(norm)
            for part in (part for part in parts if isinstance(getattr(layer, part, None), nn.Module)):
                banks = [bank for bank in self.banks if bank.path.startswith(f"{path}.{part}.")]
                for bank in banks:
                    self._bank(bank, norm)
                for child, parameter in layer.get_submodule(part).named_parameters():
                    if id(parameter) in self.unknown:
                        if banks:
                            self._beside_experts(child, parameter, norm)
                        else:
                            self._dense(child, parameter, norm, name)

    def _bank(self, bank: LiftedBank, norm: nn.Module) -> None:
        """Take routed or shared experts."""
        if bank.kind == "routed_norm":
            return  # gains on what is written to the stream, which stay where they are
        for expert in expert_views(bank):
            self.found.readers.extend((expert.weights[role], norm) for role in ("gate", "up") if role in expert.weights)
            self.found.writers.append(expert.weights["down"])
            self.found.biases.extend([expert.biases["down"]] if "down" in expert.biases else [])
        for parameter in (parameter for entry in bank.entries for parameter in entry.parameters()):
            self.inner(parameter)

    def _beside_experts(self, child: str, parameter: nn.Parameter, norm: nn.Module) -> None:
        """Take a router, or the gate of a shared expert."""
        if parameter.dim() == 2 and parameter.shape[-1] == self.found.hidden:
            self.read(parameter, norm)
        elif child.endswith("bias"):
            self.inner(parameter)

    def _dense(self, child: str, parameter: nn.Parameter, norm: nn.Module, kind: str) -> None:
        """Take a part of an attention or of a dense MLP, by its name."""
        owner, _, leaf = child.rpartition(".")
        if kind == ATTENTION and child.partition(".")[0] in _INNER:
            self.inner(parameter)
        elif owner in _READERS[kind] and leaf == "weight":
            self.read(parameter, norm)
        elif owner in _READERS[kind] and leaf == "bias":
            self.inner(parameter)
        elif owner in _WRITERS[kind] and leaf in ("weight", "bias"):
            (self.found.writers if leaf == "weight" else self.found.biases).append(parameter.detach())
            self.inner(parameter)


def gain_of(norm: nn.Module) -> tuple[Tensor, float]:
    """
    Give what a norm multiplies each channel with, float64 [hidden], and its offset.

    The offset is 1 where the weight is stored as the difference to one, as in Gemma, else 0.
    """
    weight = norm.get_parameter("weight").detach()
    kept = weight.clone()
    weight.zero_()
    try:
        output: Tensor = norm(torch.ones_like(weight)[None])
    finally:
        weight.copy_(kept)
    offset = float(bool(output.any()))
    return weight.double() + offset, offset
