"""What the study model is like: its loss, how its experts are used, and what makes its activations hard to round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2MoeForCausalLM

PROFILED_TOKENS = 8192


@torch.no_grad()
def held_out_loss(model: Qwen2MoeForCausalLM, ids: Tensor, window: int, batch: int) -> float:
    """Return the loss in nats per token over the disjoint windows of ids [tokens], summed in double precision."""
    model.eval()
    n = (len(ids) - 1) // window
    inputs, targets = ids[: n * window].view(n, window), ids[1 : n * window + 1].view(n, window)
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for i in range(0, n, batch):
        logits = model(input_ids=inputs[i : i + batch].long(), use_cache=False).logits.float().flatten(0, 1)
        total += F.cross_entropy(logits, targets[i : i + batch].long().flatten(), reduction="none").double().sum()
    model.train()
    return total.item() / (n * window)


# Routing


@torch.no_grad()
def count_routing(model: Qwen2MoeForCausalLM, ids: Tensor, window: int, batch: int) -> Tensor:
    """Count assignments as [layer, expert, token id] float64 on the CPU, over the disjoint windows of ids [tokens]."""
    model.eval()
    config = model.config
    n = len(ids) // window
    rows = ids[: n * window].view(n, window).long()
    shape = (config.num_hidden_layers, config.num_experts, config.vocab_size)
    counts = torch.zeros(shape, dtype=torch.float32, device=ids.device)
    for i in range(0, n, batch):
        part = rows[i : i + batch]
        routed = model(input_ids=part, output_router_logits=True, use_cache=False).router_logits
        for layer, logits in enumerate(routed):
            for chosen in logits.float().topk(config.num_experts_per_tok, -1).indices.T:
                cells = chosen * config.vocab_size + part.flatten()
                counts[layer].view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=torch.float32))
    model.train()
    return counts.cpu().double()


def information_bits(joint: Tensor) -> float:
    """Return the mutual information in bits of the rows and columns of counts [a, b]."""
    p = joint / joint.sum().clamp(min=1e-300)
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return torch.where(p > 0, p * torch.log2(p / independent.clamp(min=1e-300)), 0.0).sum().item()


def describe_routing(inside: Tensor, outside: Tensor, classes: Sequence[int]) -> list[dict[str, Any]]:
    """
    Summarise counts [layer, expert, token id] of held-out text, and of text of the other kind.

    `max_over_mean` is the busiest expert's load over the mean (1: even), `entropy_bits` that of the load (at most the
    logarithm of the number of experts), `class_information_bits` what the expert says of the class of the token,
    `token_information_bits` of the token itself, and `domain_information_bits` of which text it is (at most 1).
    """
    label = F.one_hot(torch.tensor(list(classes)), max(classes) + 1).double()
    return [_describe_layer(inside[layer], outside[layer], label) for layer in range(len(inside))]


def _describe_layer(inside: Tensor, outside: Tensor, label: Tensor) -> dict[str, Any]:
    share = inside.sum(1) / inside.sum()
    both = torch.stack([share, outside.sum(1) / outside.sum()], 1)
    return {
        "max_over_mean": round((share.max() * len(share)).item(), 4),
        "min_over_mean": round((share.min() * len(share)).item(), 4),
        "entropy_bits": round(-torch.special.xlogy(share, share).sum().item() / math.log(2), 4),
        "class_information_bits": round(information_bits(inside @ label), 4),
        "token_information_bits": round(information_bits(inside), 4),
        "domain_information_bits": round(information_bits(both), 4),
        "share": [round(one, 5) for one in share.tolist()],
    }


# Activations


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[list[tuple[Any, ...]]]]:
    """Keep the positional arguments of every call of every module while the block runs."""
    kept: list[list[tuple[Any, ...]]] = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments, calls=calls: calls.append(arguments))
        for module, calls in zip(modules, kept, strict=True)
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def profile_activations(model: Qwen2MoeForCausalLM, ids: Tensor, window: int) -> list[dict[str, Any]]:
    """
    Say per layer and role how far activations are from what a uniform grid likes.

    Roles are the input of gate and up (`gate_up`), that of the routed experts' down (`down`) and of the shared one's
    (`shared_down`), over the first PROFILED_TOKENS of ids [tokens].
    """
    model.eval()
    n = min(PROFILED_TOKENS, len(ids)) // window
    blocks = [layer.mlp for layer in model.model.layers]
    with inputs_of([block.experts for block in blocks]) as calls:
        model(input_ids=ids[: n * window].view(n, window).long(), use_cache=False)
    model.train()
    return [_profile_block(block, *called[0][:2]) for block, called in zip(blocks, calls, strict=True)]


def _profile_block(block: nn.Module, hidden: Tensor, chosen: Tensor) -> dict[str, Any]:
    """Profile one block from the hidden states [tokens, hidden] and the chosen experts [tokens, k]."""
    experts = block.experts
    hidden = hidden.reshape(-1, hidden.shape[-1])
    per_expert: list[Tensor] = []
    for expert in range(len(experts.gate_up_proj)):
        rows = hidden[(chosen == expert).any(-1)]
        if len(rows):
            gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, -1)
            per_expert.append((F.silu(gate) * up).float())
    shared = block.shared_expert
    inner = (F.silu(shared.gate_proj(hidden)) * shared.up_proj(hidden)).float()
    return {
        "gate_up": describe_values([hidden.float()]),
        "down": describe_values(per_expert),
        "shared_down": describe_values([inner]),
    }


def describe_values(groups: Sequence[Tensor]) -> dict[str, float]:
    """
    Describe groups of rows [rows, channels], a group being what meets one weight matrix.

    `kurtosis` is E[(x - mean)^4] / variance^2 (3 for a normal distribution) and `max_over_median` the largest magnitude
    over the median magnitude, both over all entries; `channel_max_over_median` is the same ratio over the channels'
    largest magnitudes, and `row_max_over_rms` over each row, the mean over groups and over rows.
    """
    values = torch.cat([group.flatten() for group in groups]).double()
    centred = values - values.mean()
    variance = centred.square().mean()
    largest = [group.abs().amax(0) for group in groups if len(group) >= 16] or [groups[0].abs().amax(0)]
    channels = torch.stack([(one.max() / one.median().clamp(min=1e-12)).double() for one in largest])
    rows = torch.cat([group.abs().amax(1) / group.square().mean(1).sqrt().clamp(min=1e-12) for group in groups])
    return {
        "kurtosis": round((centred.square().square().mean() / variance.square().clamp(min=1e-300)).item(), 3),
        "max_over_median": round((values.abs().max() / values.abs().median().clamp(min=1e-12)).item(), 2),
        "channel_max_over_median": round(channels.mean().item(), 3),
        "row_max_over_rms": round(rows.mean().item(), 3),
    }
