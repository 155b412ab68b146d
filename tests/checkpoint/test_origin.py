"""What a module was made from, and making it again without weights."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeSparseMoeBlock

from mxmoe.checkpoint import Origin
from mxmoe.errors import NeedsBlock

CONFIG = Qwen2MoeConfig(
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=16,
)


@pytest.mark.parametrize("kind", [Qwen2MoeForCausalLM, Qwen2MoeSparseMoeBlock, Qwen2MoeExperts])
def test_a_module_is_built_again_without_values(kind: type[nn.Module]) -> None:
    module = kind(CONFIG)
    origin = Origin.of(module)
    assert origin is not None
    again = origin.build()
    assert type(again) is kind
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
    assert all(parameter.is_meta for parameter in again.parameters())
    assert Origin.of(again) == origin


def test_configs_with_numbers_that_json_lacks() -> None:
    config = Qwen2MoeConfig(**{**CONFIG.to_dict(), "initializer_range": float("inf"), "limits": [0.0, float("-inf")]})
    origin = Origin.of(Qwen2MoeExperts(config))
    assert origin is not None
    again = Origin(**json.loads(json.dumps(asdict(origin))))
    assert again.build().config.initializer_range == float("inf")
    assert again.build().config.limits == [0.0, float("-inf")]


def test_modules_without_an_origin() -> None:
    class Mine(Qwen2MoeExperts):
        pass

    assert Origin.of(nn.Linear(2, 2)) is None
    assert Origin.of(Mine(CONFIG)) is None


def test_only_classes_of_transformers_are_looked_up() -> None:
    origin = Origin.of(Qwen2MoeExperts(CONFIG))
    assert origin is not None
    for cls in ("os:system", "transformers_evil:Model", "transformers.nowhere:Model", "transformers.activations:None_"):
        with pytest.raises(NeedsBlock, match=cls):
            replace(origin, cls=cls).build()


def test_a_class_that_no_config_alone_builds() -> None:
    origin = Origin.of(Qwen2MoeExperts(CONFIG))
    assert origin is not None
    with pytest.raises(NeedsBlock, match=r"EncoderDecoderCache cannot be built from the checkpoint \(ValueError"):
        replace(origin, cls="transformers.cache_utils:EncoderDecoderCache").build()
