"""Rotated models compute what they did, to the last digits of float64, and others are refused and left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mxmoe.errors import BadRotation, MetaWeights, NoResidualStream, RotationChanges, UnknownPart
from mxmoe.evaluate import load_tiny
from mxmoe.transform import rotate_model

from .models import own_model

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "use_cache": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
QWEN: dict[str, Any] = {"moe_intermediate_size": 24, "intermediate_size": 40, "num_experts": 4}
QWEN_3: dict[str, Any] = QWEN | {"head_dim": 8, "mlp_only_layers": [0]}

FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**COMMON, **QWEN, shared_expert_intermediate_size=40)),
    "qwen2 tied": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**COMMON, **QWEN, shared_expert_intermediate_size=40, tie_word_embeddings=True)
    ),
    "qwen3 with a dense layer": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **QWEN_3)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**COMMON, intermediate_size=24, num_experts=4)),
    "deepseek 2": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(**COMMON | LATENT, q_lora_rank=None, topk_method="greedy")
    ),
    "deepseek 3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON | LATENT, q_lora_rank=16)),
    "gpt-oss with biases": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, intermediate_size=24, num_local_experts=4, head_dim=8)
    ),
}
IDS = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let norms, routers and softmax, which transformers computes in float32 always, be float64 as the rest."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        yield


def filled(name: str) -> Any:  # noqa: ANN401  # a model of transformers
    model = FAMILIES[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(values + ("norm" in path))
    model.set_experts_implementation("eager")  # the others take no float64
    return model.eval()


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:  # noqa: ANN401  # as above
    return filled(request.param)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def change(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_the_function_is_kept(model: Any, exact: None, request: pytest.FixtureRequest) -> None:  # noqa: ANN401
    del exact
    model.double()
    tied = "tied" in request.node.callspec.id
    before, old = logits(model), state(model)
    report = rotate_model(model, seed=3)
    assert change(logits(model), before) < 1e-8
    assert report.change < 1e-8
    assert set(report.agreement.values()) == {1.0}
    assert report.untied == tied
    # everything of the stream is another one now, and gains are gone
    for name, tensor in model.state_dict().items():
        if "layernorm" in name and not ("q_a" in name or "kv_a" in name):
            assert bool((tensor == 1).all())
        elif name.endswith(("q_proj.weight", "q_a_proj.weight", "o_proj.weight", "down_proj", "lm_head.weight")):
            assert change(tensor, old[name]) > 0.3, name
    assert "rotated 48 channels in blocks of 48, signs of seed 3" in str(report)


@pytest.mark.parametrize("model", ["qwen2", "deepseek 3"], indirect=True)
def test_blocks_and_seeds(model: Any, exact: None) -> None:  # noqa: ANN401
    del exact
    model.double()
    before = logits(model)
    head = model.lm_head.weight.detach().clone()
    assert rotate_model(model, block=16).block == 16
    first = model.lm_head.weight.detach().clone()
    assert rotate_model(model, seed=1).norms == 5  # without gains by now, and rotated once more
    assert change(logits(model), before) < 1e-8
    assert min(change(first, head), change(model.lm_head.weight.detach(), first)) > 0.3


def test_a_tied_head_is_untied_for_good(tmp_path: Any) -> None:  # noqa: ANN401
    model = filled("qwen2 tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = logits(model)
    rotate_model(model)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "saved")
    again = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "saved")
    assert change(logits(again), before) < 1e-4


def test_an_outlier_of_the_stream_is_spread() -> None:
    model = filled("mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 50

    def peak() -> float:
        rows = model.model.embed_tokens.weight.detach()
        return float((rows.abs().amax(-1) / rows.square().mean(-1).sqrt()).median())

    before = peak()
    rotate_model(model)
    assert peak() < before / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_model(dtype: torch.dtype) -> None:
    tiny = load_tiny(dtype=dtype)
    ids = torch.tensor(list(tiny.held_out[:256]))[None]
    before = logits(tiny.model, ids)
    report = rotate_model(tiny.model, inputs=ids)
    assert change(logits(tiny.model, ids), before) < (1e-4 if dtype == torch.float32 else 0.1)
    assert len(report.agreement) == 4
    assert min(report.agreement.values()) > (0.999 if dtype == torch.float32 else 0.9)


class Shifted(nn.Module):
    """An embedding that adds the same to every token: something that no parameter shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids) + torch.arange(48.0)


def test_what_reads_or_writes_the_stream_unseen_is_found_and_all_is_put_back() -> None:
    model = filled("qwen2 tied")
    model.model.embed_tokens = Shifted(model.model.embed_tokens)
    old = state(model)
    with pytest.raises(RotationChanges, match=r"changes its output by \d+.*the model is as it was"):
        rotate_model(model)
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("model.layers.1", "post_feedforward_layernorm"),
        ("model.layers.0.self_attn", "o_norm"),
        ("model.layers.1.mlp", "router_scale"),
        ("model", "embed_positions"),
    ],
)
def test_parts_that_are_not_known_are_named(where: str, part: str) -> None:
    model = filled("qwen2")
    model.get_submodule(where).add_module(part, nn.LayerNorm(48))
    old = state(model)
    with pytest.raises(UnknownPart, match=rf"what {where}\.{part}\.weight \[48\] does"):
        rotate_model(model)
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


def test_norms_that_subtract_a_mean_are_found() -> None:
    model = filled("mixtral")
    for layer in model.model.layers:
        layer.input_layernorm = nn.LayerNorm(48, bias=False)
    with pytest.raises(RotationChanges):
        rotate_model(model)


def test_other_modules_are_refused() -> None:
    with pytest.raises(NoResidualStream, match="Model has no head"):
        rotate_model(own_model("stack"))
    with pytest.raises(NoResidualStream, match="no embedding"):
        rotate_model(filled("qwen2").model.layers[0].mlp)
    model = filled("mixtral")
    del model.model.layers[1].post_attention_layernorm
    with pytest.raises(NoResidualStream, match="no stack of decoder layers"):
        rotate_model(model)
    with pytest.raises(BadRotation, match=r"48 channels cannot be rotated in blocks of 32: .*, 16, "):
        rotate_model(filled("mixtral"), block=32)
    with torch.device("meta"):
        model = FAMILIES["mixtral"]()
    with pytest.raises(MetaWeights):
        rotate_model(model)
