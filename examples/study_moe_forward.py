"""The loss of the study model layer by layer, so that a compiler has one layer to compile and not all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2MoeForCausalLM

Losses = tuple[Tensor, Tensor, Tensor]
"""(cross-entropy in nats per token, balance loss, share of assignments [layer, expert])."""


def layer_forward(layer: nn.Module, hidden: Tensor, positions: tuple[Tensor, Tensor], top_k: int) -> Losses:
    """
    Run one decoder layer on hidden [batch, window, hidden size].

    Returns:
        The new hidden states, the balance loss E * sum_e f_e P_e of the Switch Transformer (equation 4), f [expert].
    """
    normed = layer.input_layernorm(hidden)
    hidden = hidden + layer.self_attn(hidden_states=normed, position_embeddings=positions, attention_mask=None)[0]
    normed = layer.post_attention_layernorm(hidden)
    # routed once more in float32: what the block computes for itself is not to be had without hooks
    probability = F.linear(normed, layer.mlp.gate.weight).float().softmax(-1).flatten(0, 1)
    experts = probability.shape[-1]
    used = F.one_hot(probability.topk(top_k, -1).indices, experts).float().mean((0, 1))
    balance = experts * (used * probability.mean(0)).sum()
    return hidden + layer.mlp(normed), balance, used


def head_loss(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token of hidden [batch, window, hidden size] before the head."""
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())


class StudyLoss:
    """The losses of windows [batch, n + 1] of token ids, as the model itself would have them."""

    def __init__(self, compiled: bool) -> None:
        if compiled:
            # layers share what is compiled; should a version of torch not see it, each has its own and none runs slow
            torch._dynamo.config.recompile_limit = 64
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self.layer, self.head = wrap(layer_forward), wrap(head_loss)

    def __call__(self, model: Qwen2MoeForCausalLM, windows: Tensor) -> Losses:
        """Return the losses; balance is the mean over the layers."""
        body = model.model
        hidden = body.embed_tokens(windows[:, :-1])
        where = torch.arange(hidden.shape[1], device=hidden.device)[None]
        positions = body.rotary_emb(hidden, where)
        balance, used = hidden.new_zeros((), dtype=torch.float32), []
        for layer in body.layers:
            hidden, one, share = self.layer(layer, hidden, positions, model.config.num_experts_per_tok)
            balance = balance + one
            used.append(share.detach())
        loss = self.head(model.lm_head.weight, body.norm(hidden), windows[:, 1:])
        return loss, balance / len(used), torch.stack(used)
