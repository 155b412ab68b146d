"""QuaRot: the residual stream of a whole model is rotated, so that none of its channels stands out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxmoe.calib import Inputs
from mxmoe.errors import MetaWeights, RotationChanges
from mxmoe.frontend import Lifted, lift
from mxmoe.ir import check_rotation
from mxmoe.quant import random_signs, rotate
from mxmoe.transform.rows import Routing, agreement, run_rows
from mxmoe.transform.stream import Stream, find_stream, gain_of, rewrite

_TOKENS = 64
_SAME = 0.1
"""Relative change of the logits of half of the tokens: 16 bits stay below, a forgotten reader changes about all."""


@dataclass(frozen=True)
class RotationReport:
    """What was rotated, and how far the model still computes the same."""

    hidden: int
    """Width of the residual stream."""
    block: int
    """Channels that were mixed with each other."""
    seed: int
    """Of the signs."""
    norms: int
    """Norms whose gains went into what reads them."""
    readers: int
    """Matrices that read the stream: attention, routers, gates and ups of experts, the head."""
    writers: int
    """Matrices that write to it."""
    untied: bool
    """Whether the head had to be given weights of its own."""
    change: float
    """Relative Frobenius change of the logits over the tokens that were run; rounding alone."""
    agreement: Mapping[str, float]
    """Block -> share of the chosen experts that are chosen again."""

    def __str__(self) -> str:
        """Write three lines, and the block whose routing changed most."""
        lines = [
            f"rotated {self.hidden} channels in blocks of {self.block}, signs of seed {self.seed}",
            f"{self.norms} norms, {self.readers} readers, {self.writers} writers{', head untied' * self.untied}",
            f"logits change by {self.change:.2e}",
        ]
        if self.agreement:
            worst = min(self.agreement, key=self.agreement.__getitem__)
            lines.append(f"routing agrees in {self.agreement[worst]:.2%} or more, least in {worst}")
        return "\n".join(lines)


def rotate_model(
    model: nn.Module,
    seed: int = 0,
    *,
    block: int | None = None,
    inputs: Inputs | None = None,
    quiet: bool = True,
) -> RotationReport:
    """
    Rotate the residual stream of a causal language model in place; its function stays, up to rounding.

    QuaRot (Ashkboos et al., NeurIPS 2024, section 4): with Q = diag(signs) H / sqrt(n), gains of norms go into all that
    reads them (attention, router, gates and ups of every expert and of the shared one, the head), embeddings become
    E Q, readers W Q and writers Q^T W. A norm without gains does not see Q. Computed in float64, stored in the model's
    dtype. That nothing else reads the stream is proved first, by a signed permutation that no float type rounds.

    Families: those whose layers are named as in Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE, DeepSeek-V2 and V3 (latent
    attention included) and gpt-oss. What goes to down is rotated while running, see `mxmoe.passes.RotateDown`.

    Args:
        model: of transformers; a config that ties head and embedding is changed.
        seed: of the signs.
        block: channels that are mixed with each other; None mixes all.
        inputs: token ids to compare outputs and routing on; a few random ones if not given.
        quiet: no progress bar.

    Raises:
        NoResidualStream, UnknownPart: a model of another structure.
        BadRotation: a width without a Hadamard matrix; with the blocks that work.
        RotationChanges: something reads the stream that was not found; the model is as it was.
        MetaWeights: weights that were never loaded.
        NoMoeBlock, BadCalibration, ...: what `mxmoe.lift` and `mxmoe.observe` raise.
    """
    lifted = lift(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise MetaWeights(name=name)
    untied = _untie(model)
    try:
        stream = find_stream(lifted)
        size = stream.hidden if block is None else block
        check_rotation(stream.hidden, size)
        given = _few(stream) if inputs is None else inputs
        with torch.no_grad():
            before = _run(lifted, given, quiet)
            _prove(lifted, stream, given, before, quiet)
    except Exception:  # nothing has been changed yet, whatever it is
        if untied:
            _tie(model)
        raise
    signs = random_signs(stream.hidden, seed)
    with torch.no_grad():
        _rotate(stream, lambda rows: rotate(rows, size, signs=signs))
        after = _run(lifted, given, quiet)
    return RotationReport(
        hidden=stream.hidden,
        block=size,
        seed=seed,
        norms=len(stream.norms),
        readers=len(stream.readers),
        writers=len(stream.writers),
        untied=untied,
        change=float((after.logits - before.logits).norm() / before.logits.norm()),
        agreement=agreement(before.routing, after.routing),
    )


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What a model made of some tokens."""

    logits: Tensor
    """float64 [tokens, vocabulary]."""
    routing: Routing


def _run(lifted: Lifted, inputs: Inputs, quiet: bool) -> _Outcome:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401  # a model's output
        logits = output if isinstance(output, Tensor) else output.logits
        outputs.append(logits.detach().double().reshape(-1, logits.shape[-1]).cpu())

    handle = lifted.root.register_forward_hook(keep)
    try:
        routing = run_rows(lifted, inputs, lambda block, bank, expert, rows: None, title="running", quiet=quiet)
    finally:
        handle.remove()
    return _Outcome(torch.cat(outputs), routing)


def _few(stream: Stream) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(stream.embedding), (1, _TOKENS), generator=generator)


def _rotate(stream: Stream, turn: Callable[[Tensor], Tensor]) -> None:
    """Move the gains of norms into their readers, and turn everything that reads or writes the stream."""
    gains = {norm: gain_of(norm) for norm in stream.norms}
    for weight, norm in stream.readers:
        gain = gains[norm][0] if norm in gains else torch.ones((), dtype=torch.float64)
        rewrite(weight, lambda rows, gain=gain: turn(rows * gain.to(rows.device)))
    for rows in stream.rows():
        rewrite(rows, turn)
    for norm, (_, offset) in gains.items():
        norm.get_parameter("weight").fill_(1.0 - offset)


def _prove(lifted: Lifted, stream: Stream, inputs: Inputs, before: _Outcome, quiet: bool) -> None:
    """
    Turn the stream by a signed permutation, look at the output, and turn it back bit for bit.

    Raises:
        RotationChanges: the output is another one.
    """
    order = torch.randperm(stream.hidden, generator=torch.Generator().manual_seed(1))
    signs = random_signs(stream.hidden, 1)
    back = order.argsort()
    _permute(stream, lambda rows: rows[:, order.to(rows.device)] * signs.to(rows.device), order)
    try:
        after = _run(lifted, inputs, quiet)
    finally:
        _permute(stream, lambda rows: (rows * signs.to(rows.device))[:, back.to(rows.device)], back)
    change = (after.logits - before.logits).norm(dim=-1) / before.logits.norm(dim=-1).clamp(min=1e-30)
    if not float(change.median()) <= _SAME:
        raise RotationChanges(cls=type(lifted.root).__name__, change=float(change.median()))


def _permute(stream: Stream, turn: Callable[[Tensor], Tensor], order: Tensor) -> None:
    for rows in (*(weight for weight, _ in stream.readers), *stream.rows()):
        rewrite(rows, turn)
    for norm in stream.norms:
        weight = norm.get_parameter("weight")
        weight.copy_(weight[order.to(weight.device)].clone())


def _untie(model: nn.Module) -> bool:
    """Give the head weights of its own where it shares those of the embedding."""
    head, embedding = _ends(model)
    if head is None or embedding is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    _set_tied(model, False)
    return True


def _tie(model: nn.Module) -> None:
    head, embedding = _ends(model)
    head.weight = embedding.weight
    _set_tied(model, True)


def _ends(model: nn.Module) -> tuple[Any, Any]:
    head, embedding = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("output", "input"))
    return head, embedding


def _set_tied(model: nn.Module, value: bool) -> None:
    config = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = value
